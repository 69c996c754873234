// The part of the decorrelation penalty beside its two matrix products. With u_j the rows at unit
// length and S = U'U [D, D] the penalty is |S|^2 - sum of |u_j|^4, and its gradient with respect to
// row j is 4 u_j S, less the part along u_j, over the row's length. Nothing is [F, F].
//
// The products run in tensor cores on pairs of float16 halves, x = (high + low / 2^11) / scale,
// which hold x to 2^-23; only the product of two lows, 2^-24 of the whole, is left out:
//   S  = A + (B + B') / 2^11      A = high' high, B = high' low      (one product [D, 2D])
//   uS = u_high S_high + (u_high S_low + u_low S_high) / 2^11        (one product each)
// Tensor cores add up in float32 but cut off instead of rounding. A chunk of kProductRows rows is
// that many / 16 steps. In a step Hopper cuts 16 products and the sum so far at 2^-25 of the
// largest, and the result at 2^-23: it is off by at most 5.25 * 2^-23; Ampere takes two steps of 8
// products, together off by at most 11 * 2^-23 (published measurements; undocumented). Chunks are
// added with rounding: an element of S is off by at most
// (11 kProductRows / 16 + F / kProductRows) 2^-23 of the sum of the sizes of its terms. On the
// diagonal, which is most of |S|^2 and where every term is positive, these errors would add up: it
// is summed in double.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace sae_fast::cuda {

// Rows of W that one product takes in; the sums over chunks are added up in order.
constexpr int64_t kProductRows = 2048;

// Per row of W [rows, D]: its length, the halves of the unit row, float16 [rows, 2D], high ones
// first, and the fourth power of the unit row's length, which is 1 or 0.
cudaError_t split_unit_rows(const float* W, int64_t rows, int64_t d_in,
                            void* halves,           // float16 [rows, 2D]
                            float* norms,           // [rows]
                            double* fourth_powers,  // [rows]
                            cudaStream_t stream);

// squares[d] = sum over the rows of u[d]^2.
size_t column_squares_scratch_bytes(int64_t rows, int64_t d_in);
cudaError_t column_squares(const float* W, const float* norms, int64_t rows, int64_t d_in,
                           double* squares,  // [D]
                           void* scratch, cudaStream_t stream);

// total += part
cudaError_t add_product(float* total, const float* part, int64_t count, cudaStream_t stream);

// From A and B as they stand side by side: the loss, and the halves of S less rows / D on its
// diagonal, which is along u in uS and would only cost accuracy there. The low half stands above
// the high one, as the product with (high, low) of a row needs it.
struct UnitRows {
  const double* squares;        // [D]
  const double* fourth_powers;  // [rows]
  int64_t rows;
};
size_t gram_scratch_bytes(int64_t d_in);
cudaError_t split_gram(const float* product,  // [D, 2D]
                       const UnitRows& unit_rows, int64_t d_in,
                       void* halves,  // float16 [2D, D]
                       float* loss,   // []
                       void* scratch, cudaStream_t stream);

// The gradient of some rows from the two parts of their uS, as products of the halves.
cudaError_t decorrelation_gradient(const float* W,      // [rows, D]
                                   const float* norms,  // [rows]
                                   const float* high,   // [rows, D]: high high
                                   const float* mixed,  // [rows, D]: high low + low high
                                   int64_t rows, int64_t d_in,
                                   int64_t all_rows,  // of the whole matrix: sets S's scale
                                   float* grad,       // [rows, D]
                                   cudaStream_t stream);

}  // namespace sae_fast::cuda
