// The Gram matrix S [size, size] of many unit vectors, from products of their float16 halves
// x = (high + low / kLowScale) / scale. How far S can be from the exact one: decorrelation.h.
#pragma once

#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace sae_fast::cuda {

// Unit vectors have elements up to 1, and float16 reaches 65504: the small ones stay normal
// numbers.
constexpr float kUnitScale = 0x1p15f;
constexpr float kLowScale = 0x1p11f;

struct Halves {
  __half high, low;
};

// x = high + low / kLowScale to 2^-23, for |x| up to 2^15.
__device__ inline Halves split(float x) {
  const __half high = round_to<__half>(x);
  return {high, round_to<__half>((x - to_float(high)) * kLowScale)};
}

// Brings S into the range of float16: no element of a sum of `count` products of two elements of
// unit vectors exceeds `count`.
inline float gram_scale(int64_t count) {
  float scale = 0x1p15f;
  for (int64_t bound = 1; bound < count; bound *= 2) scale /= 2.0f;
  return scale;
}

constexpr int kGramThreads = 256;
constexpr int kGramTile = 32;
constexpr int kGramTileRows = kGramThreads / kGramTile;  // of a tile, that a block reads at once

inline int64_t gram_tiles(int64_t size) {
  const int64_t across = ceil_div<int64_t>(size, kGramTile);
  return across * across;
}

// S from product [size, 2 size] = A beside B: A = high' high, B = high' low, S = A + (B + B') /
// kLowScale. sink.diagonal(i) gives S's diagonal, which is most of |S|^2, in double; sink.store
// (row, column, element) keeps an element. |S|^2 is the sum of tile_squares, unless that is null.
//
// One block a tile. The element of B across the diagonal comes through shared memory, so that it
// too is read along rows.
template <typename Sink>
__global__ void __launch_bounds__(kGramThreads)
    gram_kernel(const float* __restrict__ product, int64_t size, Sink sink,
                double* __restrict__ tile_squares) {
  __shared__ float across[kGramTile][kGramTile + 1];
  __shared__ double partial[kGramThreads / kWarpSize];
  constexpr double kUnscale = 1.0 / (static_cast<double>(kUnitScale) * kUnitScale);
  const int x = static_cast<int>(threadIdx.x) % kGramTile;
  const int y = static_cast<int>(threadIdx.x) / kGramTile;
  const int64_t tiles_across = ceil_div<int64_t>(size, kGramTile);
  for (int64_t tile = blockIdx.x; tile < tiles_across * tiles_across; tile += gridDim.x) {
    const int64_t first_row = tile / tiles_across * kGramTile;
    const int64_t first_column = tile % tiles_across * kGramTile;
    __syncthreads();  // the last tile has been read
    for (int r = y; r < kGramTile; r += kGramTileRows) {
      const int64_t row = first_column + r;
      const int64_t column = first_row + x;
      if (row < size && column < size) across[r][x] = product[(2 * row + 1) * size + column];
    }
    __syncthreads();
    double square = 0.0;
    for (int r = y; r < kGramTile; r += kGramTileRows) {
      const int64_t row = first_row + r;
      const int64_t column = first_column + x;
      if (row >= size || column >= size) continue;
      const auto a = static_cast<double>(product[2 * row * size + column]);
      const auto b = static_cast<double>(product[(2 * row + 1) * size + column]);
      const auto b_across = static_cast<double>(across[x][r]);
      double element = (a + (b + b_across) / kLowScale) * kUnscale;
      if (row == column) element = sink.diagonal(row);
      square += element * element;
      sink.store(row, column, element);
    }
    square = block_sum(square, partial);
    if (threadIdx.x == 0 && tile_squares != nullptr) tile_squares[tile] = square;
  }
}

// One thread a number: total = sum of `parts` arrays behind each other, added to what total held
// unless `first`.
static __global__ void __launch_bounds__(kGramThreads)
    sum_parts_kernel(float* __restrict__ total, const float* __restrict__ parts, int64_t size,
                     int64_t count, bool first) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kGramThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kGramThreads + threadIdx.x;
  for (; i < size; i += stride) {
    double sum = first ? 0.0 : static_cast<double>(total[i]);
#pragma unroll 4
    for (int64_t part = 0; part < count; ++part) sum += static_cast<double>(parts[part * size + i]);
    total[i] = static_cast<float>(sum);
  }
}

}  // namespace sae_fast::cuda
