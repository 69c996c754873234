// Streaming selection: a list of candidates a row, from which whatever can no longer win is dropped
// when it is full.
#include "kernels/cuda/encode/finish.cuh"
#include "kernels/cuda/encode/product.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kSelectThreads = 256;
constexpr int kSelectWarps = kSelectThreads / kWarpSize;
// Blocks that a multiprocessor's registers must hold: 4096 rows are 31 warps each for 132 of them.
// Left to itself the assembler spills in pursuit of more.
constexpr int kSelectBlocks = 4;

// One row's list while a warp works on it.
struct RowCandidates {
  Candidate* at;  // [capacity]
  int capacity, count;
  float threshold;

  __device__ RowCandidates(const Lists& lists, int64_t row)
      : at(lists.candidates + flat_index(row, lists.capacity, 0)),
        capacity(lists.capacity),
        count(lists.states[row].count),
        threshold(lists.states[row].threshold) {}

  __device__ bool has_room() const { return count + kStrip <= capacity; }
};

// The most that a candidate's exact score can be.
template <bool kExact>
__device__ inline float high_of(const Candidate& candidate, const TokenBound& token,
                                const Encoder& encoder) {
  if constexpr (kExact) {
    return candidate.low + 2.0f * token.error(latent_bound(encoder, candidate.latent));
  } else {
    return candidate.low;
  }
}

// Raises the threshold to the k-th best `low` and drops candidates certainly below it; order stays.
template <bool kExact>
__device__ void compact(RowCandidates& list, int k, const TokenBound& token, const Encoder& encoder,
                        int* histogram) {
  if (list.count <= k) return;
  __syncwarp();  // the list's entries come from all lanes
  const float kth =
      value_of_key(kth_value_key(list.count, k, histogram, [&](int i) { return list.at[i].low; }));
  if (kth > list.threshold) list.threshold = kth;
  int kept = 0;
  for (int base = 0; base < list.count; base += kWarpSize) {
    const int i = base + lane_index();
    Candidate candidate{};
    bool keep = false;
    if (i < list.count) {
      candidate = list.at[i];
      keep = !(high_of<kExact>(candidate, token, encoder) < list.threshold);
    }
    const unsigned lanes = __ballot_sync(kFullWarp, keep);
    __syncwarp();  // read before it is written over
    if (keep) list.at[kept + __popc(lanes & lanes_before())] = candidate;
    kept += __popc(lanes);
  }
  __syncwarp();
  list.count = kept;
}

// Appends the latents of one strip that pass; `bits` marks lanes that passed the coarse bound.
template <bool kExact, bool kVector>
__device__ void append_strip(RowCandidates& list, const RowSegment& at, int strip, unsigned bits,
                             const TokenBound& token, const Encoder& encoder) {
  Columns values = at.load_strip<kVector>(strip);
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    if ((bits >> i & 1u) == 0) continue;
    float high = values.at[i];
    if constexpr (kExact) {
      const float error = token.error(latent_bound(encoder, at.latent(strip) + i));
      high += error;
      values.at[i] -= error;
      if (values.at[i] != values.at[i]) values.at[i] = -INFINITY;  // nothing is known
    }
    if (high < list.threshold) bits &= ~(1u << i);
  }
  const StripPlaces places(bits);
  int place = list.count + places.first;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    if ((bits >> i & 1u) == 0) continue;
    list.at[place++] = {values.at[i], static_cast<int32_t>(at.latent(strip) + i)};
  }
  list.count += places.total;
}

// Appends a segment's candidates; false where even a compacted list has no room for them.
template <bool kExact, bool kVector>
__device__ bool append_segment(RowCandidates& list, const RowSegment& at, unsigned passed, int k,
                               const TokenBound& token, const Encoder& encoder, int* histogram) {
#pragma unroll 1
  for (int strip = 0; strip < kStrips; ++strip) {
    const unsigned bits = passed >> strip * kLaneColumns & kLaneMask;
    if (!__any_sync(kFullWarp, bits != 0)) continue;
    if (!list.has_room()) compact<kExact>(list, k, token, encoder, histogram);
    if (!list.has_room()) return false;
    append_strip<kExact, kVector>(list, at, strip, bits, token, encoder);
  }
  return true;
}

// ---- kernels

// The selection of one launch: the k best of all latents, or of the dead ones.
struct Selection {
  Lists lists;
  int32_t list;  // kMainList or kAuxList
  int k;
  // At the first chunk, rows that were flagged before become rows of the fallback.
  bool lists_flagged;
};

