#include "kernels/cuda/decorrelation.h"

#include <cmath>

#include "kernels/common/row_norm.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSumThreads = 1024;
constexpr int kWidth4 = 4;            // columns a thread, where they are aligned
constexpr int64_t kSquareRows = 256;  // rows that one thread sums a column of
constexpr int kTile = 32;
constexpr int kTileRows = kThreads / kTile;  // of a tile, that a block reads at once

// Unit rows have elements up to 1, and float16 reaches 65504: the small ones stay normal numbers.
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

// ---- kernels

// One block a row. The second read of the row comes from the cache.
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    unit_rows_kernel(const float* __restrict__ W, int64_t rows, int64_t d_in,
                     __half* __restrict__ halves, float* __restrict__ norms,
                     double* __restrict__ fourth_powers) {
  __shared__ float partial[kWarps];
  __shared__ double partial_squares[kWarps];
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth;
  const int64_t stride = static_cast<int64_t>(kThreads) * kWidth;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float* const w = W + row * d_in;
    __half* const high = halves + row * 2 * d_in;
    float square = 0.0f;
    for (int64_t column = first; column < d_in; column += stride) {
      const auto weights = load<float, kWidth>(w + column);
      square = add_dot(square, weights, weights);
    }
    const float norm = row_norm(block_sum(square, partial));
    double unit_square = 0.0;
    for (int64_t column = first; column < d_in; column += stride) {
      const auto weights = load<float, kWidth>(w + column);
      Vector<__half, kWidth> highs, lows;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float unit = weights.at[i] / norm;
        unit_square += static_cast<double>(unit) * static_cast<double>(unit);
        const Halves parts = split(unit * kUnitScale);
        highs.at[i] = parts.high;
        lows.at[i] = parts.low;
      }
      *reinterpret_cast<Vector<__half, kWidth>*>(high + column) = highs;
      *reinterpret_cast<Vector<__half, kWidth>*>(high + d_in + column) = lows;
    }
    unit_square = block_sum(unit_square, partial_squares);
    if (threadIdx.x == 0) {
      norms[row] = norm;
      fourth_powers[row] = unit_square * unit_square;
    }
  }
}

// One thread a column of kSquareRows rows.
__global__ void __launch_bounds__(kThreads)
    partial_squares_kernel(const float* __restrict__ W, const float* __restrict__ norms,
                           int64_t rows, int64_t d_in, int64_t blocks_a_row,
                           double* __restrict__ partials) {
  const int64_t blocks = ceil_div(rows, kSquareRows) * blocks_a_row;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t range = block / blocks_a_row;
    const int64_t column = block % blocks_a_row * kThreads + threadIdx.x;
    if (column >= d_in) continue;
    const int64_t end = min((range + 1) * kSquareRows, rows);
    double sum = 0.0;
#pragma unroll 8
    for (int64_t row = range * kSquareRows; row < end; ++row) {
      const auto unit = static_cast<double>(W[row * d_in + column] / norms[row]);
      sum += unit * unit;
    }
    partials[range * d_in + column] = sum;
  }
}

// One thread a column.
__global__ void __launch_bounds__(kThreads)
    sum_squares_kernel(const double* __restrict__ partials, int64_t ranges, int64_t d_in,
                       double* __restrict__ squares) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; column < d_in; column += stride) {
    double sum = 0.0;
#pragma unroll 8
    for (int64_t range = 0; range < ranges; ++range) sum += partials[range * d_in + column];
    squares[column] = sum;
  }
}

// One thread a number.
__global__ void __launch_bounds__(kThreads)
    add_kernel(float* __restrict__ total, const float* __restrict__ part, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i < count; i += stride) total[i] += part[i];
}

