// The encoder on a GPU. A library product of 16-bit operands goes chunk by chunk into a small
// buffer; selection streams over it and keeps a short list of candidates a token; what can still
// win is scored again in float32.
//
// An op calls begin_*, then select_* after each chunk's product, then finish_*, all on one stream.
#pragma once

#include "kernels/cuda/types.h"

namespace sae_fast::cuda {

// The encoder as selection reads it. With `exact` the scores are those from float32 operands, and
// `stats` bounds their rounding errors; without, the product's sums are the scores.
struct Encoder {
  const float* W_enc;    // [F, D]
  TypedPointer rounded;  // [F, D] bfloat16 or float16
  const float* stats;    // [2, F]: bounds on |w_j| and on |w_j - rounded_j|
  const float* b_enc;    // [F]
  const float* b_dec;    // [D]
  int64_t d_sae, d_in;
  bool exact;
};

// The tokens of one block.
struct Tokens {
  const float* x;   // [N, D]
  void* rounded_x;  // [N, D]: x - b_dec in the type of the encoder's rounded rows
  int64_t rows;     // N
};

struct TopK {
  const bool* dead_mask;  // [F] or null
  int64_t k, k_aux;       // 0: no such list
  float* values;          // [N, k]
  int32_t* indices;       // [N, k]
  float* aux_values;      // [N, k_aux]
  int32_t* aux_indices;   // [N, k_aux]
};

// A chunk of the product, [N, columns], of the latents from first_latent on. first_latent is a
// multiple of kSegment (kernels/common/encode_plan.h).
struct Product {
  const float* values;
  int64_t first_latent, columns;
};

// Device memory that the fallback may use once the product is no longer needed.
struct Memory {
  void* data;
  int64_t bytes;
};

// rounded = W in a 16-bit type; stats as in Encoder.
cudaError_t pack_encoder(const float* W_enc,  // [F, D]
                         int64_t d_sae, int64_t d_in, void* rounded, DType rounded_type,
                         float* stats,  // [2, F]
                         cudaStream_t stream);

// ---- top-k

// Sets `streams` to whether lists of k and of k_aux candidates fit the device; if not, use
// exact_topk.
cudaError_t topk_streams(int64_t k, int64_t k_aux, bool* streams);
int64_t topk_row_bytes(int64_t k, int64_t k_aux);
size_t topk_scratch_bytes(int64_t rows, int64_t d_sae, int64_t k, int64_t k_aux);

cudaError_t begin_topk(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                       void* scratch, cudaStream_t stream);
cudaError_t select_topk(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                        const Product& product, void* scratch, cudaStream_t stream);
// `memory` holds at least exact_bytes for one row.
cudaError_t finish_topk(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                        Memory memory, void* scratch, cudaStream_t stream);

// Computes every dot product in turn, for any k, without a product. tokens.rounded_x is not used;
// `memory` as for finish_topk.
int64_t exact_bytes(int64_t d_sae, int64_t k, int64_t k_aux);
cudaError_t exact_topk(const Encoder& encoder, const Tokens& tokens, const TopK& topk,
                       Memory memory, cudaStream_t stream);

// ---- thresholds

// Candidates of the rows, by ascending index: row n has room for entries offsets[n] ..
// offsets[n + 1], or for `capacity` from n * capacity on where offsets is null. counts says how
// many it has, even where that is more than it has room for.
struct CandidateRows {
  float* values;
  int32_t* indices;
  const int64_t* offsets;  // [N + 1] or null
  int64_t capacity;
  int64_t* counts;  // [N + 1]
};

size_t threshold_scratch_bytes(int64_t rows, int64_t d_sae);
cudaError_t begin_threshold(const Encoder& encoder, const Tokens& tokens, CandidateRows candidates,
                            void* scratch, cudaStream_t stream);
cudaError_t select_threshold(const Encoder& encoder, const Tokens& tokens,
                             const float* threshold,  // [F]
                             const Product& product, CandidateRows candidates, void* scratch,
                             cudaStream_t stream);
// Leaves in the list of every row what really passes, and in `kept` how many. A row that had more
// candidates than room keeps none; most[0] is then the largest such count, and otherwise 0.
cudaError_t finish_threshold(const Encoder& encoder, const Tokens& tokens, const float* threshold,
                             CandidateRows candidates,
                             int64_t* kept,  // [N]
                             int64_t* most,  // []
                             cudaStream_t stream);

// offsets[n] = sum of counts before row n.
cudaError_t count_offsets(const int64_t* counts,  // [N]
                          int64_t rows,
                          int64_t* offsets,  // [N + 1]
                          cudaStream_t stream);
// Row n of the lists to entries offsets[n] .. offsets[n + 1] of a flat code.
cudaError_t gather_code(CandidateRows candidates, int64_t rows, const int64_t* offsets,
                        float* values, int32_t* indices, cudaStream_t stream);

}  // namespace sae_fast::cuda
