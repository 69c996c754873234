// This instruction set's row kernels; dispatch.cpp lists them.
#pragma once

#include "kernels/cpu/rows.h"

namespace sae_fast::SAE_FAST_ISA {

bool accumulate_rows(const cpu::LatentMajor& lists, const cpu::DenseFactor& factor, float* rows,
                     float* sums, const cpu::Parallel& parallel);
bool gradient_norm(const cpu::GradientTerms& terms, const cpu::RowCache& cache, float* sums,
                   double* squared_norm, const cpu::Parallel& parallel);
bool fused_update(const cpu::RowUpdate& update, const cpu::Parallel& parallel);
void update_vector(const cpu::VectorUpdate& update, const cpu::Parallel& parallel);
bool normalize_rows(float* W, int64_t d_sae, int64_t d_in, const cpu::Parallel& parallel);
bool decorrelation(const float* W, int64_t d_sae, int64_t d_in, double* loss, float* grad,
                   const cpu::Parallel& parallel);

}  // namespace sae_fast::SAE_FAST_ISA
