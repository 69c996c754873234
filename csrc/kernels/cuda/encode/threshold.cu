// Threshold codes: candidates are collected by ascending latent, so that those left after scoring
// are a row of the result.
#include "kernels/cuda/encode/product.cuh"
#include "kernels/cuda/encode/score.cuh"
#include "kernels/cuda/reduce.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kCollectThreads = 256;
constexpr int kCollectWarps = kCollectThreads / kWarpSize;
constexpr int kCollectBlocks = 3;  // that a multiprocessor's registers must hold, without spills
constexpr int kPassThreads = 128;
constexpr int kPassWarps = kPassThreads / kWarpSize;
constexpr int kOffsetThreads = 1024;
constexpr int kOffsetItems = 8;

__device__ inline int64_t room_begin(const CandidateRows& rows, int64_t row) {
  return rows.offsets != nullptr ? rows.offsets[row] : row * rows.capacity;
}

__device__ inline int64_t room_of(const CandidateRows& rows, int64_t row) {
  return rows.offsets != nullptr ? rows.offsets[row + 1] - rows.offsets[row] : rows.capacity;
}

// A value passes above its threshold and above 0, and if it is NaN.
__device__ inline bool passes(float value, float threshold) {
  return (value > threshold && value > 0.0f) || value != value;
}

// Returns true if a score within `error` of the value might pass. A NaN or an infinite error says
// nothing about the score: it might.
__device__ inline bool may_pass(float value, float threshold, float error) {
  const float high = value + error;
  return !(error < INFINITY) || (!(high <= 0.0f) && !(high <= threshold));
}

// The lane's bits of a strip: which of its columns may pass.
template <bool kExact, bool kVector>
__device__ unsigned candidates_of(const RowSegment& at, int strip,
                                  const float* __restrict__ threshold, const TokenBound& token,
                                  float segment_error, const Encoder& encoder) {
  const Columns values = at.load_strip<kVector>(strip);
  const Columns limits =
      load_lane<kVector>(threshold + at.first_latent, at.column(strip), at.columns);
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    if (at.column(strip) + i >= at.columns) continue;
    bool candidate = false;
    if constexpr (!kExact) {
      candidate = passes(values.at[i], limits.at[i]);
    } else if (may_pass(values.at[i], limits.at[i], segment_error)) {
      const float error = token.error(latent_bound(encoder, at.latent(strip) + i));
      candidate = may_pass(values.at[i], limits.at[i], error);
    }
    if (candidate) bits |= 1u << i;
  }
  return bits;
}

__device__ inline void note_overflow(int64_t count, int64_t* kept, unsigned long long* most,
                                     bool writes) {
  if (!writes) return;
  *kept = 0;
  atomicMax(most, static_cast<unsigned long long>(count));
}

// ---- kernels

// One warp a row of the chunk. A row keeps counting when its room is full.
template <bool kExact, bool kVector>
__global__ void __launch_bounds__(kCollectThreads, kCollectBlocks)
    collect_kernel(Encoder encoder, Product product, int64_t rows,
                   const float* __restrict__ threshold, const TokenBound* __restrict__ bounds,
                   SegmentState segments, CandidateRows candidates) {
  RowSegment at{nullptr, encoder.b_enc + product.first_latent, product.first_latent,
                static_cast<int>(product.columns), 0};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kCollectWarps + threadIdx.x / kWarpSize;
       row < rows; row += static_cast<int64_t>(gridDim.x) * kCollectWarps) {
    const TokenBound token = bounds[row];
    at.product = product.values + flat_index(row, product.columns, 0);
    const int64_t begin = room_begin(candidates, row);
    const int64_t room = room_of(candidates, row);
    int64_t count = candidates.counts[row];
    for (at.begin = 0; at.begin < at.columns; at.begin += kSegment) {
      const float error = kExact ? token.error(segments.bounds[at.segment()]) : 0.0f;
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        const unsigned bits =
            candidates_of<kExact, kVector>(at, strip, threshold, token, error, encoder);
        if (!__any_sync(kFullWarp, bits != 0)) continue;
        const Columns values = at.load_strip<kVector>(strip);
        const StripPlaces places(bits);
        int64_t place = count + places.first;
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
          if ((bits >> i & 1u) == 0) continue;
          if (place < room) {
            candidates.values[begin + place] = values.at[i];
            candidates.indices[begin + place] = static_cast<int32_t>(at.latent(strip) + i);
          }
          ++place;
        }
        count += places.total;
      }
    }
    __syncwarp();  // all lanes have read the count
    if (lane_index() == 0) candidates.counts[row] = count;
  }
}

