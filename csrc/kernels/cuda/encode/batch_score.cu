// The exact scores of a batch's candidates, of as few as the limit allows.
#include "kernels/cuda/encode/batch.cuh"
#include "kernels/cuda/encode/batch_find.cuh"
#include "kernels/cuda/encode/score.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kScoreThreads = 256;
constexpr int kScoreWarps = kScoreThreads / kWarpSize;
constexpr int kScoreBlocks = 1024;

// Scores four entries, of any tokens, by one warp: the bits of score_latents.
template <bool kVector>
__device__ float score_entries(const float* __restrict__ x, const Encoder& encoder,
                               const int64_t (&tokens)[kScoresAtOnce],
                               const int32_t (&latents)[kScoresAtOnce]) {
  const int64_t d_in = encoder.d_in;
  float sums[kScoresAtOnce] = {};
  for (int64_t column = lane_index() * kColumnsOfLane; column < d_in;
       column += kWarpSize * kColumnsOfLane) {
    const auto shift = load_columns<float, kVector>(encoder.b_dec, column, d_in);
#pragma unroll
    for (int s = 0; s < kScoresAtOnce; ++s) {
      auto centred = load_columns<float, kVector>(x + flat_index(tokens[s], d_in, 0), column, d_in);
#pragma unroll
      for (int i = 0; i < kColumnsOfLane; ++i) centred.at[i] -= shift.at[i];
      const float* const row = encoder.W_enc + flat_index(latents[s], d_in, 0);
      sums[s] = add_dot(sums[s], centred, load_columns<float, kVector>(row, column, d_in));
    }
  }
  return warp_sums<kScoresAtOnce>(sums);
}

// A launch scores either the candidates that certainly reach the limit or, of the other ones, the
// candidates that may reach the limit of exact scores.
enum class Reach { kCertain, kPossible };

// The lane's entry, whether it is to be scored. Others that have no score yet lose their value.
template <Reach kReach>
__device__ inline bool wants_score(const Encoder& encoder, const BatchState& batch,
                                   const BatchList& list, int64_t i) {
  const float low = list.values[i];
  const bool certain = value_key(low) <= batch.numbers->limit;
  if (certain || kReach == Reach::kCertain) return certain && kReach == Reach::kCertain;
  const uint64_t place = list.places[i];
  const TokenBound token = batch.bounds[batch.order.token(place)];
  const float high = high_of<true>(low, token, encoder, batch.order.latent(place));
  const bool possible = value_key(high) <= batch.numbers->exact_limit;
  if (!possible) list.values[i] = -INFINITY;
  return possible;
}

// Scores the entries base + queue[first ..] of the list, four by one warp.
template <bool kVector, Reach kReach>
__device__ void score_queued(const Encoder& encoder, const float* __restrict__ x,
                             const BatchState& batch, const BatchList& list, int64_t base,
                             const int* queue, int first, int queued) {
  int64_t tokens[kScoresAtOnce];
  int32_t latents[kScoresAtOnce];
#pragma unroll
  for (int s = 0; s < kScoresAtOnce; ++s) {  // past the end, the last once more
    const uint64_t place = list.places[base + queue[min(first + s, queued - 1)]];
    tokens[s] = batch.order.token(place);
    latents[s] = batch.order.latent(place);
  }
  const float score = score_entries<kVector>(x, encoder, tokens, latents);
  const int number = first + owned_sum<kScoresAtOnce>();
  if (!stores_sum<kScoresAtOnce>() || number >= queued) return;
  const int64_t i = base + queue[number];
  const uint64_t place = list.places[i];
  const int32_t latent = batch.order.latent(place);
  const TokenBound token = batch.bounds[batch.order.token(place)];
  const float low = list.values[i];
  const float value = score + encoder.b_enc[latent];
  const bool outside = value < low || value > high_of<true>(low, token, encoder, latent);
  if (outside) atomicOr(&batch.numbers->wrong, 1);
  list.values[i] = value;
  if constexpr (kReach == Reach::kCertain) {
    const uint32_t key = value_key(value);
    if (key <= kLastPositive) atomicAdd(&batch.histogram[key >> kBinBits], Count{1});
  }
}

// ---- kernels

// One warp 32 entries of the list. First the certain ones are scored and counted: that gives a
// tighter limit, for which fewer of the others need be scored. A scored entry is not taken for one
// of the others: its score is no less than its lower bound was, or else `wrong` is set.
template <bool kVector, Reach kReach>
__global__ void __launch_bounds__(kScoreThreads)
    score_kernel(Encoder encoder, const float* __restrict__ x, BatchState batch) {
  __shared__ int queues[kScoreWarps][kWarpSize];
  if (batch.numbers->everything != 0) return;
  int* const queue = queues[threadIdx.x / kWarpSize];
  const BatchList list = batch.list(batch.numbers->active);
  const int64_t size = list.size();
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kScoreThreads + threadIdx.x - lane_index();
       base < size; base += static_cast<int64_t>(gridDim.x) * kScoreThreads) {
    const int64_t mine = base + lane_index();
    const bool wanted = mine < size && wants_score<kReach>(encoder, batch, list, mine);
    const unsigned lanes = __ballot_sync(kFullWarp, wanted);
    if (wanted) queue[__popc(lanes & lanes_before())] = lane_index();
    __syncwarp();
    const int queued = __popc(lanes);
    for (int first = 0; first < queued; first += kScoresAtOnce) {
      score_queued<kVector, kReach>(encoder, x, batch, list, base, queue, first, queued);
    }
    __syncwarp();  // the queue has been read
  }
}

__global__ void __launch_bounds__(kFindThreads) exact_limit_kernel(BatchState batch, Count wanted) {
  __shared__ FindShared shared;
  const Bin found = find_bin(batch.histogram, wanted, shared);
  if (threadIdx.x != 0) return;
  uint32_t limit = batch.numbers->limit;
  if (found.bin < kBins) {
    const auto last = static_cast<uint32_t>(found.bin << kBinBits | static_cast<int>(kBinMask));
    limit = min(limit, last);
  }
  batch.numbers->exact_limit = limit;
}

}  // namespace

cudaError_t score_candidates(const Encoder& encoder, const float* x, const BatchSize& size,
                             const BatchState& state, cudaStream_t stream) {
  if (!encoder.exact) return cudaSuccess;  // the values are the scores
  const bool fits = vectors_fit(encoder.d_in, kColumnsOfLane, {encoder.W_enc, x, encoder.b_dec});
  cudaError_t error = clear_histogram(state, stream);
  if (error == cudaSuccess) {
    error =
        launch(fits ? score_kernel<true, Reach::kCertain> : score_kernel<false, Reach::kCertain>,
               kScoreBlocks, kScoreThreads, 0, stream, encoder, x, state);
  }
  if (error == cudaSuccess) {
    error = launch(exact_limit_kernel, 1, kFindThreads, 0, stream, state,
                   static_cast<Count>(size.wanted()));
  }
  if (error == cudaSuccess) {
    error =
        launch(fits ? score_kernel<true, Reach::kPossible> : score_kernel<false, Reach::kPossible>,
               kScoreBlocks, kScoreThreads, 0, stream, encoder, x, state);
  }
  return error;
}

}  // namespace sae_fast::cuda
