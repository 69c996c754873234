// Rows computed in full, every latent's score in turn: the rows that screening could not settle, or
// all rows if more entries are wanted than a list can hold.
#include <algorithm>

#include "kernels/cuda/encode/finish.cuh"
#include "kernels/cuda/encode/score.cuh"
#include "kernels/cuda/select.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kScoreThreads = 256;
constexpr int kScoreBlocks = 1024;
constexpr int kScorePerMultiprocessor = 2;  // that registers must hold, without spills
constexpr int kPickThreads = 256;
constexpr int kPickBlocks = 128;
constexpr int kPickPerMultiprocessor = 2;  // more are never there

// As many keys are sorted in shared memory; more of them in the row's slot.
constexpr int64_t kSharedKeys = 4096;

// The rows to compute: those listed, or `count` from `first` on where there is no list.
struct RowSet {
  FallbackRows fallback;  // its pointers are null without a list
  int64_t first, count;
  int32_t lists;  // without a list: which code of every row

  __device__ int64_t size() const { return fallback.rows != nullptr ? *fallback.count : count; }
  __device__ int64_t row(int64_t i) const {
    return fallback.rows != nullptr ? fallback.rows[i] : first + i;
  }
  __device__ int32_t wanted(int64_t row) const {
    return fallback.rows != nullptr ? fallback.flags[row] : lists;
  }
};

// Memory for a few rows at a time: scores [F], then the keys to be sorted if they are many.
struct Slots {
  char* memory;
  int64_t bytes;  // of one
  int64_t count;
  int64_t score_bytes;

  __device__ float* scores(int64_t slot) const {
    return reinterpret_cast<float*>(memory + slot * bytes);
  }
  __device__ uint64_t* keys(int64_t slot) const {
    return reinterpret_cast<uint64_t*>(memory + slot * bytes + score_bytes);
  }
};

// Scores latents for a row, kScoresAtOnce by each warp of `warps` in turn.
template <typename Weight, bool kVector>
__device__ void score_row(const Encoder& encoder, const Weight* __restrict__ weights,
                          const float* __restrict__ x, int64_t group, float* __restrict__ scores) {
  const auto last = static_cast<int32_t>(encoder.d_sae - 1);
  const auto first = static_cast<int32_t>(group * kScoresAtOnce);
  int32_t latents[kScoresAtOnce];
#pragma unroll
  for (int s = 0; s < kScoresAtOnce; ++s) latents[s] = s < last - first ? first + s : last;
  const float score =
      score_latents<Weight, kVector>(x, encoder.b_dec, weights, latents, encoder.d_in);
  const int number = owned_sum<kScoresAtOnce>();
  if (!stores_sum<kScoresAtOnce>() || number > last - first) return;
  scores[first + number] = score + encoder.b_enc[first + number];
}

// ---- kernels

// All warps of the grid share the latents of the first rows, as many as there are slots: one row
// alone would keep a single multiprocessor busy for as long as a whole step takes.
template <typename Weight, bool kVector>
__global__ void __launch_bounds__(kScoreThreads, kScorePerMultiprocessor)
    score_rows_kernel(Encoder encoder, const Weight* __restrict__ weights,
                      const float* __restrict__ x, RowSet rows, Slots slots) {
  constexpr int kWarps = kScoreThreads / kWarpSize;
  const int64_t count = min(rows.size(), slots.count);
  const int64_t groups = ceil_div<int64_t>(encoder.d_sae, kScoresAtOnce);
  if (count == 0) return;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
       group < groups; group += static_cast<int64_t>(gridDim.x) * kWarps) {
    for (int64_t i = 0; i < count; ++i) {  // the weights come from the cache for all but one
      score_row<Weight, kVector>(encoder, weights, x + flat_index(rows.row(i), encoder.d_in, 0),
                                 group, slots.scores(i));
    }
  }
}

// Writes the k best of a row's scores, among the dead latents where a mask is given.
__device__ void pick_entries(const float* scores, const bool* __restrict__ mask, int64_t d_sae,
                             int64_t k, uint64_t* keys, BlockSelect& shared,
                             float* __restrict__ values, int32_t* __restrict__ indices) {
  const auto key_of = [&](int64_t latent) {
    return mask != nullptr && !mask[latent]
               ? kNoEntry
               : entry_key(scores[latent], static_cast<int32_t>(latent));
  };
  const uint64_t worst = kth_entry_key(d_sae, static_cast<int>(k), shared, key_of);
  const int count = shared.total;
  __syncthreads();  // all threads have read it
  if (threadIdx.x == 0) shared.total = 0;
  __syncthreads();
  for (int64_t latent = threadIdx.x; latent < d_sae && count > 0; latent += blockDim.x) {
    const uint64_t key = key_of(latent);
    if (key != kNoEntry && key <= worst) keys[atomicAdd(&shared.total, 1)] = key;
  }
  __syncthreads();
  sort_keys(keys, count, static_cast<int>(next_power_of_two(count)));
  write_entries(keys, count, k, values, indices);
  __syncthreads();  // keys and shared are free again
}

