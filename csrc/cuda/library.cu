// Questions about the library itself.

#include "common.cuh"

namespace {
__global__ void probe_kernel() {}
}  // namespace

CTT_EXPORT const char* ctt_cuda_error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

// 0 where the driver is new enough and this library holds code for the card. No kernel runs.
CTT_EXPORT int ctt_cuda_probe(int device) {
  const cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  cudaFuncAttributes attributes;
  const cudaError_t found = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // a refusal must not show up in a later, unrelated check
  return found;
}
