// The bin in which a histogram of 2^16 bins reaches a rank, by one block.
#pragma once

#include "kernels/cuda/encode/batch.cuh"
#include "kernels/cuda/vector.cuh"

namespace sae_fast::cuda {

constexpr int kFindThreads = 1024;
constexpr int kTiles = kBins / kWarpSize;

struct Bin {
  int bin;       // kBins where there are fewer than wanted
  Count before;  // in the bins before it
  Count count;   // in it
};

struct FindShared {
  Count tiles[kTiles];  // sums of kWarpSize bins
  Bin found;
};

__device__ inline Count warp_sum_before(Count value) {
  Count sum = value;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const Count below = __shfl_up_sync(kFullWarp, sum, step);
    if (lane_index() >= step) sum += below;
  }
  return sum - value;
}

// By one warp, from the sums of the tiles.
__device__ inline Bin find_in_tiles(const Count* histogram, const Count* tiles, Count wanted) {
  constexpr int kOwned = kTiles / kWarpSize;
  int tile = lane_index() * kOwned;
  Count own = 0;
  for (int i = 0; i < kOwned; ++i) own += tiles[tile + i];
  Count before = warp_sum_before(own);
  const bool mine = before < wanted && wanted <= before + own;
  if (mine) {
    while (before + tiles[tile] < wanted) before += tiles[tile++];
  }
  const unsigned lanes = __ballot_sync(kFullWarp, mine);
  if (lanes == 0) return {kBins, 0, 0};
  const int owner = __ffs(static_cast<int>(lanes)) - 1;
  tile = __shfl_sync(kFullWarp, tile, owner);
  before = __shfl_sync(kFullWarp, before, owner);
  const Count count = histogram[tile * kWarpSize + lane_index()];
  before += warp_sum_before(count);
  const bool here = before < wanted && wanted <= before + count;
  const int lane = __ffs(static_cast<int>(__ballot_sync(kFullWarp, here))) - 1;
  return {tile * kWarpSize + lane, __shfl_sync(kFullWarp, before, lane),
          __shfl_sync(kFullWarp, count, lane)};
}

// The bin of the wanted-th number, from 1. All kFindThreads threads of the block call.
__device__ inline Bin find_bin(const Count* histogram, Count wanted, FindShared& shared) {
  using Pair = Vector<Count, 2>;  // 16 bytes
  const auto* const pairs = reinterpret_cast<const Pair*>(histogram);
  constexpr int kPairs = kWarpSize / 2;
  for (int tile = static_cast<int>(threadIdx.x); tile < kTiles; tile += kFindThreads) {
    Count sum = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const Pair pair = pairs[tile * kPairs + i];
      sum += pair.at[0] + pair.at[1];
    }
    shared.tiles[tile] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    const Bin found = find_in_tiles(histogram, shared.tiles, wanted);
    if (lane_index() == 0) shared.found = found;
  }
  __syncthreads();
  return shared.found;
}

}  // namespace sae_fast::cuda
