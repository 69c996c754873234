// Stands in for the CUDA runtime: what our kernels and launchers use of it, on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "tests/cuda_emulation/emulation.h"

#define SAE_FAST_EMULATED_CUDA
#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
};
using cudaStream_t = struct EmulatedStream*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

using std::max;
using std::min;

struct float2 {
  float x, y;
};

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline void __syncthreads() { emulated_cuda::block_barrier(); }

template <typename Value>
Value __shfl_xor_sync(unsigned /*mask*/, Value value, int lanes) {
  return emulated_cuda::shuffle(value, (threadIdx.x % 32) ^ static_cast<unsigned>(lanes));
}

template <typename Value>
Value __shfl_up_sync(unsigned /*mask*/, Value value, int lanes) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return emulated_cuda::shuffle(value, static_cast<unsigned>(lane < lanes ? lane : lane - lanes));
}

template <typename Value>
Value __shfl_sync(unsigned /*mask*/, Value value, int lane) {
  return emulated_cuda::shuffle(value, static_cast<unsigned>(lane) % 32);
}

inline void __threadfence() {}  // blocks run one after the other

template <typename Value>
Value __ldcg(const Value* from) {
  return *from;
}

// Hints for the caches, which are none here.
template <typename Bits>
Bits __ldcs(const Bits* from) {
  Bits bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}
template <typename Bits>
void __stcs(Bits* to, Bits bits) {
  std::memcpy(to, &bits, sizeof bits);
}

inline void __syncwarp() { emulated_cuda::warp_barrier(); }
inline unsigned __ballot_sync(unsigned /*mask*/, bool bit) { return emulated_cuda::ballot(bit); }
inline bool __any_sync(unsigned /*mask*/, bool bit) { return emulated_cuda::ballot(bit) != 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// Threads change places at barriers only, so plain operations are atomic.
template <typename Number>
Number atomicAdd(Number* to, Number value) {
  return std::exchange(*to, *to + value);
}
template <typename Number>
Number atomicMax(Number* to, Number value) {
  return std::exchange(*to, std::max(*to, value));
}
template <typename Number>
Number atomicOr(Number* to, Number bits) {
  return std::exchange(*to, *to | bits);
}

inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t /*stream*/) {
  ++emulated_cuda::nodes.fills;
  std::memset(to, byte, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*index*/) {
  const emulated_cuda::Device& device = emulated_cuda::device;
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_per_block;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_per_multiprocessor;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = device.reserved_per_block;
      break;
  }
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute /*attribute*/,
                                        int bytes) {
  if (bytes > emulated_cuda::device.shared_per_block) return cudaErrorInvalidValue;
  emulated_cuda::allowed_shared_bytes()[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const void* const key = reinterpret_cast<const void*>(kernel);
  if (config->dynamicSmemBytes > emulated_cuda::shared_limit(key)) return cudaErrorInvalidValue;
  ++emulated_cuda::nodes.kernels;
  emulated_cuda::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                          [&] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}
