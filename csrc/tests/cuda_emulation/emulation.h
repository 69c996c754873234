// Runs CUDA kernels on the host, one block after the other, so that their arithmetic, indexing and
// barriers are tested where there is no GPU. A block's threads are fibers that switch at barriers
// and shuffles, in a random order: a missing barrier shows as a wrong result, one that not all
// threads reach as an abort. Says nothing about speed or about the device's memory model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_size = 1, unsigned y_size = 1, unsigned z_size = 1)
      : x(x_size), y(y_size), z(z_size) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated_cuda {

// The device that kernels see; tests change it to reach code for other devices and sizes.
struct Device {
  int shared_per_block = 227 * 1024;
  int shared_per_multiprocessor = 228 * 1024;
  int reserved_per_block = 1024;
  unsigned max_blocks = 1u << 30;  // a launch of more blocks gets this many
};
extern Device device;

// The nodes that a CUDA graph of the calls so far would have: launches and fills of memory.
struct Nodes {
  int kernels = 0, fills = 0;
};
extern Nodes nodes;

// By kernel, the dynamic shared memory that it was permitted to use.
std::map<const void*, size_t>& allowed_shared_bytes();
// The most dynamic shared memory that a launch of the kernel may ask for. A device knows how much a
// kernel declares itself; here it is taken to be 1 KiB.
size_t shared_limit(const void* kernel);

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// Inside a kernel.
void* dynamic_shared_memory();
inline void prefetch(const void* from) {  // so that a sanitizer sees the address
  static_cast<void>(*static_cast<const volatile char*>(from));
}
void block_barrier();
void warp_barrier();
uint64_t& shuffle_slot(unsigned lane);  // of the calling thread's warp

template <typename Value>
Value shuffle(Value value, unsigned source_lane) {
  static_assert(sizeof(Value) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  shuffle_slot(threadIdx.x % 32) = bits;
  warp_barrier();
  bits = shuffle_slot(source_lane);
  warp_barrier();
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned ballot(bool bit) {
  shuffle_slot(threadIdx.x % 32) = bit ? 1 : 0;
  warp_barrier();
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    bits |= static_cast<unsigned>(shuffle_slot(lane)) << lane;
  warp_barrier();
  return bits;
}

}  // namespace emulated_cuda
