#include "kernels/cuda/encode/state.cuh"

#include <algorithm>

#include "kernels/cuda/encode/score.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kPrepareThreads = 256;
constexpr int kPrepareWarps = kPrepareThreads / kWarpSize;
// That a multiprocessor's registers must hold; left to itself the assembler spills for sm_80.
constexpr int kPrepareBlocks = 4;

// ---- kernels

__device__ inline float warp_maximum(float value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, step));
  }
  return value;
}

// By warp `warp` of `warps`, every warps-th segment.
__device__ void prepare_segments(const Encoder& encoder, const bool* __restrict__ dead_mask,
                                 const SegmentState& segments, int64_t warp, int64_t warps) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t count = segment_count(encoder.d_sae);
  for (int64_t segment = warp; segment < count; segment += warps) {
    SegmentBound most{0.0f, 0.0f, 0.0f};
    int dead_count = 0;
    for (int word = 0; word < kDeadWords; ++word) {
      const int64_t latent = segment * kSegment + word * 32 + lane;
      const bool exists = latent < encoder.d_sae;
      if (encoder.exact && exists) {
        const SegmentBound bound = latent_bound(encoder, latent);
        // fmaxf drops a NaN, but then the length is infinite.
        most = {fmaxf(most.length, bound.length), fmaxf(most.residual, bound.residual),
                fmaxf(most.bias, bound.bias)};
      }
      const bool dead = dead_mask != nullptr && exists && dead_mask[latent];
      const unsigned bits = __ballot_sync(kFullWarp, dead);
      if (lane == 0) segments.dead_bits[segment * kDeadWords + word] = bits;
      dead_count += __popc(bits);
    }
    most = {warp_maximum(most.length), warp_maximum(most.residual), warp_maximum(most.bias)};
    if (lane != 0) continue;
    segments.bounds[segment] = most;
    segments.dead_counts[segment] = dead_count;
    if (dead_count > 0) atomicAdd(segments.dead_total, dead_count);
  }
}

// The warps share the segments, and take a token each.
template <typename Rounded, bool kVector>
__global__ void __launch_bounds__(kPrepareThreads, kPrepareBlocks)
    prepare_kernel(Encoder encoder, Tokens tokens, const bool* __restrict__ dead_mask,
                   Rounded* __restrict__ rounded_x, Unbounded unbounded, EncodeState state) {
  const int64_t d_in = encoder.d_in;
  const bool exact = encoder.exact;
  const float* __restrict__ const b_dec = encoder.b_dec;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kPrepareWarps + threadIdx.x / kWarpSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kPrepareWarps;
  prepare_segments(encoder, dead_mask, state.segments, warps - 1 - warp, warps);
  if (warp == 0 && lane == 0) *state.fallback.count = 0;
  for (int64_t row = warp; row < tokens.rows; row += warps) {
    const int64_t start = flat_index(row, d_in, 0);
    double residual_square = 0.0;
    double rounded_square = 0.0;
    double square = 0.0;
    for (int64_t column = lane * kColumnsOfLane; column < d_in;
         column += kWarpSize * kColumnsOfLane) {
      auto centred = load_columns<float, kVector>(tokens.x + start, column, d_in);
      const auto shift = load_columns<float, kVector>(b_dec, column, d_in);
#pragma unroll
      for (int i = 0; i < kColumnsOfLane; ++i) centred.at[i] -= shift.at[i];
      const auto stored = store_columns<Rounded, kVector>(rounded_x + start, column, d_in, centred);
      if (!exact) continue;
#pragma unroll
      for (int i = 0; i < kColumnsOfLane; ++i) {
        const double value = centred.at[i];
        const double kept = stored.at[i];
        residual_square += (value - kept) * (value - kept);
        rounded_square += kept * kept;
        square += value * value;
      }
    }
    if (exact) {
      residual_square = warp_sum(residual_square);
      rounded_square = warp_sum(rounded_square);
      square = warp_sum(square);
    }
    if (lane != 0) continue;
    state.bounds[row] = token_bound(residual_square, rounded_square, square, d_in);
    if (state.main.capacity > 0) state.main.states[row] = {-INFINITY, 0};
    if (state.aux.capacity > 0) state.aux.states[row] = {-INFINITY, 0};
    const double limit = static_cast<double>(kLengthLimit);
    const bool bounded = !exact || (square < limit * limit && rounded_square < limit * limit);
    const bool flagged = !bounded && unbounded == Unbounded::kFlag;
    const int32_t lists = state.aux.capacity > 0 ? kMainList | kAuxList : kMainList;
    state.fallback.flags[row] = flagged ? lists : 0;
    if (!bounded && !flagged) state.bounds[row] = {INFINITY, INFINITY, INFINITY};
  }
}

// ---- launchers

template <typename Rounded>
cudaError_t prepare_tokens(const Encoder& encoder, const Tokens& tokens, Rounded* rounded_x,
                           const bool* dead_mask, Unbounded unbounded, const EncodeState& state,
                           cudaStream_t stream) {
  const bool fits = vectors_fit(encoder.d_in, kColumnsOfLane, {tokens.x, encoder.b_dec, rounded_x});
  const int64_t warps = std::max(tokens.rows, segment_count(encoder.d_sae));
  return launch(fits ? prepare_kernel<Rounded, true> : prepare_kernel<Rounded, false>,
                ceil_div<int64_t>(warps, kPrepareWarps), kPrepareThreads, 0, stream, encoder,
                tokens, dead_mask, rounded_x, unbounded, state);
}

}  // namespace

cudaError_t prepare_encode(const Encoder& encoder, const Tokens& tokens, const bool* dead_mask,
                           Unbounded unbounded, const EncodeState& state, cudaStream_t stream) {
  if (dead_mask != nullptr) {
    const cudaError_t error =
        cudaMemsetAsync(state.segments.dead_total, 0, sizeof(int32_t), stream);
    if (error != cudaSuccess) return error;
  }
  if (encoder.rounded.type == DType::kFloat16) {
    return prepare_tokens(encoder, tokens, static_cast<__half*>(tokens.rounded_x), dead_mask,
                          unbounded, state, stream);
  }
  return prepare_tokens(encoder, tokens, static_cast<__nv_bfloat16*>(tokens.rounded_x), dead_mask,
                        unbounded, state, stream);
}

}  // namespace sae_fast::cuda
