// Sparse decoding and its gradients: everything that reads the active rows of W_dec. Indices must
// lie in [0, d_sae): nothing on the device checks them, that would cost a synchronisation.
#pragma once

#include "kernels/cuda/types.h"

namespace sae_fast::cuda {

// x_hat[n] = sum of values[e] * W_dec[indices[e]] over the entries e of row n, plus b_dec if given.
cudaError_t decode(const float* values,     // [entries]
                   const int32_t* indices,  // [entries]
                   CodeRows code,
                   TypedPointer W_dec,  // [F, D]
                   const float* b_dec,  // [D] or null
                   float* x_hat,        // [N, D]
                   int64_t d_in, cudaStream_t stream);

// grad_values[e] = <grad[n], W_dec[indices[e]]>
cudaError_t decode_backward(const float* grad,       // [N, D]
                            const int32_t* indices,  // [entries]
                            CodeRows code,
                            TypedPointer W_dec,  // [F, D]
                            float* grad_values,  // [entries]
                            int64_t d_in, cudaStream_t stream);

// decode, its residual against x and the residual's products with the active rows, reading those
// rows once: they stay in shared memory between the two uses.
cudaError_t reconstruct(
    const float* values,     // [entries]
    const int32_t* indices,  // [entries]
    CodeRows code,
    TypedPointer W_dec,    // [F, D]
    const float* b_dec,    // [D] or null
    const float* x,        // [N, D]
    void* residual,        // [N, D], of W_dec's type: x_hat - x
    float* squared_error,  // [N]: of the residual before it is rounded
    float* residual_dot,   // [entries]: <residual[n], W_dec[indices[e]]>, as rounded
    int64_t d_in, cudaStream_t stream);

}  // namespace sae_fast::cuda
