// Weighted sums over the entries of each latent: what a gradient row is made of. Activations are
// heavy-tailed, so the list of a busy latent is cut into chunks that different blocks sum into
// scratch; the chunks of a latent are then added in order, which keeps the result the same bits in
// every run.
#pragma once

#include "kernels/common/chunks.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/types.h"

namespace sae_fast::cuda {

// The entries of latent j are offsets[j] .. offsets[j + 1] of the other two.
struct LatentLists {
  const int64_t* offsets;     // [F + 1]
  const int32_t* rows;        // [entries]: row of dense
  const float* coefficients;  // [entries]
  int64_t latents;            // F
  int64_t entries;            // room in the lists; offsets[F] of it is in use
};

// For every latent, how many chunks and how many cached rows the latents before it have.
struct LatentPlan {
  int64_t* counts = nullptr;   // [F + 1]: chunks in the upper 32 bits, cached rows in the lower
  float* partials = nullptr;   // [max_chunks(entries), D]: sums of the chunks
  unsigned* ticket = nullptr;  // 0, for one later launch that asks for its last block

  LatentPlan() = default;
  LatentPlan(Scratch& scratch, int64_t entries, int64_t latents, int64_t d_in)
      : counts(scratch.take<int64_t>(latents + 1)),
        partials(scratch.take<float>(max_chunks(entries) * d_in)),
        ticket(scratch.take<unsigned>(1)) {}
};

// Fills plan.counts; a latent with more than cached_above entries has a cached row.
cudaError_t plan_latents(const int64_t* latent_offsets, int64_t latents, int64_t cached_above,
                         const LatentPlan& plan, cudaStream_t stream);

// Fills plan.partials with the sums of coefficient * (dense[row] - shift) of every chunk.
cudaError_t sum_chunks(const LatentLists& lists, const LatentPlan& plan,
                       TypedPointer dense,  // [N, D]
                       const float* shift,  // [D] or null
                       int64_t d_in, cudaStream_t stream);

}  // namespace sae_fast::cuda
