// Rows of a table, gathered, widened to float and standardised: how a stream makes its batches.
#pragma once

#include "kernels/cuda/types.h"

namespace sae_fast::cuda {

// out[places[i]] = (source[rows[i]] - mean) * scale.
cudaError_t gather_rows(TypedPointer source,    // [., D]
                        const int64_t* rows,    // [count]
                        const int64_t* places,  // [count] or null: i
                        const float* mean,      // [D] or null: zeros
                        float scale,
                        float* out,  // [., D]
                        int64_t count, int64_t d_in, cudaStream_t stream);

}  // namespace sae_fast::cuda
