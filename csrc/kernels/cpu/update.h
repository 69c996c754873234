// The gradients of weight rows, from their factors, and the optimizer's update in one pass.
#pragma once

#include <cstdint>

#include "kernels/common/moments.h"
#include "kernels/common/update_rule.h"
#include "kernels/cpu/encode.h"
#include "kernels/cpu/latent_major.h"

namespace sae_fast::cpu {

// The other factor of a gradient: row j = sum of coefficient * (dense[row] - shift).
struct DenseFactor {
  DType type;
  const void* dense;   // [tokens][d_in]
  const float* shift;  // [d_in] or null
  int64_t tokens, d_in;
};

// rows [d_sae][d_in] and sums [d_sae]; sums = sum of coefficients.
using AccumulateRows = bool (*)(const LatentMajor&, const DenseFactor&, float* rows, float* sums,
                                const Parallel&);

// Gradient rows kept between the norm and the update: rows with long lists.
struct RowCache {
  float* rows;     // [kept][d_in]
  int32_t* slots;  // [d_sae]: row of the cache, or -1
};
struct GradientTerms {
  LatentMajor lists;
  DenseFactor factor;
  const float* extra_grad;    // [d_sae][d_in] or null
  const float* project_onto;  // [d_sae][d_in] or null: remove the part along this unit row
  // Columns in which all of dense equals the shift. The sum is 0 there, where the difference of two
  // sums leaves a rounding error, of which a rule by signs makes a whole step. Found by the
  // kernels.
  const int32_t* still_columns;
  int64_t still_count;
};
// squared_norm of the whole gradient; sums [d_sae] of the coefficients.
using GradientNorm = bool (*)(const GradientTerms&, const RowCache&, float* sums,
                              double* squared_norm, const Parallel&);

struct RowUpdate {
  GradientTerms gradient;
  RowCache cache;
  UpdateRule rule;
  UpdateScalars scalars;
  bool unit_norm;
  float* W;         // [d_sae][d_in]
  Moments moments;  // of W
  // Low-precision copies to refresh: encoder.packed may be null, encoder.rounded too.
  PackedEncoder encoder;
};
using FusedUpdate = bool (*)(const RowUpdate&, const Parallel&);

// A parameter with a dense gradient; grad null stands for zeros.
struct VectorUpdate {
  UpdateRule rule;
  const UpdateScalars* scalars;
  const float* grad;
  float* w;
  float* exp_avg;
  float* exp_avg_sq;  // null where the rule has none
  int64_t size;
};
using UpdateVector = void (*)(const VectorUpdate&, const Parallel&);

using NormalizeRows = bool (*)(float* W, int64_t d_sae, int64_t d_in, const Parallel&);

}  // namespace sae_fast::cpu