// One warp a row of the chunk. Most segments hold no candidate: they cost the loads, an addition
// and a comparison a column, and one vote. Expected to run at the memory's rate; not measured.
// Dead latents have another launch, which reads the chunk again if there are any: both lists in one
// kernel took twice the registers, also in steps without AuxK.
template <bool kExact, bool kVector, bool kDead>
__global__ void __launch_bounds__(kSelectThreads, kSelectBlocks)
    select_kernel(Encoder encoder, Product product, int64_t rows, Selection selection,
                  const TokenBound* __restrict__ bounds, SegmentState segments,
                  FallbackRows fallback) {
  __shared__ int histograms[kSelectWarps][kDigits];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const bool last = product.first_latent + product.columns == encoder.d_sae;
  int k = selection.k;
  if constexpr (kDead) {
    k = min(k, *segments.dead_total);
    if (k == 0 && !selection.lists_flagged) return;
  }
  RowSegment at{nullptr, encoder.b_enc + product.first_latent, product.first_latent,
                static_cast<int>(product.columns), 0};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kSelectWarps + warp; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kSelectWarps) {
    if ((fallback.flags[row] & selection.list) != 0) {
      if (product.first_latent == 0 && selection.lists_flagged && lane_index() == 0) {
        fallback.rows[atomicAdd(fallback.count, 1)] = static_cast<int32_t>(row);
      }
      continue;
    }
    if (kDead && k == 0) continue;
    const TokenBound token = bounds[row];
    at.product = product.values + flat_index(row, product.columns, 0);
    RowCandidates list(selection.lists, row);
    bool fits = true;
    for (at.begin = 0; at.begin < at.columns && fits; at.begin += kSegment) {
      if (kDead && segments.dead_counts[at.segment()] == 0) continue;
      Columns values[kStrips];
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) values[strip] = at.load_strip<kVector>(strip);
      const float error = kExact ? token.error(segments.bounds[at.segment()]) : 0.0f;
      unsigned passed = at.existing() & not_below(values, list.threshold - error);
      if constexpr (kDead) passed &= at.dead(segments.dead_bits);
      if (!__any_sync(kFullWarp, passed != 0)) continue;
      fits = append_segment<kExact, kVector>(list, at, passed, k, token, encoder, histograms[warp]);
    }
    if (last && fits) compact<kExact>(list, k, token, encoder, histograms[warp]);
    if (lane_index() != 0) continue;
    selection.lists.states[row] = {list.threshold, list.count};
    if (!fits) list_row(fallback, row, selection.list);
  }
}

// ---- launchers

template <bool kDead>
cudaError_t select_list(const Encoder& encoder, const Product& product, int64_t rows,
                        const Selection& selection, const EncodeState& state, cudaStream_t stream) {
  const bool fits = vectors_fit(product.columns, kLaneColumns, {product.values, encoder.b_enc});
  const auto start = [&](auto* kernel) {
    return launch(kernel, ceil_div<int64_t>(rows, kSelectWarps), kSelectThreads, 0, stream, encoder,
                  product, rows, selection, state.bounds, state.segments, state.fallback);
  };
  if (encoder.exact) {
    return start(fits ? select_kernel<true, true, kDead> : select_kernel<true, false, kDead>);
  }
  return start(fits ? select_kernel<false, true, kDead> : select_kernel<false, false, kDead>);
}

}  // namespace

size_t topk_scratch_bytes(int64_t rows, int64_t d_sae, int64_t k, int64_t k_aux) {
  Scratch scratch(nullptr);
  const EncodeState state(scratch, rows, d_sae, k, k_aux);
  return scratch.bytes();
}

int64_t topk_row_bytes(int64_t k, int64_t k_aux) {
  constexpr auto kEntryBytes = static_cast<int64_t>(sizeof(float) + sizeof(int32_t));
  return ((k > 0 ? candidate_capacity(k) : 0) + (k_aux > 0 ? candidate_capacity(k_aux) : 0)) *
         kEntryBytes;
}

cudaError_t begin_topk(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                       void* scratch, cudaStream_t stream) {
  Scratch pieces(scratch);
  const EncodeState state(pieces, tokens.rows, encoder.d_sae, topk.k, topk.k_aux);
  return prepare_encode(encoder, tokens, topk.k_aux > 0 ? topk.dead_mask : nullptr,
                        Unbounded::kFlag, state, stream);
}

cudaError_t select_topk(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                        const Product& product, void* scratch, cudaStream_t stream) {
  Scratch pieces(scratch);
  const EncodeState state(pieces, tokens.rows, encoder.d_sae, topk.k, topk.k_aux);
  cudaError_t error = cudaSuccess;
  if (topk.k > 0) {
    error =
        select_list<false>(encoder, product, tokens.rows,
                           {state.main, kMainList, static_cast<int>(topk.k), true}, state, stream);
  }
  if (error == cudaSuccess && topk.k_aux > 0) {
    error = select_list<true>(encoder, product, tokens.rows,
                              {state.aux, kAuxList, static_cast<int>(topk.k_aux), topk.k == 0},
                              state, stream);
  }
  return error;
}

cudaError_t finish_topk(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                        Memory memory, void* scratch, cudaStream_t stream) {
  Scratch pieces(scratch);
  const EncodeState state(pieces, tokens.rows, encoder.d_sae, topk.k, topk.k_aux);
  cudaError_t error = finish_lists(encoder, tokens, topk, state, stream);
  if (error == cudaSuccess) {
    error = complete_rows(encoder, tokens, topk, memory, state.fallback, stream);
  }
  return error;
}

}  // namespace sae_fast::cuda
