#include "kernels/cuda/decorrelation.h"

#include <cmath>

#include "kernels/common/row_norm.h"
#include "kernels/cuda/gram.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSumThreads = 1024;
constexpr int kWidth4 = 4;            // columns a thread, where they are aligned
constexpr int64_t kSquareRows = 256;  // rows that one thread sums a column of

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

// Takes S as halves, less mean_square on its diagonal.
struct HalvesOfGram {
  const double* squares;  // [D]
  double mean_square;
  float scale;
  int64_t d_in;
  __half* halves;  // [2D, D]

  __device__ double diagonal(int64_t row) const { return squares[row]; }
  __device__ void store(int64_t row, int64_t column, double element) const {
    if (row == column) element -= mean_square;
    const Halves parts = split(static_cast<float>(element) * scale);
    halves[row * d_in + column] = parts.low;
    halves[(d_in + row) * d_in + column] = parts.high;
  }
};

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
  return launch(sum_parts_kernel, ceil_div<int64_t>(count, kGramThreads), kGramThreads, 0, stream,
                total, part, count, int64_t{1}, false);
}

size_t gram_scratch_bytes(int64_t d_in) {
  Scratch scratch(nullptr);
  const GramScratch pieces(scratch, gram_tiles(d_in));
  return scratch.bytes();
}

cudaError_t split_gram(const float* product, const UnitRows& unit_rows, int64_t d_in, void* halves,
                       float* loss, void* scratch, cudaStream_t stream) {
  const int64_t tiles = gram_tiles(d_in);
  Scratch remaining(scratch);
  const GramScratch pieces(remaining, tiles);
  const double mean_square = static_cast<double>(unit_rows.rows) / static_cast<double>(d_in);
  const HalvesOfGram sink{unit_rows.squares, mean_square, gram_scale(unit_rows.rows), d_in,
                          static_cast<__half*>(halves)};
  const cudaError_t error = launch(gram_kernel<HalvesOfGram>, tiles, kGramThreads, 0, stream,
                                   product, d_in, sink, pieces.tile_squares);
  if (error != cudaSuccess) return error;
  return launch(loss_kernel, 1, kSumThreads, 0, stream, pieces.tile_squares, tiles,
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
