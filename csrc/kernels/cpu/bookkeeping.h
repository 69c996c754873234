// The work of a training step beside the passes over the weights: statistics of a batch, sums over
// rows, and the counters at its end. Compiled once: memory is the limit, or there is little to do.
#pragma once

#include <cstdint>

#include "kernels/common/bookkeeping.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/parallel.h"

namespace sae_fast::cpu {

// Returns the sum of (x - mean(x))^2 over x [rows][d_in], the mean taken by column; false: no
// memory.
bool total_variance(const float* x, int64_t rows, int64_t d_in, double* variance,
                    const Parallel& parallel);
// fired [d_sae]: whether a latent has an entry that is above 0, or with `is_signed` not 0 and no
// NaN; returns the number of such entries.
int64_t mark_fired(const float* values, const int32_t* indices, int64_t entries, bool is_signed,
                   int64_t d_sae, bool* fired);
// Sum of the numbers, and of their squares, in an order that depends on `count` alone.
double sum_of(const float* numbers, int64_t count);
double square_sum(const float* numbers, int64_t count);

void code_gradients(const CodeGradients& gradients, const Parallel& parallel);

// Partial sums over rows, for any number of threads: a fixed number, so that the order is too.
constexpr int64_t kRowParts = 64;
// sum [d_in] = factor times the sum of partials [kRowParts, d_in].
void sum_row_parts(const float* partials, int64_t d_in, float factor, float* sum);

// tokens[j] becomes 0 where latent j has fired, else grows by n_tokens.
void count_silent(int64_t* tokens, const bool* fired, int64_t d_sae, int64_t n_tokens);

}  // namespace sae_fast::cpu