// One block a row. Rows beyond the slots are scored by the block itself, in the slot of the first
// row that it had: slots are not fewer than blocks.
template <typename Weight, bool kVector>
__global__ void __launch_bounds__(kPickThreads, kPickPerMultiprocessor)
    pick_kernel(Encoder encoder, const Weight* __restrict__ weights, const float* __restrict__ x,
                TopK topk, RowSet rows, Slots slots, bool keys_in_slots) {
  __shared__ BlockSelect shared;
  const int64_t count = rows.size();
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t row = rows.row(i);
    const int64_t slot = i < slots.count ? i : blockIdx.x;
    float* const scores = slots.scores(slot);
    if (i >= slots.count) {
      const int64_t groups = ceil_div<int64_t>(encoder.d_sae, kScoresAtOnce);
      for (int64_t group = threadIdx.x / kWarpSize; group < groups;
           group += kPickThreads / kWarpSize) {
        score_row<Weight, kVector>(encoder, weights, x + flat_index(row, encoder.d_in, 0), group,
                                   scores);
      }
      __syncthreads();
    }
    uint64_t* const keys =
        keys_in_slots ? slots.keys(slot) : static_cast<uint64_t*>(dynamic_shared_memory());
    const int32_t wanted = rows.wanted(row);
    if ((wanted & kMainList) != 0 && topk.k > 0) {
      pick_entries(scores, nullptr, encoder.d_sae, topk.k, keys, shared,
                   topk.values + flat_index(row, topk.k, 0),
                   topk.indices + flat_index(row, topk.k, 0));
    }
    if ((wanted & kAuxList) != 0) {
      pick_entries(scores, topk.dead_mask, encoder.d_sae, topk.k_aux, keys, shared,
                   topk.aux_values + flat_index(row, topk.k_aux, 0),
                   topk.aux_indices + flat_index(row, topk.k_aux, 0));
    }
  }
}

// ---- launchers

constexpr int64_t kSlotAlignment = 256;

int64_t aligned(int64_t bytes) { return ceil_div(bytes, kSlotAlignment) * kSlotAlignment; }

int64_t padded_keys(int64_t k, int64_t k_aux) { return next_power_of_two(std::max(k, k_aux)); }

cudaError_t compute_rows(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                         Memory memory, const RowSet& rows, int64_t most_rows,
                         cudaStream_t stream) {
  Slots slots{};
  slots.memory = static_cast<char*>(memory.data);
  slots.bytes = exact_bytes(encoder.d_sae, topk.k, topk.k_aux);
  slots.count = std::min(memory.bytes / slots.bytes, most_rows);
  slots.score_bytes = aligned(encoder.d_sae * static_cast<int64_t>(sizeof(float)));
  if (slots.count == 0) return most_rows == 0 ? cudaSuccess : cudaErrorInvalidValue;
  const int64_t keys = padded_keys(topk.k, topk.k_aux);
  const bool in_slots = keys > kSharedKeys;
  const size_t shared_bytes = in_slots ? 0 : static_cast<size_t>(keys) * sizeof(uint64_t);
  return with_scoring_rows(encoder, tokens, [&](const auto* weights, auto vector) {
    using Weight = std::decay_t<decltype(*weights)>;
    constexpr bool kVector = decltype(vector)::value;
    const cudaError_t error =
        launch(score_rows_kernel<Weight, kVector>, kScoreBlocks, kScoreThreads, 0, stream, encoder,
               weights, tokens.x, rows, slots);
    if (error != cudaSuccess) return error;
    return launch(pick_kernel<Weight, kVector>, std::min<int64_t>(slots.count, kPickBlocks),
                  kPickThreads, shared_bytes, stream, encoder, weights, tokens.x, topk, rows, slots,
                  in_slots);
  });
}

}  // namespace

int64_t exact_bytes(int64_t d_sae, int64_t k, int64_t k_aux) {
  const int64_t keys = padded_keys(k, k_aux);
  return aligned(d_sae * static_cast<int64_t>(sizeof(float))) +
         (keys > kSharedKeys ? aligned(keys * static_cast<int64_t>(sizeof(uint64_t))) : 0);
}

cudaError_t complete_rows(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                          Memory memory, const FallbackRows& fallback, cudaStream_t stream) {
  return compute_rows(encoder, tokens, topk, memory, {fallback, 0, 0, 0}, tokens.rows, stream);
}

cudaError_t exact_topk(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                       Memory memory, cudaStream_t stream) {
  const int64_t slots = memory.bytes / exact_bytes(encoder.d_sae, topk.k, topk.k_aux);
  if (slots == 0) return cudaErrorInvalidValue;
  const int32_t lists = topk.k_aux > 0 ? kMainList | kAuxList : kMainList;
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < tokens.rows && error == cudaSuccess; first += slots) {
    const int64_t count = std::min(slots, tokens.rows - first);
    error = compute_rows(encoder, tokens, topk, memory, {{}, first, count, lists}, count, stream);
  }
  return error;
}

}  // namespace sae_fast::cuda
