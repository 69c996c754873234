// Encoder kernels: pack the encoder's rows, and select the latents of each token.
#pragma once

#include <cstdint>

#include "kernels/cpu/parallel.h"

namespace sae_fast::cpu {

// Which product finds the candidates, and which rows score them. kNarrow takes operands of two
// bytes: bfloat16 tiles at level amx, 16-bit integers at all other levels.
enum class Screen { kNarrow, kFloat };
enum class Rows { kFloat, kBFloat16, kFloat16 };

constexpr int64_t kPanelLatents = 64;

inline int64_t panels(int64_t d_sae) { return (d_sae + kPanelLatents - 1) / kPanelLatents; }

// Elements of 4 bytes that a latent takes in a panel: pairs of columns or floats. Pairs of whole
// tiles of 32 columns, on every instruction set alike.
inline int64_t packed_steps(Screen screen, int64_t d_in) {
  return screen == Screen::kNarrow ? (d_in + 31) / 32 * 16 : d_in;
}

// Elements of the packed encoder, panel after panel.
inline int64_t packed_elements(Screen screen, int64_t d_in, int64_t d_sae) {
  return panels(d_sae) * kPanelLatents * packed_steps(screen, d_in);
}

// The encoder as the product reads it. Row j of stats: scale, bound on |w|, bound on |w - packed|.
struct PackedEncoder {
  Screen screen;
  Rows rows;
  void* packed;        // packed_elements() elements of 4 bytes, laid out as the product reads them
  float* stats;        // [4][panels * 64]; the last row is kept free
  const float* W_enc;  // [d_sae][d_in]
  void* rounded;       // [d_sae][d_in] bfloat16 or float16; null for Rows::kFloat
  int64_t d_sae, d_in;
};

struct TopKProblem {
  PackedEncoder encoder;
  const float* x;         // [tokens][d_in]
  const float* b_enc;     // [d_sae]
  const float* b_dec;     // [d_in]
  const bool* dead_mask;  // [d_sae] or null
  int64_t tokens, k, k_aux;
  float* values;         // [tokens][k]
  int32_t* indices;      // [tokens][k]
  float* aux_values;     // [tokens][k_aux]
  int32_t* aux_indices;  // [tokens][k_aux]
};

struct ThresholdProblem {
  PackedEncoder encoder;
  const float* x;          // [tokens][d_in]
  const float* b_enc;      // [d_sae]
  const float* b_dec;      // [d_in]
  const float* threshold;  // [d_sae]
  int64_t tokens;
};

// Entries of a threshold code, of which there is no saying how many before they are found.
class ThresholdSink {
 public:
  virtual ~ThresholdSink() = default;
  // Called from any thread, once a row: its entries by ascending index. Returns false where memory
  // ran out.
  virtual bool row(int64_t token, const float* values, const int32_t* indices, int64_t count) = 0;
};

// Each returns false where scratch memory is not to be had, and then has written nothing useful.
using PackEncoder = bool (*)(const PackedEncoder&, const Parallel&);
using EncodeTopK = bool (*)(const TopKProblem&, const Parallel&);
// The tokens * k best of the batch as CSR: values and indices [tokens * k], offsets [tokens + 1].
using EncodeBatchTopK = bool (*)(const TopKProblem&, int64_t* offsets, const Parallel&);
using EncodeThreshold = bool (*)(const ThresholdProblem&, ThresholdSink&, const Parallel&);
// The bare product of encode_topk, without bounds, selection or scores: what benchmarks compare to.
using EncoderProduct = bool (*)(const TopKProblem&, const Parallel&);

}  // namespace sae_fast::cpu
