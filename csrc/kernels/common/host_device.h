// Marks a function that both a C++ compiler and nvcc compile, for host and device.
#pragma once

#ifdef __CUDACC__
#define SAE_FAST_HOST_DEVICE __host__ __device__
#else
#define SAE_FAST_HOST_DEVICE
#endif
