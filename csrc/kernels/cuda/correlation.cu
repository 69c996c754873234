#include "kernels/cuda/correlation.h"

#include "kernels/common/correlation.h"
#include "kernels/cuda/gram.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSumThreads = 1024;
// Kernels over columns: a warp reads 32 neighbouring latents of one token, and the warps of a block
// share the tokens.
constexpr int kColumnWarps = 16;
constexpr int kColumnThreads = kColumnWarps * kWarpSize;
constexpr int64_t kDotElements = 16384;  // of two matrices, that one block multiplies

// The sum over a block's warps, for every lane: the lanes are columns. All threads call.
__device__ inline double column_sum(double value, double (*partial)[kWarpSize]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  __syncthreads();  // the last sum's partials have been read
  partial[warp][lane] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kColumnWarps; ++i) sum += partial[i][lane];
  return sum;
}

// ---- kernels

// One block 32 latents. The second read of their columns comes from the cache.
__global__ void __launch_bounds__(kColumnThreads)
    moments_kernel(const float* __restrict__ h, int64_t tokens, int64_t d_sae,
                   double* __restrict__ means, float* __restrict__ inverse_norms) {
  __shared__ double partial[kColumnWarps][kWarpSize];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t blocks = ceil_div<int64_t>(d_sae, kWarpSize);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t latent = block * kWarpSize + lane;
    const int64_t end = latent < d_sae ? tokens : 0;  // lanes without a latent only keep step
    double sum = 0.0;
#pragma unroll 4
    for (int64_t n = warp; n < end; n += kColumnWarps) {
      sum += static_cast<double>(h[n * d_sae + latent]);
    }
    const double mean = column_sum(sum, partial) / static_cast<double>(tokens > 0 ? tokens : 1);
    double square = 0.0;
#pragma unroll 4
    for (int64_t n = warp; n < end; n += kColumnWarps) {
      const double distance = static_cast<double>(h[n * d_sae + latent]) - mean;
      square += distance * distance;
    }
    square = column_sum(square, partial);
    if (warp == 0 && latent < d_sae) {
      means[latent] = mean;
      inverse_norms[latent] = inverse_length(square, mean, tokens);
    }
  }
}

// One block kProductLatents columns of one token.
__global__ void __launch_bounds__(kThreads)
    split_latents_kernel(Latents latents, int64_t columns, __half* __restrict__ halves,
                         double* __restrict__ squares, int64_t square_stride) {
  __shared__ double partial[kThreads / kWarpSize];
  const int64_t ranges = ceil_div(columns, kProductLatents);
  for (int64_t block = blockIdx.x; block < latents.tokens * ranges; block += gridDim.x) {
    const int64_t token = block / ranges;
    const int64_t range = block % ranges;
    const float* const h = latents.h + token * latents.d_sae;
    __half* const high = halves + token * columns;
    __half* const low = high + latents.tokens * columns;
    const int64_t end = min((range + 1) * kProductLatents, columns);
    double square = 0.0;
    for (int64_t i = range * kProductLatents + threadIdx.x; i < end; i += kThreads) {
      float unit = 0.0f;
      if (i < latents.count) unit = centred(h[i], latents.means[i]) * latents.inverse_norms[i];
      square += static_cast<double>(unit) * static_cast<double>(unit);
      const Halves parts = split(unit * kUnitScale);
      high[i] = parts.high;
      low[i] = parts.low;
    }
    if (squares == nullptr) continue;
    square = block_sum(square, partial);
    if (threadIdx.x == 0) squares[token * square_stride + range] = square;
  }
}

// Takes K as floats, its diagonal from sums over ranges of latents.
struct FloatsOfGram {
  const double* squares;  // [N, square_stride]
  int64_t square_stride, tokens;
  float* gram;  // [N, N]

  __device__ double diagonal(int64_t row) const {
    double sum = 0.0;
    for (int64_t range = 0; range < square_stride; ++range) {
      sum += squares[row * square_stride + range];
    }
    return sum;
  }
  __device__ void store(int64_t row, int64_t column, double element) const {
    gram[row * tokens + column] = static_cast<float>(element);
  }
};

// One block kDotElements elements of both matrices.
__global__ void __launch_bounds__(kThreads)
    matrix_dot_kernel(const float* __restrict__ a, const float* __restrict__ b, int64_t size,
                      double* __restrict__ sums) {
  __shared__ double partial[kThreads / kWarpSize];
  const int64_t blocks = ceil_div(size, kDotElements);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t end = min((block + 1) * kDotElements, size);
    double sum = 0.0;
#pragma unroll 4
    for (int64_t i = block * kDotElements + threadIdx.x; i < end; i += kThreads) {
      sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    }
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) sums[block] = sum;
  }
}

