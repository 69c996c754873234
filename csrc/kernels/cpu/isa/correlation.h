// This instruction set's kernels of correlation.h.
#pragma once

#include "kernels/cpu/correlation.h"

namespace sae_fast::SAE_FAST_ISA {

bool code_correlation(const cpu::GroupedCodes& codes, cpu::Correlation& result,
                      const cpu::Parallel& parallel);
bool code_correlation_backward(const cpu::CorrelationGradient& gradient, float* grad_h,
                               const cpu::Parallel& parallel);

}  // namespace sae_fast::SAE_FAST_ISA