// One block a tile of S. The element of B across the diagonal comes through shared memory, so that
// it too is read along rows.
__global__ void __launch_bounds__(kThreads)
    gram_kernel(const float* __restrict__ product, const double* __restrict__ squares, int64_t d_in,
                int64_t tiles_across, double mean_square, float scale, __half* __restrict__ halves,
                double* __restrict__ tile_squares) {
  __shared__ float across[kTile][kTile + 1];
  __shared__ double partial[kWarps];
  constexpr double kUnscale = 1.0 / (static_cast<double>(kUnitScale) * kUnitScale);
  const int x = static_cast<int>(threadIdx.x) % kTile;
  const int y = static_cast<int>(threadIdx.x) / kTile;
  for (int64_t tile = blockIdx.x; tile < tiles_across * tiles_across; tile += gridDim.x) {
    const int64_t first_row = tile / tiles_across * kTile;
    const int64_t first_column = tile % tiles_across * kTile;
    __syncthreads();  // the last tile has been read
    for (int r = y; r < kTile; r += kTileRows) {
      const int64_t row = first_column + r;
      const int64_t column = first_row + x;
      if (row < d_in && column < d_in) across[r][x] = product[(2 * row + 1) * d_in + column];
    }
    __syncthreads();
    double square = 0.0;
    for (int r = y; r < kTile; r += kTileRows) {
      const int64_t row = first_row + r;
      const int64_t column = first_column + x;
      if (row >= d_in || column >= d_in) continue;
      const auto a = static_cast<double>(product[2 * row * d_in + column]);
      const auto b = static_cast<double>(product[(2 * row + 1) * d_in + column]);
      const auto b_across = static_cast<double>(across[x][r]);
      double element = (a + (b + b_across) / kLowScale) * kUnscale;
      if (row == column) element = squares[row];
      square += element * element;
      if (row == column) element -= mean_square;
      const Halves parts = split(static_cast<float>(element) * scale);
      halves[row * d_in + column] = parts.low;
      halves[(d_in + row) * d_in + column] = parts.high;
    }
    square = block_sum(square, partial);
    if (threadIdx.x == 0) tile_squares[tile] = square;
  }
}

// One block in all, so that the order of additions is fixed.
__global__ void __launch_bounds__(kSumThreads)
    loss_kernel(const double* __restrict__ tile_squares, int64_t tiles,
                const double* __restrict__ fourth_powers, int64_t rows, float* __restrict__ loss) {
  __shared__ double partial[kSumThreads / kWarpSize];
  double mine = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < tiles; i += kSumThreads) mine += tile_squares[i];
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < rows; i += kSumThreads) mine -= fourth_powers[i];
  const double sum = block_sum(mine, partial);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum);
}

// The kWidth columns from `offset` of uS.
template <int kWidth>
__device__ inline Vector<float, kWidth> load_product(const float* __restrict__ high,
                                                     const float* __restrict__ mixed,
                                                     int64_t offset, float unscale) {
  auto sum = load<float, kWidth>(high + offset);
  add_scaled(sum, 1.0f / kLowScale, load<float, kWidth>(mixed + offset));
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum.at[i] *= unscale;
  return sum;
}

// One block a row. The second read of the row comes from the cache.
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    tangent_kernel(const float* __restrict__ W, const float* __restrict__ norms,
                   const float* __restrict__ high, const float* __restrict__ mixed, int64_t rows,
                   int64_t d_in, float unscale, float* __restrict__ grad) {
  __shared__ float partial[kWarps];
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth;
  const int64_t stride = static_cast<int64_t>(kThreads) * kWidth;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t start = row * d_in;
    const float norm = norms[row];
    float along = 0.0f;
    for (int64_t column = first; column < d_in; column += stride) {
      auto unit = load<float, kWidth>(W + start + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) unit.at[i] /= norm;
      along = add_dot(along, load_product<kWidth>(high, mixed, start + column, unscale), unit);
    }
    along = block_sum(along, partial);
    for (int64_t column = first; column < d_in; column += stride) {
      auto unit = load<float, kWidth>(W + start + column);
      auto result = load_product<kWidth>(high, mixed, start + column, unscale);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        unit.at[i] /= norm;
        result.at[i] = 4.0f * fmaf(-along, unit.at[i], result.at[i]) / norm;
      }
      store<float, kWidth>(grad + start + column, result);
    }
  }
}

// ---- launchers