// One block in all, so that the order of additions is fixed.
__global__ void __launch_bounds__(kSumThreads)
    sums_kernel(CorrelationSums sums, int64_t tiles, const double* __restrict__ dots,
                int64_t dot_count, float* __restrict__ within, float* __restrict__ between,
                int64_t* __restrict__ n_active) {
  __shared__ double partial[kSumThreads / kWarpSize];
  __shared__ int64_t partial_counts[kSumThreads / kWarpSize];
  int64_t active[2] = {};
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < sums.d_sae; j += kSumThreads) {
    const int64_t one = sums.inverse_norms[j] != 0.0f ? 1 : 0;  // NaN is not silent
    active[0] += j < sums.split ? one : 0;
    active[1] += j < sums.split ? 0 : one;
  }
  double square = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < tiles; i += kSumThreads) square += sums.tile_squares[i];
  double dot = 0.0;
  for (int64_t i = threadIdx.x; i < dot_count; i += kSumThreads) dot += dots[i];
  const int64_t first = block_sum(active[0], partial_counts);
  const int64_t second = block_sum(active[1], partial_counts);
  square = block_sum(square, partial);
  dot = block_sum(dot, partial);
  if (threadIdx.x == 0) {
    *within = static_cast<float>(square - static_cast<double>(first));
    *between = static_cast<float>(dot);
    n_active[0] = first;
    n_active[1] = second;
  }
}

// An element of M is (of_own own + of_other other - mean on the diagonal) times `size`.
struct MatrixScalars {
  double of_own, of_other, mean, size;
};
static_assert(sizeof(MatrixScalars) == kMatrixScalars * sizeof(double), "no padding");

__device__ inline double mixed_element(const TokenMatrix& matrix, const MatrixScalars& scalars,
                                       int64_t i) {
  double element = 0.0;
  if (matrix.own != nullptr) element += scalars.of_own * static_cast<double>(matrix.own[i]);
  if (matrix.other != nullptr) element += scalars.of_other * static_cast<double>(matrix.other[i]);
  return element;
}

// One block in all.
__global__ void __launch_bounds__(kThreads)
    matrix_scalars_kernel(TokenMatrix matrix, MatrixScalars* __restrict__ result) {
  __shared__ double partial[kThreads / kWarpSize];
  MatrixScalars scalars{};
  if (matrix.own != nullptr) scalars.of_own = 4.0 * static_cast<double>(*matrix.grad_own);
  if (matrix.other != nullptr) scalars.of_other = 2.0 * static_cast<double>(*matrix.grad_other);
  scalars.size = fmax(fabs(scalars.of_own), fabs(scalars.of_other));
  if (scalars.size == 0.0) scalars.size = 1.0;
  scalars.of_own /= scalars.size;
  scalars.of_other /= scalars.size;
  double trace = 0.0;
  for (int64_t n = threadIdx.x; n < matrix.tokens; n += kThreads) {
    trace += mixed_element(matrix, scalars, n * matrix.tokens + n);
  }
  scalars.mean = block_sum(trace, partial) / static_cast<double>(matrix.tokens);
  if (threadIdx.x == 0) *result = scalars;
}

// One thread an element.
__global__ void __launch_bounds__(kThreads)
    split_matrix_kernel(TokenMatrix matrix, const MatrixScalars* __restrict__ scalars, float scale,
                        __half* __restrict__ halves) {
  const int64_t size = matrix.tokens * matrix.tokens;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const MatrixScalars known = *scalars;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i < size; i += stride) {
    const int64_t row = i / matrix.tokens;
    const int64_t column = i % matrix.tokens;
    double element = mixed_element(matrix, known, i);
    if (row == column) element -= known.mean;
    const Halves parts = split(static_cast<float>(element) * scale);
    __half* const to = halves + row * 2 * matrix.tokens + column;
    to[0] = parts.low;
    to[matrix.tokens] = parts.high;
  }
}

