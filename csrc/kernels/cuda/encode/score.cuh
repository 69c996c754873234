// The exact score of a latent: a float32 dot product in one order of additions, so that all kernels
// compute the same bits.
#pragma once

#include <type_traits>

#include "kernels/common/encode_plan.h"
#include "kernels/cuda/encode/encode.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace sae_fast::cuda {

constexpr int kScoresAtOnce = 4;
constexpr int kColumnsOfLane = 4;

// Columns column .. column + 3 of a row; zeros beyond its end. The columns of a lane are the same
// with vector loads and without them.
template <typename Element, bool kVector>
__device__ inline Vector<float, kColumnsOfLane> load_columns(const Element* __restrict__ row,
                                                             int64_t column, int64_t d_in) {
  if constexpr (kVector) {
    return load_floats<Element, kColumnsOfLane>(row + column);
  } else {
    Vector<float, kColumnsOfLane> columns{};
#pragma unroll
    for (int i = 0; i < kColumnsOfLane; ++i) {
      if (column + i < d_in) columns.at[i] = to_float(row[column + i]);
    }
    return columns;
  }
}

// Returns what was stored, as floats.
template <typename Element, bool kVector>
__device__ inline Vector<float, kColumnsOfLane> store_columns(
    Element* __restrict__ row, int64_t column, int64_t d_in,
    const Vector<float, kColumnsOfLane>& columns) {
  if constexpr (kVector) {
    return store<Element, kColumnsOfLane>(row + column, columns);
  } else {
    Vector<float, kColumnsOfLane> stored{};
#pragma unroll
    for (int i = 0; i < kColumnsOfLane; ++i) {
      if (column + i >= d_in) continue;
      row[column + i] = round_to<Element>(columns.at[i]);
      stored.at[i] = to_float(row[column + i]);
    }
    return stored;
  }
}

// Scores four latents for a token, by one warp; a lane gets the score number
// owned_sum<kScoresAtOnce>(). Weight other than float: x - b_dec is rounded to it first.
template <typename Weight, bool kVector>
__device__ float score_latents(const float* __restrict__ x, const float* __restrict__ b_dec,
                               const Weight* __restrict__ W_enc,
                               const int32_t (&latents)[kScoresAtOnce], int64_t d_in) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float sums[kScoresAtOnce] = {};
#pragma unroll 2  // twelve loads in flight; with more of them registers run out
  for (int64_t column = lane * kColumnsOfLane; column < d_in;
       column += kWarpSize * kColumnsOfLane) {
    auto centred = load_columns<float, kVector>(x, column, d_in);
    const auto shift = load_columns<float, kVector>(b_dec, column, d_in);
#pragma unroll
    for (int i = 0; i < kColumnsOfLane; ++i) {
      centred.at[i] = to_float(round_to<Weight>(centred.at[i] - shift.at[i]));
    }
#pragma unroll
    for (int s = 0; s < kScoresAtOnce; ++s) {
      const Weight* const row = W_enc + flat_index(latents[s], d_in, 0);
      sums[s] = add_dot(sums[s], centred, load_columns<Weight, kVector>(row, column, d_in));
    }
  }
  return warp_sums<kScoresAtOnce>(sums);
}

// Calls call(rows that score, whether vector loads fit).
template <typename Call>
cudaError_t with_scoring_rows(const Encoder& encoder, const Tokens& tokens, Call&& call) {
  const auto typed = [&](const auto* rows) {
    const bool fits = vectors_fit(encoder.d_in, kColumnsOfLane, {rows, tokens.x, encoder.b_dec});
    return fits ? call(rows, std::true_type{}) : call(rows, std::false_type{});
  };
  if (encoder.exact) return typed(encoder.W_enc);
  if (encoder.rounded.type == DType::kFloat16) {
    return typed(static_cast<const __half*>(encoder.rounded.data));
  }
  return typed(static_cast<const __nv_bfloat16*>(encoder.rounded.data));
}

}  // namespace sae_fast::cuda
