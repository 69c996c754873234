// A warp's view of one row of a product chunk: 128 columns at a time, four neighbours a lane, the
// encoder's bias added.
#pragma once

#include "kernels/cuda/encode/state.cuh"
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/vector.cuh"

namespace sae_fast::cuda {

constexpr int kLaneColumns = kStrip / kWarpSize;
constexpr int kStrips = kSegment / kStrip;
constexpr unsigned kLaneMask = (1u << kLaneColumns) - 1u;
using Columns = Vector<float, kLaneColumns>;

// Four numbers of a row from `column` on; zeros beyond its end.
template <bool kVector>
__device__ inline Columns load_lane(const float* __restrict__ row, int column, int columns) {
  Columns loaded{};
  if constexpr (kVector) {
    if (column < columns) loaded = load<float, kLaneColumns>(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      if (column + i < columns) loaded.at[i] = row[column + i];
    }
  }
  return loaded;
}

// The place of a warp: a segment of one row of the chunk.
struct RowSegment {
  const float* __restrict__ product;  // [columns]
  const float* __restrict__ b_enc;    // [columns] of the chunk's latents
  int64_t first_latent;               // of the chunk
  int columns;                        // of the chunk
  int begin;                          // of the segment, in the chunk

  __device__ int column(int strip) const {
    return begin + strip * kStrip + lane_index() * kLaneColumns;
  }

  __device__ int64_t latent(int strip) const { return first_latent + column(strip); }

  __device__ int64_t segment() const { return (first_latent + begin) / kSegment; }

  // The pre-activations of the lane's columns.
  template <bool kVector>
  __device__ Columns load_strip(int strip) const {
    Columns values = load_lane<kVector>(product, column(strip), columns);
    const Columns bias = load_lane<kVector>(b_enc, column(strip), columns);
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) values.at[i] += bias.at[i];
    return values;
  }

  // kLaneColumns bits a strip: which of the lane's columns there are.
  __device__ unsigned existing() const {
    unsigned bits = 0;
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
      const int count = min(max(columns - column(strip), 0), kLaneColumns);
      bits |= ((1u << count) - 1u) << strip * kLaneColumns;
    }
    return bits;
  }

  // As many bits: which of the lane's columns are dead latents.
  __device__ unsigned dead(const uint32_t* __restrict__ dead_bits) const {
    const uint32_t* const words = dead_bits + segment() * kDeadWords;
    unsigned bits = 0;
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
      const int position = strip * kStrip + lane_index() * kLaneColumns;
      bits |= (words[position / 32] >> position % 32 & kLaneMask) << strip * kLaneColumns;
    }
    return bits;
  }
};

// Bit by bit whether a value may exceed the limit; NaN, in value or limit, may.
__device__ inline unsigned not_below(const Columns (&values)[kStrips], float limit) {
  unsigned bits = 0;
#pragma unroll
  for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      if (!(values[strip].at[i] < limit)) bits |= 1u << (strip * kLaneColumns + i);
    }
  }
  return bits;
}

// The places of a lane's bits of a strip in a list that ascends by latent: the number of set bits
// before the lane's, and the number of all.
struct StripPlaces {
  int first, total;

  __device__ explicit StripPlaces(unsigned bits) : first(0), total(0) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const unsigned lanes = __ballot_sync(kFullWarp, (bits >> i & 1u) != 0);
      first += __popc(lanes & lanes_before());
      total += __popc(lanes);
    }
  }
};

}  // namespace sae_fast::cuda
