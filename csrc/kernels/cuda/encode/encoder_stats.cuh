// The two lengths of an encoder row that screening's error bound is made of: |w_j| and
// |w_j - rounded_j|, the latter of the row as the product reads it. Both must not be too small.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace sae_fast::cuda {

// Upper bounds of the square roots of two float32 sums of d_in squares, added up in any order.
// With u = 2^-24 such a sum is at least (1 - u)^d_in of the exact one, less 2^-149 for every square
// that underflows; a root therefore lacks about d_in u / 2 of its length. Twice that covers the
// rounding here. Infinity and NaN stay what they are. The terms w - rounded are exact in float32.
__device__ inline float2 row_bounds(float square_sum, float residual_square_sum, int64_t d_in) {
  const auto columns = static_cast<float>(d_in);
  const float lost = columns * 0x1p-149f;
  const float slack = 1.0f + (columns + 8.0f) * 0x1p-24f;
  return make_float2(std::sqrt(square_sum + lost) * slack,
                     std::sqrt(residual_square_sum + lost) * slack);
}

}  // namespace sae_fast::cuda
