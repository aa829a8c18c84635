// Questions about the library itself.

#include "common.cuh"

namespace {
__global__ void probe_kernel() {}

// The table of ema_update.cu passes the 4 KiB of kernel parameters that older drivers allow.
constexpr int kOldestDriver = CUDART_VERSION < 12010 ? CUDART_VERSION : 12010;
}  // namespace

// The checksum of the sources, from setup.py.
CTT_EXPORT const char* ctt_cuda_sources() { return CTT_SOURCES; }

CTT_EXPORT const char* ctt_cuda_error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

// 0 where the driver is new enough and this library holds code for the card. No kernel runs.
CTT_EXPORT int ctt_cuda_probe(int device) {
  int driver = 0;
  cudaError_t status = cudaDriverGetVersion(&driver);
  if (status != cudaSuccess) return status;
  if (driver < kOldestDriver) return cudaErrorInsufficientDriver;
  status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe_kernel);
}
