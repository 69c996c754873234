#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "kernels/cuda/launch.cuh"

namespace sae_fast::cuda {
namespace {

bool waits_for_kernels() {
  static const bool waits = [] {
    const char* const value = std::getenv("SAE_FAST_DEBUG_SYNC");
    return value != nullptr && std::string_view(value) == "1";
  }();
  return waits;
}

bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

}  // namespace

cudaError_t check_launch(const void* kernel, cudaStream_t stream, cudaError_t error) {
  if (!waits_for_kernels() || is_captured(stream)) return error;
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) {
    const char* name = nullptr;
    if (cudaFuncGetName(&name, kernel) != cudaSuccess) name = "of unknown name";
    std::fprintf(stderr, "sae_fast: the kernel %s failed: %s\n", name, cudaGetErrorString(error));
  }
  return error;
}

}  // namespace sae_fast::cuda
