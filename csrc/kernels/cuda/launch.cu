#include <cstdio>
#include <cstdlib>
#include <map>
#include <string_view>
#include <utility>

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

cudaError_t device_attribute(int* value, cudaDeviceAttr attribute) {
  thread_local std::map<std::pair<int, cudaDeviceAttr>, int> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const auto found = known.find({device, attribute});
  if (found != known.end()) {
    *value = found->second;
    return cudaSuccess;
  }
  error = cudaDeviceGetAttribute(value, attribute, device);
  if (error == cudaSuccess) known[{device, attribute}] = *value;
  return error;
}

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
