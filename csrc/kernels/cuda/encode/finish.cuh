// The two ends of a top-k call: what becomes of the rows with a list, and of those without.
#pragma once

#include "kernels/cuda/encode/state.cuh"

namespace sae_fast::cuda {

// Scores the lists' candidates, where the encoder is exact, and writes the best of each row.
cudaError_t finish_lists(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                         const EncodeState& state, cudaStream_t stream);

// Computes in full the rows that are listed, however many: for none, two launches that return at
// once. After finish_lists, which may list more.
cudaError_t complete_rows(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                          Memory memory, const FallbackRows& fallback, cudaStream_t stream);

}  // namespace sae_fast::cuda
