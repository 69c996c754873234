#include "kernels/cuda/encode/encoder_stats.cuh"
#include "kernels/cuda/encode/score.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kPackThreads = 256;

// ---- kernels

// One warp a row of W_enc.
template <typename Rounded, bool kVector>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const float* __restrict__ W_enc, int64_t d_sae, int64_t d_in,
                Rounded* __restrict__ rounded, float* __restrict__ stats) {
  constexpr int kWarps = kPackThreads / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int64_t latent = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  for (; latent < d_sae; latent += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t start = flat_index(latent, d_in, 0);
    float square = 0.0f;
    float residual_square = 0.0f;
    for (int64_t column = lane * kColumnsOfLane; column < d_in;
         column += kWarpSize * kColumnsOfLane) {
      const auto weights = load_columns<float, kVector>(W_enc + start, column, d_in);
      const auto stored = store_columns<Rounded, kVector>(rounded + start, column, d_in, weights);
      square = add_dot(square, weights, weights);
#pragma unroll
      for (int i = 0; i < kColumnsOfLane; ++i) {
        const float residual = weights.at[i] - stored.at[i];
        residual_square = fmaf(residual, residual, residual_square);
      }
    }
    const float2 bounds = row_bounds(warp_sum(square), warp_sum(residual_square), d_in);
    if (lane == 0) {
      stats[latent] = bounds.x;
      stats[d_sae + latent] = bounds.y;
    }
  }
}

// ---- launchers

template <typename Rounded>
cudaError_t pack_rows(const float* W_enc, int64_t d_sae, int64_t d_in, Rounded* rounded,
                      float* stats, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(d_sae, kPackThreads / kWarpSize);
  const bool fits = vectors_fit(d_in, kColumnsOfLane, {W_enc, rounded});
  return launch(fits ? pack_kernel<Rounded, true> : pack_kernel<Rounded, false>, blocks,
                kPackThreads, 0, stream, W_enc, d_sae, d_in, rounded, stats);
}

}  // namespace

cudaError_t pack_encoder(const float* W_enc, int64_t d_sae, int64_t d_in, void* rounded,
                         DType rounded_type, float* stats, cudaStream_t stream) {
  if (rounded_type == DType::kFloat16) {
    return pack_rows(W_enc, d_sae, d_in, static_cast<__half*>(rounded), stats, stream);
  }
  return pack_rows(W_enc, d_sae, d_in, static_cast<__nv_bfloat16*>(rounded), stats, stream);
}

}  // namespace sae_fast::cuda
