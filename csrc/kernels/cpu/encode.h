// Encoder kernels: pack the encoder's rows, and select the latents of each token.
#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/cpu/parallel.h"

namespace sae_fast::cpu {

// The product that finds the candidates. kNarrow has operands of two bytes: bfloat16 tiles at level
// amx, 16-bit integers at all other levels.
enum class Screen { kNarrow, kFloat };

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
  DType type;          // of the rows that score: W_enc, or `rounded` if it is not float32
  void* packed;        // packed_elements() elements of 4 bytes, laid out as the product reads them
  float* stats;        // [4][panels * 64]; the last row is kept free
  const float* W_enc;  // [d_sae][d_in]
  void* rounded;       // [d_sae][d_in] bfloat16 or float16; null for float32
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

// Receives the rows of a threshold code, whose sizes are unknown until they are scored.
class ThresholdSink {
 public:
  virtual ~ThresholdSink() = default;
  // Takes the entries of one token by ascending index. Called from any thread, once for each token;
  // returns false if memory ran out.
  virtual bool row(int64_t token, const float* values, const int32_t* indices, int64_t count) = 0;
};

// Each returns false if scratch memory could not be allocated; the outputs are then unspecified.
using PackEncoder = bool (*)(const PackedEncoder&, const Parallel&);
using EncodeTopK = bool (*)(const TopKProblem&, const Parallel&);
// The tokens * k best of the batch as CSR: values and indices [tokens * k], offsets [tokens + 1].
using EncodeBatchTopK = bool (*)(const TopKProblem&, int64_t* offsets, const Parallel&);
using EncodeThreshold = bool (*)(const ThresholdProblem&, ThresholdSink&, const Parallel&);
// The product of encode_topk alone, without bounds, selection or scores, for benchmarks.
using EncoderProduct = bool (*)(const TopKProblem&, const Parallel&);

}  // namespace sae_fast::cpu
