// Launching, and handing out pieces of one scratch allocation.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace sae_fast::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename Integer>
__host__ __device__ constexpr Integer ceil_div(Integer value, Integer unit) {
  return (value + unit - 1) / unit;
}

// The shared memory that a launch gave the block, aligned for any vector.
__device__ inline void* dynamic_shared_memory() {
#ifdef SAE_FAST_EMULATED_CUDA  // csrc/tests/cuda_emulation
  return emulated_cuda::dynamic_shared_memory();
#else
  extern __shared__ uint4 shared_memory[];
  return shared_memory;
#endif
}

// Without permission a block gets this much shared memory, the arrays that its kernel declares
// (static) and what the launch adds (dynamic) together.
constexpr size_t kSharedWithoutAsking = 48 * 1024;
// No kernel here declares more; tools/cuda_resources.py checks it.
constexpr size_t kMostStaticShared = 17 * 1024;

#ifdef SAE_FAST_EMULATED_CUDA
inline cudaError_t device_attribute(int* value, cudaDeviceAttr attribute) {
  return cudaDeviceGetAttribute(value, attribute, 0);  // tests change the device
}
inline cudaError_t check_launch(const void* /*kernel*/, cudaStream_t /*stream*/,
                                cudaError_t error) {
  return error;
}
#else
// An attribute of the current device; each thread asks the driver for it once.
cudaError_t device_attribute(int* value, cudaDeviceAttr attribute);
// Returns the error of a launch. With SAE_FAST_DEBUG_SYNC=1 it waits for the kernel first, unless
// the stream is being captured, and prints the name of a kernel that has failed.
cudaError_t check_launch(const void* kernel, cudaStream_t stream, cudaError_t error);
#endif

// Starts `blocks` thread blocks, of which a kernel may get fewer than it asked for (the grid's x
// stops at 2^31 - 1): kernels stride over their work by gridDim.x. Nothing to do is no launch.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (shared_bytes > kSharedWithoutAsking - kMostStaticShared) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return check_launch(reinterpret_cast<const void*>(kernel), stream,
                      cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

// Hands out aligned pieces of one allocation. Over a null base it only counts, so that the query
// for the size and the launcher share one list of pieces and cannot disagree.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}

  template <typename Element>
  Element* take(int64_t count) {
    constexpr size_t kAlignment = 256;
    char* const piece = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += ceil_div(static_cast<size_t>(count) * sizeof(Element), kAlignment) * kAlignment;
    return reinterpret_cast<Element*>(piece);
  }

  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

}  // namespace sae_fast::cuda