// No element of S, a sum of `rows` products of two elements of unit rows, exceeds `rows`.
float gram_scale(int64_t rows) {
  float scale = 0x1p15f;
  for (int64_t bound = 1; bound < rows; bound *= 2) scale /= 2.0f;
  return scale;
}

struct GramScratch {
  double* tile_squares;
  GramScratch(Scratch& scratch, int64_t tiles) : tile_squares(scratch.take<double>(tiles)) {}
};

}  // namespace

cudaError_t split_unit_rows(const float* W, int64_t rows, int64_t d_in, void* halves, float* norms,
                            double* fourth_powers, cudaStream_t stream) {
  return with_width<kWidth4, float>(W, d_in, {halves}, [&](const float* typed, auto width) {
    constexpr int kWidth = decltype(width)::value;
    return launch(unit_rows_kernel<kWidth>, rows, kThreads, 0, stream, typed, rows, d_in,
                  static_cast<__half*>(halves), norms, fourth_powers);
  });
}

size_t column_squares_scratch_bytes(int64_t rows, int64_t d_in) {
  Scratch scratch(nullptr);
  scratch.take<double>(ceil_div(rows, kSquareRows) * d_in);
  return scratch.bytes();
}

cudaError_t column_squares(const float* W, const float* norms, int64_t rows, int64_t d_in,
                           double* squares, void* scratch, cudaStream_t stream) {
  const int64_t ranges = ceil_div(rows, kSquareRows);
  const int64_t blocks_a_row = ceil_div<int64_t>(d_in, kThreads);
  auto* const partials = Scratch(scratch).take<double>(ranges * d_in);
  const cudaError_t error = launch(partial_squares_kernel, ranges * blocks_a_row, kThreads, 0,
                                   stream, W, norms, rows, d_in, blocks_a_row, partials);
  if (error != cudaSuccess) return error;
  return launch(sum_squares_kernel, blocks_a_row, kThreads, 0, stream, partials, ranges, d_in,
                squares);
}

cudaError_t add_product(float* total, const float* part, int64_t count, cudaStream_t stream) {
  return launch(add_kernel, ceil_div<int64_t>(count, kThreads), kThreads, 0, stream, total, part,
                count);
}

size_t gram_scratch_bytes(int64_t d_in) {
  const int64_t across = ceil_div<int64_t>(d_in, kTile);
  Scratch scratch(nullptr);
  const GramScratch pieces(scratch, across * across);
  return scratch.bytes();
}

cudaError_t split_gram(const float* product, const UnitRows& unit_rows, int64_t d_in, void* halves,
                       float* loss, void* scratch, cudaStream_t stream) {
  const int64_t across = ceil_div<int64_t>(d_in, kTile);
  Scratch remaining(scratch);
  const GramScratch pieces(remaining, across * across);
  const double mean_square = static_cast<double>(unit_rows.rows) / static_cast<double>(d_in);
  const cudaError_t error = launch(
      gram_kernel, across * across, kThreads, 0, stream, product, unit_rows.squares, d_in, across,
      mean_square, gram_scale(unit_rows.rows), static_cast<__half*>(halves), pieces.tile_squares);
  if (error != cudaSuccess) return error;
  return launch(loss_kernel, 1, kSumThreads, 0, stream, pieces.tile_squares, across * across,
                unit_rows.fourth_powers, unit_rows.rows, loss);
}

cudaError_t decorrelation_gradient(const float* W, const float* norms, const float* high,
                                   const float* mixed, int64_t rows, int64_t d_in, int64_t all_rows,
                                   float* grad, cudaStream_t stream) {
  const float unscale = 1.0f / (kUnitScale * gram_scale(all_rows));
  return with_width<kWidth4, float>(W, d_in, {high, mixed, grad}, [&](const float* w, auto width) {
    constexpr int kWidth = decltype(width)::value;
    return launch(tangent_kernel<kWidth>, rows, kThreads, 0, stream, w, norms, high, mixed, rows,
                  d_in, unscale, grad);
  });
}

}  // namespace sae_fast::cuda
