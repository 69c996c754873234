// Marks a function that both a C++ compiler and nvcc compile, for host and device.
#pragma once

#ifdef __CUDACC__
#define SAE_FAST_HOST_DEVICE __host__ __device__
#define SAE_FAST_ALWAYS_INLINE __host__ __device__ __forceinline__
#else
#define SAE_FAST_HOST_DEVICE
// Never a symbol of its own, which one instruction set's code could have in common with another's.
#define SAE_FAST_ALWAYS_INLINE inline __attribute__((always_inline))
#endif
