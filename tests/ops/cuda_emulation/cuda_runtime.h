// Runs the kernels of csrc/cuda on the host, so that their logic is tested without a GPU.
//
// The compiler finds this file in place of the toolkit's. A launch runs one block after the other;
// the threads of a block are fibers that take turns in a random order and meet at barriers and warp
// operations as on the device. In every block one warp runs ahead of the others as far as barriers
// let it, and one lags behind, which shows where a barrier is missing. A barrier that some thread of
// the block never reaches ends the process. Not modelled: memory ordering, speed, alignment.
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

enum class State { kReady, kWaiting, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
};

struct Warp {
  uint64_t offered[kWarp];   // what each lane brings to the operation under way
  uint64_t received[kWarp];  // what they all brought to the last one
  int waiting;
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::mt19937 order(0);
inline unsigned thread, block;
inline size_t at_block_barrier;
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

inline void wait() {
  const unsigned self = thread;
  fibers[self].state = State::kWaiting;
  swapcontext(&fibers[self].context, &scheduler);
}

inline void release(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) fibers[i].state = State::kReady;
}

// The last thread to come opens a barrier and runs on.
inline int block_barrier(bool predicate) {
  offered_count += predicate;
  if (++at_block_barrier < fibers.size()) {
    wait();
  } else {
    received_count = offered_count;
    offered_count = 0;
    at_block_barrier = 0;
    release(0, fibers.size());
  }
  return received_count;
}

template <typename Choose>
std::vector<unsigned> ready(Choose choose) {
  std::vector<unsigned> found;
  for (unsigned i = 0; i < fibers.size(); ++i) {
    if (fibers[i].state == State::kReady && choose(i / kWarp)) found.push_back(i);
  }
  return found;
}

inline void run_block() {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.state = State::kReady;
    makecontext(&fiber.context, run_body, 0);
  }
  const unsigned first = order() % warps.size(), last = order() % warps.size();
  std::vector<unsigned> turn;
  for (;;) {
    turn = ready([=](unsigned warp) { return warp == first; });
    if (turn.empty()) turn = ready([=](unsigned warp) { return warp != last; });
    if (turn.empty()) turn = ready([=](unsigned warp) { return warp == last; });
    if (order() % 2) std::reverse(turn.begin(), turn.end());
    for (const unsigned i : turn) {
      thread = i;
      swapcontext(&scheduler, &fibers[i].context);
    }
    if (turn.empty()) break;
  }
  for (const Fiber& fiber : fibers) {
    if (fiber.state != State::kDone) fail("threads wait at a barrier for ever");
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
  if (++warp.waiting < kWarp) {
    wait();
  } else {
    std::copy(warp.offered, warp.offered + kWarp, warp.received);
    warp.waiting = 0;
    const size_t begin = thread / kWarp * kWarp;
    release(begin, begin + kWarp);
  }
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

inline void __syncthreads() { emulation::block_barrier(false); }

inline int __syncthreads_count(int predicate) { return emulation::block_barrier(predicate != 0); }

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
