#include "kernels/cuda/encode/finish.cuh"

#include "kernels/cuda/encode/score.cuh"
#include "kernels/cuda/select.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kFinishThreads = 128;
constexpr int kFinishWarps = kFinishThreads / kWarpSize;
// Blocks that a multiprocessor's registers must hold. 16 warps with four rows each in flight are
// enough to cover the memory's latency; left to itself the assembler spills for more.
constexpr int kFinishBlocks = 4;

// A list as one block sees it.
struct RowList {
  const Candidate* at;  // [count]
  int count;
  float threshold;
};

// The rows of the code that lists become.
struct ListOutput {
  float* values;     // [N, k]
  int32_t* indices;  // [N, k]
  int64_t k;
};

struct FinishShared {
  int queue[kFinishThreads];  // places in the list
  int queued;
  int found;
  unsigned worst;  // the last of the keys that certainly count
  int wrong;
};

__device__ inline float list_high(const RowList& list, int place, const TokenBound& token,
                                  const Encoder& encoder) {
  return list.at[place].low + 2.0f * token.error(latent_bound(encoder, list.at[place].latent));
}

// Scores the queued candidates, four a warp at a time, and appends their keys.
template <bool kVector>
__device__ void score_queue(const RowList& list, const float* __restrict__ x,
                            const Encoder& encoder, const TokenBound& token, uint64_t* keys,
                            FinishShared& shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int first = warp * kScoresAtOnce; first < shared.queued;
       first += kFinishWarps * kScoresAtOnce) {
    int32_t latents[kScoresAtOnce];
#pragma unroll
    for (int s = 0; s < kScoresAtOnce; ++s) {  // past the end, the last once more
      latents[s] = list.at[shared.queue[min(first + s, shared.queued - 1)]].latent;
    }
    const float score =
        score_latents<float, kVector>(x, encoder.b_dec, encoder.W_enc, latents, encoder.d_in);
    const int number = first + owned_sum<kScoresAtOnce>();
    if (!stores_sum<kScoresAtOnce>() || number >= shared.queued) continue;
    const int place = shared.queue[number];
    const int32_t latent = list.at[place].latent;
    const float value = score + encoder.b_enc[latent];
    const bool outside =
        value < list.at[place].low || value > list_high(list, place, token, encoder);
    if (outside) shared.wrong = 1;
    const uint64_t key = entry_key(value, latent);
    keys[atomicAdd(&shared.found, 1)] = key;
    atomicMax(&shared.worst, static_cast<unsigned>(key >> 32));
  }
}

// Scores the candidates that wanted(place) chooses.
template <bool kVector, typename Wanted>
__device__ void score_list(const RowList& list, const float* __restrict__ x, const Encoder& encoder,
                           const TokenBound& token, uint64_t* keys, FinishShared& shared,
                           Wanted&& wanted) {
  for (int base = 0; base < list.count; base += kFinishThreads) {
    if (threadIdx.x == 0) shared.queued = 0;
    __syncthreads();
    const int place = base + static_cast<int>(threadIdx.x);
    if (place < list.count && wanted(place)) {
      shared.queue[atomicAdd(&shared.queued, 1)] = place;
    }
    __syncthreads();
    score_queue<kVector>(list, x, encoder, token, keys, shared);
    __syncthreads();
  }
}

// ---- kernels

