// Top-k of a whole batch on a GPU: one list of candidates for all tokens, below a limit that
// tightens as more of the batch is seen.
//
// An op calls begin_batch. For every block of tokens it calls begin_topk with k = 0 and the k_aux
// that it wants, add_block, and select_batch after each chunk's product. finish_batch ends it, all
// on one stream.
#pragma once

#include "kernels/cuda/encode/encode.h"

namespace sae_fast::cuda {

struct BatchSize {
  int64_t tokens, d_sae;
  int64_t k;  // tokens * k is at most INT32_MAX

  int64_t wanted() const { return tokens * k; }
};

// CSR rows by ascending index, as the schema of encode_batch_topk says.
struct BatchCode {
  float* values;     // [N * k]
  int32_t* indices;  // [N * k]
  int64_t* offsets;  // [N + 1]
};

// The scratch of a block's begin_topk, as selection of the batch reads it.
struct BlockScratch {
  void* data;
  int64_t k_aux;
  int64_t first_row;  // of the block, in the batch
};

// Before which chunks the limit is tightened: whenever an eighth more of the batch has been seen.
// Each time costs another read of the chunk and three small launches; not measured.
class Tightening {
 public:
  bool due(int64_t elements) {
    seen_ += elements;
    const bool grown = seen_ - last_ >= last_ / 8;
    if (grown) last_ = seen_;
    return grown;
  }

 private:
  int64_t seen_ = 0, last_ = 0;
};

cudaError_t batch_scratch_bytes(const BatchSize& size, size_t* bytes);
cudaError_t begin_batch(const BatchSize& size, void* scratch, cudaStream_t stream);
cudaError_t add_block(const Encoder& encoder, const Tokens& tokens, const BatchSize& size,
                      const BlockScratch& block, void* scratch, cudaStream_t stream);
// With `tighten` the limit is tightened by the chunk first, then the chunk is collected: without,
// the lists may be flooded, which costs a computation in full.
cudaError_t select_batch(const Encoder& encoder, const Tokens& tokens, const BatchSize& size,
                         const Product& product, bool tighten, const BlockScratch& block,
                         void* scratch, cudaStream_t stream);
// `x` [N, D] has the tokens of the whole batch.
cudaError_t finish_batch(const Encoder& encoder, const float* x, const BatchSize& size,
                         const BatchCode& code, void* scratch, cudaStream_t stream);

// *count becomes the number of calls of finish_batch, on this device and in this process, that have
// computed the whole batch in full.
cudaError_t read_full_batches(int64_t* count, cudaStream_t stream);

}  // namespace sae_fast::cuda
