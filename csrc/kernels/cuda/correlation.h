// The part of the squared correlations of latents that matrix products leave to do. With z_i
// [N] the activations of latent i less their mean, at unit length (zeros where it is silent), and
// K = sum of z_i z_i' [N, N] over a group of latents, the correlations are |K|^2 less the active
// latents within a group and <K_A, K_B> between two. The gradient with respect to z_i is a matrix
// of tokens times z_i, 4 K_A and 2 K_B, less the part along z_i. Nothing is [F, F].
//
// The products run in tensor cores on pairs of float16 halves, to the bounds of decorrelation.h.
// Latents are columns of h, so halves stand as [2N, columns], the high ones first:
//   K    = A + (B + B') / 2^11                        A, B = Z_high (Z_high', Z_low'): [N, 2N]
//   M Z  = M_high Z_high + (M_low Z_high + M_high Z_low) / 2^11
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace sae_fast::cuda {

// Latents that one product of the Gram matrix takes in. Where all latents vary together the terms
// of an element have one sign and what tensor cores cut off adds up, to 1 / 16 of this times 2^-24:
// fewer than for decorrelation, whose rows hardly ever do.
constexpr int64_t kProductLatents = 1024;

// Some columns of dense codes, and what brings them to unit length.
struct Latents {
  const float* h;              // [N, d_sae], from the first of these columns
  const double* means;         // [count]
  const float* inverse_norms;  // [count]: 1 / |h - mean|, 0 where silent
  int64_t tokens, d_sae, count;
};

// Means and inverse_norms of all latents.
cudaError_t latent_moments(const float* h,  // [N, F]
                           int64_t tokens, int64_t d_sae,
                           double* means,         // [F]
                           float* inverse_norms,  // [F]
                           cudaStream_t stream);

// Halves [2N, columns] of unit latents, zeros behind the last, and per token and kProductLatents
// columns the sum of their squares: squares[n * square_stride + i], unless that is null.
cudaError_t split_latents(const Latents& latents, int64_t columns,
                          void* halves,  // float16 [2N, columns]
                          double* squares, int64_t square_stride, cudaStream_t stream);

// total [size] = the sum of `count` parts [count, size], added to what was there unless `first`.
cudaError_t sum_products(float* total, const float* parts, int64_t size, int64_t count, bool first,
                         cudaStream_t stream);

// K from A and B side by side, its diagonal from the squares of split_latents. |K|^2 stays in
// `tile_squares`, square_sums(tokens) numbers, unless that is null.
int64_t square_sums(int64_t tokens);
cudaError_t finish_correlation_gram(const float* product,  // [N, 2N]
                                    const double* squares, int64_t square_stride, int64_t tokens,
                                    float* gram,  // [N, N]
                                    double* tile_squares, cudaStream_t stream);

struct CorrelationSums {
  const double* tile_squares;  // of the first group
  const float* gram;           // [groups, N, N]
  const float* inverse_norms;  // [F]
  int64_t groups, tokens, d_sae, split;
};
size_t correlation_sums_scratch_bytes(const CorrelationSums& sums);
cudaError_t correlation_sums(const CorrelationSums& sums,
                             float* within,      // []
                             float* between,     // []
                             int64_t* n_active,  // [2]
                             void* scratch, cudaStream_t stream);

// M of a group, of_own K_own + of_other K_other less the mean of its diagonal, which is along z in
// M z and would only cost accuracy there: in halves [N, 2N], low ones first, as the product with
// the halves of Z needs it. M is brought to where no element exceeds the number of latents; `scale`
// undoes this. Matrices and gradients that are null count as zeros.
struct TokenMatrix {
  const float* own;         // [N, N], with gradient of_own = 4 grad_own
  const float* other;       // [N, N], with gradient of_other = 2 grad_other
  const float* grad_own;    // []
  const float* grad_other;  // []
  int64_t tokens, d_sae;
};
cudaError_t split_token_matrix(const TokenMatrix& matrix,
                               void* halves,     // float16 [N, 2N]
                               double* scalars,  // [kMatrixScalars], for correlation_gradient
                               cudaStream_t stream);
constexpr int64_t kMatrixScalars = 4;

// Columns of the gradient from both parts of M Z.
cudaError_t correlation_gradient(const Latents& latents,
                                 const float* high,   // [N, columns]: high high
                                 const float* mixed,  // [N, columns]: low high + high low
                                 int64_t columns, const double* scalars,
                                 float* grad_h,  // [N, d_sae], from the first of these columns
                                 cudaStream_t stream);

}  // namespace sae_fast::cuda
