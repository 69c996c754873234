// The work of a training step beside the passes over the weights: statistics of a batch, sums over
// rows, and the counters at its end. Few launches, because each costs more than its work.
#pragma once

#include "kernels/common/bookkeeping.h"
#include "kernels/cuda/types.h"

namespace sae_fast::cuda {

struct BatchArrays {
  const float* squared_error;   // [rows]
  const float* target;          // [rows, D]
  const float* given_variance;  // [] or null: it is the target's
  const float* values;          // [entries]
  const int32_t* indices;       // [entries]
  int64_t rows, d_in, entries, d_sae;
  bool is_signed;
};
// The results are single numbers, and fired [d_sae].
cudaError_t batch_statistics_scratch_bytes(const BatchArrays& batch, size_t* bytes);
cudaError_t batch_statistics(const BatchArrays& batch, float* fvu, float* l0, float* variance,
                             bool* fired, void* scratch, cudaStream_t stream);

cudaError_t code_gradients(const CodeGradients& gradients, cudaStream_t stream);

// sum [D] = factor times the sum over m of weights[m] * matrix[m]; `rows` of them.
cudaError_t weighted_row_sum_scratch_bytes(int64_t d_in, size_t* bytes);
cudaError_t weighted_row_sum(const float* weights, TypedPointer matrix, int64_t rows, int64_t d_in,
                             float factor, float* sum, void* scratch, cudaStream_t stream);

// *total += *more, and then the sum of the squares of each; a null array has no numbers.
struct SquareSums {
  const double* more;  // or null
  const float* first;
  const float* second;
  int64_t first_count, second_count;
};
cudaError_t add_squares(const SquareSums& sums, double* total, cudaStream_t stream);

// As finish_step of common/bookkeeping.h; tokens[j] becomes 0 where latent j has fired, else it
// grows by n_tokens.
cudaError_t finish_step(const StepRecord& record, const StepResults& results, int64_t* tokens,
                        const bool* fired, int64_t d_sae, int64_t n_tokens, cudaStream_t stream);

}  // namespace sae_fast::cuda
