// Decoder kernels on a sparse code: reconstruction, its gradient for the code, and both in one
// pass.
#pragma once

#include <cstdint>

#include "kernels/cpu/encode.h"
#include "kernels/cpu/parallel.h"

namespace sae_fast::cpu {

// Entries of token n: [n * k, (n + 1) * k) where offsets is null, [offsets[n], offsets[n + 1])
// else.
struct Code {
  const float* values;
  const int32_t* indices;
  const int64_t* offsets;  // [tokens + 1] or null
  int64_t tokens, k;

  int64_t begin(int64_t token) const { return offsets != nullptr ? offsets[token] : token * k; }
  int64_t end(int64_t token) const { return begin(token + 1); }
};

struct Decoder {
  DType type;
  const void* W_dec;   // [d_sae][d_in]
  const float* b_dec;  // [d_in] or null
  int64_t d_sae, d_in;
};

// x_hat [tokens][d_in].
using Decode = bool (*)(const Code&, const Decoder&, float* x_hat, const Parallel&);
// grad_values of every entry from grad [tokens][d_in]; code.values is not read.
using DecodeBackward = bool (*)(const Code&, const Decoder&, const float* grad, float* grad_values,
                                const Parallel&);

struct Reconstruction {
  const float* x;        // [tokens][d_in]
  void* residual;        // [tokens][d_in] of the decoder's type: x_hat - x
  float* squared_error;  // [tokens]
  float* residual_dot;   // one per entry: <residual, W_dec[index]>
};
using Reconstruct = bool (*)(const Code&, const Decoder&, const Reconstruction&, const Parallel&);

}  // namespace sae_fast::cpu
