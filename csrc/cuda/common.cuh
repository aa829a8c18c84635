// What the operations share: element types, the C boundary and the launch.
//
// Every entry point returns a cudaError_t as int, 0 for success; nothing here allocates, waits or
// keeps state, so every call can be captured in a CUDA graph.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#define CTT_EXPORT extern "C" __attribute__((visibility("default")))

namespace ctt {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// The numbers are part of the C boundary: ctt/ops/backends/cuda.py passes them.
enum DType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// What an element is computed in: float64 stays, everything else is computed in float32.
template <typename T>
struct Widened {
  using type = float;
};
template <>
struct Widened<double> {
  using type = double;
};
template <typename T>
using Wide = typename Widened<T>::type;

__host__ __device__ inline float widen(float x) { return x; }
__host__ __device__ inline double widen(double x) { return x; }
__host__ __device__ inline float widen(__half x) { return __half2float(x); }
__host__ __device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__host__ __device__ inline T narrow(double x) {
  return static_cast<T>(x);
}
template <typename T>
__host__ __device__ inline T narrow(float x) {
  return static_cast<T>(x);
}
template <>
__host__ __device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__host__ __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// One launch on `stream` of `device`. The runtime linked into this library keeps a current device
// of its own, so it is set each time; the caller has made it PyTorch's current device too.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int device,
           void* stream, Arguments&&... arguments) {
  const cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
}

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline unsigned lower_lanes() { return (1u << lane()) - 1; }

}  // namespace ctt
