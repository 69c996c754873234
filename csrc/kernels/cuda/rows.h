// Whole rows, one a latent: the latent-major view of a code, sums over it, unit rows.
#pragma once

#include "kernels/cuda/types.h"

namespace sae_fast::cuda {

// Rows of W [F, D] to unit length: w / max(|w|, 1e-12).
cudaError_t normalize_rows(float* W, int64_t rows, int64_t d_in, cudaStream_t stream);

// Orders the entries by latent, inside a latent by position. Entries with value 0 (not NaN) follow
// all latents by position, from latent_offsets[F] on, because only the device knows how many there
// are.
cudaError_t latent_major_scratch_bytes(int64_t entries, int64_t d_sae, size_t* bytes);
cudaError_t latent_major(const float* values,     // [entries of code]
                         const int32_t* indices,  // [entries of code]
                         CodeRows code,
                         int64_t* latent_offsets,  // [F + 1]
                         int32_t* entries,         // [entries of code]: position in values
                         int32_t* rows,            // [entries of code]: row n of that entry
                         int64_t d_sae, void* scratch, cudaStream_t stream);

// to[p] = from[entries[p]]
cudaError_t gather_entries(const float* from, const int32_t* entries, int64_t count, float* to,
                           cudaStream_t stream);

// sums[j] of coefficients[entries[p]] over the entries p of latent j.
cudaError_t latent_sums(const int64_t* latent_offsets,  // [F + 1]
                        const int32_t* entries, const float* coefficients, int64_t latents,
                        float* sums,  // [F]
                        cudaStream_t stream);

// rows[j] = sum over the entries of latent j of coefficient * dense[n]; sums[j] of coefficients.
cudaError_t accumulate_rows_scratch_bytes(int64_t entries, int64_t d_sae, int64_t d_in,
                                          size_t* bytes);
cudaError_t accumulate_rows(const float* coefficients,  // [entries of code]
                            const int32_t* indices,     // [entries of code]
                            CodeRows code,
                            TypedPointer dense,  // [N, D]
                            float* rows,         // [F, D]
                            float* sums,         // [F]
                            int64_t d_sae, int64_t d_in, void* scratch, cudaStream_t stream);

}  // namespace sae_fast::cuda