// The scores of a step of a row: kPassWarps warps with four latents each.
struct PassShared {
  float values[kPassWarps * kScoresAtOnce];
  int32_t latents[kPassWarps * kScoresAtOnce];
};

// One block a row. Warps score the next 16 candidates; then one warp moves those that pass, in
// order, to the front of the list, which has been read already.
template <bool kVector>
__global__ void __launch_bounds__(kPassThreads)
    pass_kernel(Encoder encoder, Tokens tokens, const float* __restrict__ threshold,
                CandidateRows candidates, int64_t* __restrict__ kept_counts,
                unsigned long long* most) {
  __shared__ PassShared shared;
  constexpr int kStep = kPassWarps * kScoresAtOnce;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int64_t row = blockIdx.x; row < tokens.rows; row += gridDim.x) {
    const int64_t begin = room_begin(candidates, row);
    const int64_t count = candidates.counts[row];
    if (count > room_of(candidates, row)) {
      note_overflow(count, kept_counts + row, most, threadIdx.x == 0);
      continue;
    }
    const float* const x = tokens.x + flat_index(row, encoder.d_in, 0);
    int64_t kept = 0;  // of the first warp
    for (int64_t first = 0; first < count; first += kStep) {
      const int64_t mine = first + warp * kScoresAtOnce;
      int32_t latents[kScoresAtOnce];
#pragma unroll
      for (int s = 0; s < kScoresAtOnce; ++s) {  // past the end, the last once more
        latents[s] = candidates.indices[begin + min(mine + s, count - 1)];
      }
      const float score =
          score_latents<float, kVector>(x, encoder.b_dec, encoder.W_enc, latents, encoder.d_in);
      if (stores_sum<kScoresAtOnce>()) {
        const int number = owned_sum<kScoresAtOnce>();
        const int32_t latent = candidates.indices[begin + min(mine + number, count - 1)];
        shared.values[warp * kScoresAtOnce + number] = score + encoder.b_enc[latent];
        shared.latents[warp * kScoresAtOnce + number] = latent;
      }
      __syncthreads();
      if (warp == 0) {
        const int lane = lane_index();
        const bool exists = lane < kStep && first + lane < count;
        const bool keep = exists && passes(shared.values[lane], threshold[shared.latents[lane]]);
        const unsigned lanes = __ballot_sync(kFullWarp, keep);
        if (keep) {
          const int64_t place = begin + kept + __popc(lanes & lanes_before());
          candidates.values[place] = shared.values[lane];
          candidates.indices[place] = shared.latents[lane];
        }
        kept += __popc(lanes);
      }
      __syncthreads();  // shared is free, and the list shows what was kept
    }
    if (threadIdx.x == 0) kept_counts[row] = kept;
  }
}

// Finds rows without enough room, where the product is the result and every candidate has passed.
__global__ void __launch_bounds__(kCollectThreads)
    room_kernel(CandidateRows candidates, int64_t rows, int64_t* __restrict__ kept_counts,
                unsigned long long* most) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kCollectThreads;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kCollectThreads + threadIdx.x;
  for (; row < rows; row += stride) {
    const int64_t count = candidates.counts[row];
    kept_counts[row] = count;
    if (count > room_of(candidates, row)) note_overflow(count, kept_counts + row, most, true);
  }
}

// One block in all.
__global__ void __launch_bounds__(kOffsetThreads)
    offsets_kernel(const int64_t* __restrict__ counts, int64_t rows, int64_t* offsets) {
  __shared__ int64_t partial[kOffsetThreads / kWarpSize];
  const int64_t total = block_scan<kOffsetItems>(
      rows, partial, [&](int64_t row) { return counts[row]; },
      [&](int64_t row, int64_t before) { offsets[row] = before; });
  if (threadIdx.x == 0) offsets[rows] = total;
}

