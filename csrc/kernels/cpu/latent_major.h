// A code seen latent by latent, and what is read through this view. Compiled once: vector
// instructions would not make it faster.
#pragma once

#include <cstdint>

#include "kernels/cpu/decode.h"
#include "kernels/cpu/parallel.h"

namespace sae_fast::cpu {

// Entries [offsets[j], offsets[j + 1]) belong to latent j, by ascending token.
struct LatentMajor {
  const int64_t* offsets;     // [d_sae + 1]
  const int32_t* rows;        // token of each entry
  const float* coefficients;  // of each entry
  int64_t d_sae;
};

// Counts the entries whose value is not 0; NaN is not 0.
int64_t count_active(const Code& code, int64_t entries);
// Sorts these entries by latent: offsets [d_sae + 1], and the flat position and the token of each.
void sort_by_latent(const Code& code, int64_t d_sae, int64_t* offsets, int32_t* entries,
                    int32_t* rows, const Parallel& parallel);
// Returns true if all numbers are in [0, bound).
bool in_range(const int32_t* numbers, int64_t count, int64_t bound, const Parallel& parallel);
// to[i] = source[entries[i]]
void gather_entries(const float* source, const int32_t* entries, int64_t count, float* to,
                    const Parallel& parallel);
// sums[j] = sum of source[entries[p]] over the entries p of latent j, in their order.
void latent_sums(const int64_t* offsets, int64_t d_sae, const int32_t* entries, const float* source,
                 float* sums, const Parallel& parallel);
// Fills slots [d_sae] for at most `budget` latents with the longest lists; returns how many.
int64_t plan_cache(const int64_t* offsets, int64_t d_sae, int64_t budget, int32_t* slots);

}  // namespace sae_fast::cpu
