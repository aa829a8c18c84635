// Runs the kernels of csrc/cuda on the host, so that their logic is tested without a GPU.
//
// The compiler finds this file in place of the toolkit's. A launch runs one block after the other;
// the threads of a block are fibers that take turns in a random order and meet at barriers and warp
// operations as on the device. A barrier that some thread of the block never reaches ends the
// process. Not modelled: memory ordering, speed, alignment.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static  // blocks run one by one, so all fibers of a block share it

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = size_t{128} << 10;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
};

struct Warp {
  uint64_t offered[kWarp];   // what each lane brings to the operation under way
  uint64_t received[kWarp];  // what they all brought to the last one
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::mt19937 order(0);
inline unsigned thread, block;
inline int offered_count, received_count;
inline int launches;

inline void fail(const char* what) {
  std::fprintf(stderr, "cuda emulation: %s\n", what);
  std::abort();
}

inline void run_body() {
  body();
  fibers[thread].state = State::kDone;
  swapcontext(&fibers[thread].context, &scheduler);
}

inline void wait(State at) {
  const unsigned self = thread;
  fibers[self].state = at;
  swapcontext(&fibers[self].context, &scheduler);
}

inline bool all_at(State state, size_t begin, size_t end) {
  return std::all_of(fibers.begin() + begin, fibers.begin() + end,
                     [=](const Fiber& fiber) { return fiber.state == state; });
}

inline void release(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) fibers[i].state = State::kReady;
}

// Opens every barrier that all of its threads have reached; false when nobody can go on.
inline bool open_barriers() {
  bool opened = false;
  for (size_t w = 0; w < warps.size(); ++w) {
    if (!all_at(State::kAtWarpBarrier, w * kWarp, (w + 1) * kWarp)) continue;
    std::copy(warps[w].offered, warps[w].offered + kWarp, warps[w].received);
    release(w * kWarp, (w + 1) * kWarp);
    opened = true;
  }
  if (all_at(State::kAtBlockBarrier, 0, fibers.size())) {
    received_count = offered_count;
    offered_count = 0;
    release(0, fibers.size());
    opened = true;
  }
  return opened;
}

inline void run_block() {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.state = State::kReady;
    makecontext(&fiber.context, run_body, 0);
  }
  std::vector<unsigned> turn;
  for (;;) {
    turn.clear();
    for (unsigned i = 0; i < fibers.size(); ++i) {
      if (fibers[i].state == State::kReady) turn.push_back(i);
    }
    // whole warps in a random order, sometimes single lanes too
    if (order() % 8 == 0) {
      std::shuffle(turn.begin(), turn.end(), order);
    } else if (!turn.empty()) {
      std::rotate(turn.begin(), turn.begin() + order() % turn.size(), turn.end());
      if (order() % 2) std::reverse(turn.begin(), turn.end());
    }
    for (const unsigned i : turn) {
      thread = i;
      swapcontext(&scheduler, &fibers[i].context);
    }
    if (turn.empty() && !open_barriers()) {
      if (!all_at(State::kDone, 0, fibers.size())) fail("threads wait at a barrier for ever");
      return;
    }
  }
}

template <typename T>
uint64_t to_word(T value) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

// Every lane brings a value and sees what the whole warp brought.
template <typename T>
const Warp& exchange(unsigned mask, T value) {
  if (mask != 0xffffffffu) fail("only whole warps are emulated");
  Warp& warp = warps[thread / kWarp];
  warp.offered[thread % kWarp] = to_word(value);
  wait(State::kAtWarpBarrier);
  return warp;
}

struct Index {
  unsigned x;
};
inline Index thread_index() { return {thread}; }
inline Index block_index() { return {block}; }

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())

using std::max;
using std::min;

inline void __syncthreads() { emulation::wait(emulation::State::kAtBlockBarrier); }

inline int __syncthreads_count(int predicate) {
  emulation::offered_count += predicate != 0;
  emulation::wait(emulation::State::kAtBlockBarrier);
  return emulation::received_count;
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const auto& warp = emulation::exchange(mask, predicate);
  unsigned bits = 0;
  for (int i = 0; i < emulation::kWarp; ++i) bits |= unsigned(warp.received[i] != 0) << i;
  return bits;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::from_word<T>(emulation::exchange(mask, value).received[source]);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int offset) {
  const int source = static_cast<int>(emulation::thread % emulation::kWarp) - offset;
  const auto& warp = emulation::exchange(mask, value);
  return source < 0 ? value : emulation::from_word<T>(warp.received[source]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  const int source = static_cast<int>(emulation::thread % emulation::kWarp) ^ with;
  return emulation::from_word<T>(emulation::exchange(mask, value).received[source]);
}

template <typename T>
T atomicAdd(T* target, T value) {
  const T before = *target;
  *target += value;
  return before;
}

template <typename T>
T __ldcs(const T* source) {
  return *source;
}
template <typename T>
void __stcs(T* target, T value) {
  *target = value;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline unsigned __float_as_uint(float x) { return emulation::from_word<unsigned>(emulation::to_word(x)); }
inline long long __double_as_longlong(double x) {
  return emulation::from_word<long long>(emulation::to_word(x));
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const unsigned threads = config->blockDim.x;
  if (config->gridDim.x == 0 || threads == 0 || threads % emulation::kWarp || threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  ++emulation::launches;
  const std::tuple<Parameters...> values(arguments...);
  emulation::body = [&] { std::apply(kernel, values); };
  emulation::fibers.resize(threads);
  emulation::warps.resize(threads / emulation::kWarp);
  for (emulation::block = 0; emulation::block < config->gridDim.x; ++emulation::block) {
    emulation::run_block();
  }
  return cudaSuccess;
}

extern "C" {
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "another error";
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
__attribute__((visibility("default"), used)) inline int emulated_launches() {
  return emulation::launches;
}
}

template <typename T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T* kernel) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