// One block a row.
__global__ void __launch_bounds__(kPassThreads)
    gather_kernel(CandidateRows candidates, int64_t rows, const int64_t* __restrict__ offsets,
                  float* __restrict__ values, int32_t* __restrict__ indices) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t from = room_begin(candidates, row);
    const int64_t to = offsets[row];
    const int64_t count = offsets[row + 1] - to;
    for (int64_t i = threadIdx.x; i < count; i += kPassThreads) {
      values[to + i] = candidates.values[from + i];
      indices[to + i] = candidates.indices[from + i];
    }
  }
}

}  // namespace

size_t threshold_scratch_bytes(int64_t rows, int64_t d_sae) {
  Scratch scratch(nullptr);
  const EncodeState state(scratch, rows, d_sae, 0, 0);
  return scratch.bytes();
}

cudaError_t begin_threshold(const Encoder& encoder, const Tokens& tokens, CandidateRows candidates,
                            void* scratch, cudaStream_t stream) {
  Scratch pieces(scratch);
  const EncodeState state(pieces, tokens.rows, encoder.d_sae, 0, 0);
  const size_t bytes = static_cast<size_t>(tokens.rows + 1) * sizeof(int64_t);
  const cudaError_t error = cudaMemsetAsync(candidates.counts, 0, bytes, stream);
  if (error != cudaSuccess) return error;
  return prepare_encode(encoder, tokens, nullptr, Unbounded::kPassEvery, state, stream);
}

cudaError_t select_threshold(const Encoder& encoder, const Tokens& tokens, const float* threshold,
                             const Product& product, CandidateRows candidates, void* scratch,
                             cudaStream_t stream) {
  Scratch pieces(scratch);
  const EncodeState state(pieces, tokens.rows, encoder.d_sae, 0, 0);
  const bool fits =
      vectors_fit(product.columns, kLaneColumns, {product.values, encoder.b_enc, threshold});
  const auto start = [&](auto* kernel) {
    return launch(kernel, ceil_div<int64_t>(tokens.rows, kCollectWarps), kCollectThreads, 0, stream,
                  encoder, product, tokens.rows, threshold, state.bounds, state.segments,
                  candidates);
  };
  if (encoder.exact) return start(fits ? collect_kernel<true, true> : collect_kernel<true, false>);
  return start(fits ? collect_kernel<false, true> : collect_kernel<false, false>);
}

cudaError_t finish_threshold(const Encoder& encoder, const Tokens& tokens, const float* threshold,
                             CandidateRows candidates, int64_t* kept, int64_t* most,
                             cudaStream_t stream) {
  auto* const largest = reinterpret_cast<unsigned long long*>(most);
  const cudaError_t error = cudaMemsetAsync(most, 0, sizeof *most, stream);
  if (error != cudaSuccess) return error;
  if (!encoder.exact) {
    return launch(room_kernel, ceil_div<int64_t>(tokens.rows, kCollectThreads), kCollectThreads, 0,
                  stream, candidates, tokens.rows, kept, largest);
  }
  const bool fits =
      vectors_fit(encoder.d_in, kColumnsOfLane, {encoder.W_enc, tokens.x, encoder.b_dec});
  return launch(fits ? pass_kernel<true> : pass_kernel<false>, tokens.rows, kPassThreads, 0, stream,
                encoder, tokens, threshold, candidates, kept, largest);
}

cudaError_t count_offsets(const int64_t* counts, int64_t rows, int64_t* offsets,
                          cudaStream_t stream) {
  return launch(offsets_kernel, 1, kOffsetThreads, 0, stream, counts, rows, offsets);
}

cudaError_t gather_code(CandidateRows candidates, int64_t rows, const int64_t* offsets,
                        float* values, int32_t* indices, cudaStream_t stream) {
  return launch(gather_kernel, rows, kPassThreads, 0, stream, candidates, rows, offsets, values,
                indices);
}

}  // namespace sae_fast::cuda
