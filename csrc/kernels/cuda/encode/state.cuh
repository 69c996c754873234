// The memory that the kernels of one encoder call share, and its preparation: per token its error
// bound and lists of candidates, per segment of latents the coarse bound and the dead latents.
#pragma once

#include "kernels/common/encode_plan.h"
#include "kernels/cuda/encode/bound.cuh"

namespace sae_fast::cuda {

// Latents of a segment: bounds on them, and which are dead, 32 to a word.
struct SegmentState {
  SegmentBound* bounds;  // [segments]
  uint32_t* dead_bits;   // [segments, kDeadWords]
  int32_t* dead_counts;  // [segments]
  int32_t* dead_total;   // []
};
constexpr int kDeadWords = kSegment / 32;

// Rows that a list cannot settle: a bit for each list that is to be computed in full.
struct FallbackRows {
  int32_t* rows;   // [N]: the first *count, in any order
  int32_t* count;  // []
  int32_t* flags;  // [N]
};
constexpr int32_t kMainList = 1;
constexpr int32_t kAuxList = 2;

__device__ inline void list_row(const FallbackRows& fallback, int64_t row, int32_t list) {
  if (atomicOr(&fallback.flags[row], list) == 0) {
    fallback.rows[atomicAdd(fallback.count, 1)] = static_cast<int32_t>(row);
  }
}

// A row's list so far: nothing below the threshold can be among its k best.
struct ListState {
  float threshold;
  int32_t count;
};

struct alignas(8) Candidate {
  float low;  // the least that its exact score can be
  int32_t latent;
};

struct Lists {
  ListState* states;      // [N]
  Candidate* candidates;  // [N, capacity]
  int32_t capacity;
};

struct EncodeState {
  TokenBound* bounds;  // [N]
  SegmentState segments;
  FallbackRows fallback;
  Lists main, aux;  // no lists where capacity is 0

  EncodeState(Scratch& scratch, int64_t rows, int64_t d_sae, int64_t k, int64_t k_aux)
      : bounds(scratch.take<TokenBound>(rows)) {
    const int64_t count = segment_count(d_sae);
    segments.bounds = scratch.take<SegmentBound>(count);
    segments.dead_bits = scratch.take<uint32_t>(count * kDeadWords);
    segments.dead_counts = scratch.take<int32_t>(count);
    segments.dead_total = scratch.take<int32_t>(1);
    fallback.count = scratch.take<int32_t>(1);
    fallback.rows = scratch.take<int32_t>(rows);
    fallback.flags = scratch.take<int32_t>(rows);
    main = take_lists(scratch, rows, k);
    aux = take_lists(scratch, rows, k_aux);
  }

 private:
  static Lists take_lists(Scratch& scratch, int64_t rows, int64_t k) {
    const int64_t capacity = k > 0 ? candidate_capacity(k) : 0;
    return {scratch.take<ListState>(k > 0 ? rows : 0), scratch.take<Candidate>(rows * capacity),
            static_cast<int32_t>(capacity)};
  }
};

// The treatment of a token that screening has no bound for.
enum class Unbounded {
  kFlag,       // its lists are to be computed in full; it is not among the rows yet
  kPassEvery,  // its bound is infinite: every latent is a candidate
};

// Rounds the tokens, bounds them where the encoder is exact, and empties all lists. dead_mask may
// be null: then dead_total is not written.
cudaError_t prepare_encode(const Encoder& encoder, const Tokens& tokens, const bool* dead_mask,
                           Unbounded unbounded, const EncodeState& state, cudaStream_t stream);

}  // namespace sae_fast::cuda
