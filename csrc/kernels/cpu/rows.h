// Row kernels: gradients of weight rows from a code's factors, and the optimiser's one pass.
#pragma once

#include <cstdint>

#include "kernels/common/moments.h"
#include "kernels/common/update_rule.h"
#include "kernels/cpu/decode.h"

namespace sae_fast::cpu {

// A code seen latent by latent: entries [offsets[j], offsets[j + 1]) of latent j, by ascending
// token.
struct LatentMajor {
  const int64_t* offsets;     // [d_sae + 1]
  const int32_t* rows;        // token of each entry
  const float* coefficients;  // of each entry
  int64_t d_sae;
};

// The other factor of a gradient: row j = sum of coefficient * (dense[row] - shift).
struct DenseFactor {
  Rows type;
  const void* dense;   // [tokens][d_in]
  const float* shift;  // [d_in] or null
  int64_t tokens, d_in;
};

// rows [d_sae][d_in] and sums [d_sae]; sums = sum of coefficients.
using AccumulateRows = bool (*)(const LatentMajor&, const DenseFactor&, float* rows, float* sums,
                                const Parallel&);

// Gradient rows that were worth keeping between the norm and the update: those with long lists.
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

// Sum over pairs of squared cosines between rows of W, and its gradient [d_sae][d_in].
using Decorrelation = bool (*)(const float* W, int64_t d_sae, int64_t d_in, double* loss,
                               float* grad, const Parallel&);

// Entries whose value is not 0 (a NaN is not).
int64_t count_active(const Code& code, int64_t entries);
// Counting sort of those entries: offsets [d_sae + 1], and the flat position and the token of each.
void sort_by_latent(const Code& code, int64_t d_sae, int64_t* offsets, int32_t* entries,
                    int32_t* rows, const Parallel& parallel);
// Whether all of them are in [0, bound).
bool in_range(const int32_t* numbers, int64_t count, int64_t bound, const Parallel& parallel);
// to[i] = source[entries[i]]
void gather_entries(const float* source, const int32_t* entries, int64_t count, float* to,
                    const Parallel& parallel);
// sums[j] of source[entries[p]] over the entries p of latent j, in their order.
void latent_sums(const int64_t* offsets, int64_t d_sae, const int32_t* entries, const float* source,
                 float* sums, const Parallel& parallel);
// Fills slots [d_sae] for at most `budget` latents with the longest lists; returns how many.
int64_t plan_cache(const int64_t* offsets, int64_t d_sae, int64_t budget, int32_t* slots);

}  // namespace sae_fast::cpu
