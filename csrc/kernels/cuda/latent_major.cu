// The latent-major view of a code, by counting: how many entries every latent has, where its list
// begins, and each entry into a place of the list that atomics give it. A last pass orders every
// list by position, so that the result does not depend on which thread came first.
#include <cstdint>

#include "kernels/cuda/ordering.cuh"
#include "kernels/cuda/rows.h"

namespace sae_fast::cuda {
namespace {

constexpr int kTileThreads = 1024;
constexpr int kTileItems = 2;
constexpr int64_t kTileEntries = kTileThreads * kTileItems;
constexpr int kScanItems = 4;
// That a multiprocessor's registers must hold; left to itself the assembler spills for more.
constexpr int kOrderBlocks = 4;

struct ViewScratch {
  uint32_t* counts;  // [F + 1]: entries of each latent; the last is the launch's ticket
  int32_t* places;   // [entries]: of an entry in its latent's list
  int32_t* lists;    // [entries]: the lists, unordered
  int64_t* zeros;    // [tiles]: entries of value 0 in each tile, then in the tiles before it

  ViewScratch(Scratch& scratch, int64_t entries, int64_t d_sae)
      : counts(scratch.take<uint32_t>(d_sae + 1)),
        places(scratch.take<int32_t>(entries)),
        lists(scratch.take<int32_t>(entries)),
        zeros(scratch.take<int64_t>(tiles(entries))) {}

  static int64_t tiles(int64_t entries) { return ceil_div(entries, kTileEntries); }
};

// Returns the row of an entry.
__device__ inline int32_t row_of(const CodeRows& code, int32_t entry) {
  if (code.offsets == nullptr) return entry / static_cast<int32_t>(code.k);
  int64_t low = 0;
  int64_t high = code.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (code.offsets[middle + 1] <= entry) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return static_cast<int32_t>(low);
}

// ---- kernels

// One block a tile of entries. The last one turns the counts into offsets.
__global__ void __launch_bounds__(kTileThreads)
    count_entries_kernel(const float* __restrict__ values, const int32_t* __restrict__ indices,
                         int64_t entries, int64_t d_sae, int64_t tiles, ViewScratch view,
                         int64_t* __restrict__ latent_offsets) {
  __shared__ int64_t partial[kTileThreads / kWarpSize];
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int64_t zeros = 0;
#pragma unroll
    for (int i = 0; i < kTileItems; ++i) {
      const int64_t entry = tile * kTileEntries + i * kTileThreads + threadIdx.x;
      if (entry >= entries) continue;
      if (values[entry] == 0.0f) {
        ++zeros;
      } else {
        view.places[entry] = static_cast<int32_t>(atomicAdd(&view.counts[indices[entry]], 1u));
      }
    }
    zeros = block_sum(zeros, partial);
    if (threadIdx.x == 0) view.zeros[tile] = zeros;
  }
  if (!is_last_block(&view.counts[d_sae])) return;
  const int64_t listed = block_scan<kScanItems>(
      d_sae, partial, [&](int64_t latent) { return int64_t{load_written(&view.counts[latent])}; },
      [&](int64_t latent, int64_t before) { latent_offsets[latent] = before; });
  if (threadIdx.x == 0) latent_offsets[d_sae] = listed;
  block_scan<kScanItems>(
      tiles, partial, [&](int64_t tile) { return load_written(&view.zeros[tile]); },
      [&](int64_t tile, int64_t before) { view.zeros[tile] = before; });
}

// One block a tile of entries. It puts entries of value 0 into their final places.
__global__ void __launch_bounds__(kTileThreads)
    place_entries_kernel(const float* __restrict__ values, const int32_t* __restrict__ indices,
                         CodeRows code, int64_t d_sae, int64_t tiles, ViewScratch view,
                         const int64_t* __restrict__ latent_offsets, int32_t* __restrict__ entries,
                         int32_t* __restrict__ rows) {
  __shared__ int partial[kTileThreads / kWarpSize];
  const int64_t listed = latent_offsets[d_sae];
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * kTileEntries;
    block_scan<kTileItems>(
        min(kTileEntries, code.entries - first), partial,
        [&](int64_t i) { return values[first + i] == 0.0f ? 1 : 0; },
        [&](int64_t i, int zeros) {
          const auto entry = static_cast<int32_t>(first + i);
          if (values[entry] == 0.0f) {
            const int64_t at = listed + view.zeros[tile] + zeros;
            entries[at] = entry;
            rows[at] = row_of(code, entry);
          } else {
            view.lists[latent_offsets[indices[entry]] + view.places[entry]] = entry;
          }
        });
  }
}

__global__ void __launch_bounds__(kOrderThreads, kOrderBlocks)
    order_lists_kernel(CodeRows code, const int32_t* __restrict__ lists,
                       const int64_t* __restrict__ latent_offsets, int64_t d_sae,
                       int32_t* __restrict__ entries, int32_t* __restrict__ rows) {
  __shared__ OrderShared shared;
  order_lists(
      d_sae, shared, [&](int64_t latent) { return latent_offsets[latent]; },
      [&](int64_t latent) { return latent_offsets[latent + 1]; },
      [&](int64_t i) { return lists[i]; },
      [&](int64_t i, int64_t to) {
        const int32_t entry = lists[i];
        entries[to] = entry;
        rows[to] = row_of(code, entry);
      });
}

}  // namespace

// ---- launchers

cudaError_t latent_major_scratch_bytes(int64_t entries, int64_t d_sae, size_t* bytes) {
  Scratch scratch(nullptr);
  const ViewScratch view(scratch, entries, d_sae);
  *bytes = scratch.bytes();
  return cudaSuccess;
}

cudaError_t latent_major(const float* values, const int32_t* indices, CodeRows code,
                         int64_t* latent_offsets, int32_t* entries, int32_t* rows, int64_t d_sae,
                         void* scratch, cudaStream_t stream) {
  if (code.entries == 0) {
    return cudaMemsetAsync(latent_offsets, 0,
                           static_cast<size_t>(d_sae + 1) * sizeof *latent_offsets, stream);
  }
  Scratch remaining(scratch);
  const ViewScratch view(remaining, code.entries, d_sae);
  const int64_t tiles = ViewScratch::tiles(code.entries);
  cudaError_t error =
      cudaMemsetAsync(view.counts, 0, static_cast<size_t>(d_sae + 1) * sizeof *view.counts, stream);
  const auto then = [&error](auto&& start) {
    if (error == cudaSuccess) error = start();
  };
  then([&] {
    return launch(count_entries_kernel, tiles, kTileThreads, 0, stream, values, indices,
                  code.entries, d_sae, tiles, view, latent_offsets);
  });
  then([&] {
    return launch(place_entries_kernel, tiles, kTileThreads, 0, stream, values, indices, code,
                  d_sae, tiles, view, latent_offsets, entries, rows);
  });
  then([&] {
    return launch(order_lists_kernel, ceil_div<int64_t>(d_sae, kOrderWarps), kOrderThreads, 0,
                  stream, code, view.lists, latent_offsets, d_sae, entries, rows);
  });
  return error;
}

}  // namespace sae_fast::cuda