// One block a row's list. First the candidates that reach the k-th lower bound are scored, at least
// k of them. The worst of their exact scores bounds the k-th score from below more tightly than the
// lower bounds did, so fewer of the others are scored: at d_in 4096 most of a call's time.
template <bool kVector>
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks)
    score_kernel(Encoder encoder, Tokens tokens, const TokenBound* __restrict__ bounds, Lists lists,
                 ListOutput output, FallbackRows fallback, int32_t list_bit) {
  auto* const keys = static_cast<uint64_t*>(dynamic_shared_memory());
  __shared__ FinishShared shared;
  for (int64_t row = blockIdx.x; row < tokens.rows; row += gridDim.x) {
    if ((fallback.flags[row] & list_bit) != 0) continue;
    const RowList list{lists.candidates + flat_index(row, lists.capacity, 0),
                       lists.states[row].count, lists.states[row].threshold};
    const TokenBound token = bounds[row];
    const float* const x = tokens.x + flat_index(row, encoder.d_in, 0);
    if (threadIdx.x == 0) {
      shared.found = 0;
      shared.worst = 0;
      shared.wrong = 0;
    }
    __syncthreads();
    float worst = 0.0f;
#pragma unroll 1  // two copies of the loop would take twice the registers
    for (int stage = 0; stage < 2; ++stage) {
      score_list<kVector>(list, x, encoder, token, keys, shared, [&](int place) {
        const bool certain = list.at[place].low >= list.threshold;
        if (stage == 0 || certain) return stage == 0 && certain;
        return !(list_high(list, place, token, encoder) < worst);
      });
      worst = value_of_key(shared.worst);
      __syncthreads();  // all threads have read it
    }
    const int found = shared.found;
    const bool wrong = shared.wrong != 0;
    if (wrong && threadIdx.x == 0) list_row(fallback, row, list_bit);
    sort_keys(keys, found, static_cast<int>(next_power_of_two(found)));
    write_entries(keys, found, output.k, output.values + row * output.k,
                  output.indices + row * output.k);
    __syncthreads();  // the shared memory is free for the next row
  }
}

// Sorts lists whose values are the scores already.
__global__ void __launch_bounds__(kFinishThreads)
    sort_kernel(int64_t rows, Lists lists, ListOutput output, const int32_t* __restrict__ flags,
                int32_t list_bit) {
  auto* const keys = static_cast<uint64_t*>(dynamic_shared_memory());
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    if ((flags[row] & list_bit) != 0) continue;
    const Candidate* const list = lists.candidates + flat_index(row, lists.capacity, 0);
    const int count = lists.states[row].count;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kFinishThreads) {
      keys[i] = entry_key(list[i].low, list[i].latent);
    }
    sort_keys(keys, count, static_cast<int>(next_power_of_two(count)));
    write_entries(keys, count, output.k, output.values + row * output.k,
                  output.indices + row * output.k);
    __syncthreads();  // the shared memory is free for the next row
  }
}

// ---- launchers

int64_t key_bytes(int64_t k) {
  return next_power_of_two(candidate_capacity(k)) * static_cast<int64_t>(sizeof(uint64_t));
}

cudaError_t finish_list(const Encoder& encoder, const Tokens& tokens, const EncodeState& state,
                        const Lists& lists, const ListOutput& output, int32_t list_bit,
                        cudaStream_t stream) {
  const auto shared_bytes = static_cast<size_t>(key_bytes(output.k));
  if (!encoder.exact) {
    return launch(sort_kernel, tokens.rows, kFinishThreads, shared_bytes, stream, tokens.rows,
                  lists, output, state.fallback.flags, list_bit);
  }
  const bool fits =
      vectors_fit(encoder.d_in, kColumnsOfLane, {encoder.W_enc, tokens.x, encoder.b_dec});
  return launch(fits ? score_kernel<true> : score_kernel<false>, tokens.rows, kFinishThreads,
                shared_bytes, stream, encoder, tokens, state.bounds, lists, output, state.fallback,
                list_bit);
}

}  // namespace

cudaError_t topk_streams(int64_t k, int64_t k_aux, bool* streams) {
  int limit = 0;
  const cudaError_t error = device_attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t room = limit - static_cast<int64_t>(sizeof(FinishShared));
  *streams = key_bytes(std::max(k, k_aux)) <= room;
  return error;
}

cudaError_t finish_lists(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                         const EncodeState& state, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (topk.k > 0) {
    error = finish_list(encoder, tokens, state, state.main, {topk.values, topk.indices, topk.k},
                        kMainList, stream);
  }
  if (error == cudaSuccess && topk.k_aux > 0) {
    error = finish_list(encoder, tokens, state, state.aux,
                        {topk.aux_values, topk.aux_indices, topk.k_aux}, kAuxList, stream);
  }
  return error;
}

}  // namespace sae_fast::cuda