// One block 32 latents. The second read of their columns comes from the cache.
__global__ void __launch_bounds__(kColumnThreads)
    gradient_kernel(Latents latents, const float* __restrict__ high,
                    const float* __restrict__ mixed, int64_t columns, float unscale,
                    const MatrixScalars* __restrict__ scalars, float* __restrict__ grad_h) {
  __shared__ double partial[kColumnWarps][kWarpSize];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const auto size = static_cast<float>(scalars->size);
  const int64_t blocks = ceil_div<int64_t>(latents.count, kWarpSize);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t latent = block * kWarpSize + lane;
    const bool live = latent < latents.count;
    const double mean = live ? latents.means[latent] : 0.0;
    const float inverse = live ? latents.inverse_norms[latent] : 0.0f;
    const int64_t end = live ? latents.tokens : 0;  // lanes without a latent only keep step
    double sum = 0.0;
#pragma unroll 4
    for (int64_t n = warp; n < end; n += kColumnWarps) {
      const int64_t at = n * columns + latent;
      const float p = fmaf(mixed[at], 1.0f / kLowScale, high[at]) * unscale;
      const float z = centred(latents.h[n * latents.d_sae + latent], mean) * inverse;
      sum += static_cast<double>(p) * static_cast<double>(z);
    }
    const auto along = static_cast<float>(column_sum(sum, partial));
#pragma unroll 4
    for (int64_t n = warp; n < end; n += kColumnWarps) {
      const int64_t at = n * columns + latent;
      const float p = fmaf(mixed[at], 1.0f / kLowScale, high[at]) * unscale;
      const float z = centred(latents.h[n * latents.d_sae + latent], mean) * inverse;
      // A silent latent has no gradient, even if other latents' gradients are not finite.
      const float result = inverse == 0.0f ? 0.0f : size * inverse * fmaf(-along, z, p);
      grad_h[n * latents.d_sae + latent] = result;
    }
  }
}

}  // namespace

// ---- launchers

cudaError_t latent_moments(const float* h, int64_t tokens, int64_t d_sae, double* means,
                           float* inverse_norms, cudaStream_t stream) {
  return launch(moments_kernel, ceil_div<int64_t>(d_sae, kWarpSize), kColumnThreads, 0, stream, h,
                tokens, d_sae, means, inverse_norms);
}

cudaError_t split_latents(const Latents& latents, int64_t columns, void* halves, double* squares,
                          int64_t square_stride, cudaStream_t stream) {
  return launch(split_latents_kernel, latents.tokens * ceil_div(columns, kProductLatents), kThreads,
                0, stream, latents, columns, static_cast<__half*>(halves), squares, square_stride);
}

cudaError_t sum_products(float* total, const float* parts, int64_t size, int64_t count, bool first,
                         cudaStream_t stream) {
  return launch(sum_parts_kernel, ceil_div<int64_t>(size, kGramThreads), kGramThreads, 0, stream,
                total, parts, size, count, first);
}

int64_t square_sums(int64_t tokens) { return gram_tiles(tokens); }

cudaError_t finish_correlation_gram(const float* product, const double* squares,
                                    int64_t square_stride, int64_t tokens, float* gram,
                                    double* tile_squares, cudaStream_t stream) {
  const FloatsOfGram sink{squares, square_stride, tokens, gram};
  return launch(gram_kernel<FloatsOfGram>, gram_tiles(tokens), kGramThreads, 0, stream, product,
                tokens, sink, tile_squares);
}

size_t correlation_sums_scratch_bytes(const CorrelationSums& sums) {
  Scratch scratch(nullptr);
  scratch.take<double>(ceil_div(sums.tokens * sums.tokens, kDotElements));
  return scratch.bytes();
}

cudaError_t correlation_sums(const CorrelationSums& sums, float* within, float* between,
                             int64_t* n_active, void* scratch, cudaStream_t stream) {
  const int64_t size = sums.tokens * sums.tokens;
  const int64_t blocks = sums.groups == 2 ? ceil_div(size, kDotElements) : 0;
  auto* const dots = Scratch(scratch).take<double>(blocks);
  const cudaError_t error = launch(matrix_dot_kernel, blocks, kThreads, 0, stream, sums.gram,
                                   sums.gram + (sums.groups - 1) * size, size, dots);
  if (error != cudaSuccess) return error;
  return launch(sums_kernel, 1, kSumThreads, 0, stream, sums, gram_tiles(sums.tokens), dots, blocks,
                within, between, n_active);
}

cudaError_t split_token_matrix(const TokenMatrix& matrix, void* halves, double* scalars,
                               cudaStream_t stream) {
  auto* const known = reinterpret_cast<MatrixScalars*>(scalars);
  const cudaError_t error = launch(matrix_scalars_kernel, 1, kThreads, 0, stream, matrix, known);
  if (error != cudaSuccess) return error;
  const int64_t size = matrix.tokens * matrix.tokens;
  return launch(split_matrix_kernel, ceil_div<int64_t>(size, kThreads), kThreads, 0, stream, matrix,
                known, gram_scale(matrix.d_sae), static_cast<__half*>(halves));
}

cudaError_t correlation_gradient(const Latents& latents, const float* high, const float* mixed,
                                 int64_t columns, const double* scalars, float* grad_h,
                                 cudaStream_t stream) {
  const float unscale = 1.0f / (kUnitScale * gram_scale(latents.d_sae));
  return launch(gradient_kernel, ceil_div<int64_t>(latents.count, kWarpSize), kColumnThreads, 0,
                stream, latents, high, mixed, columns, unscale,
                reinterpret_cast<const MatrixScalars*>(scalars), grad_h);
}

}  // namespace sae_fast::cuda
