// This instruction set's product of dense matrices; dispatch.cpp lists it.
#pragma once

#include "kernels/cpu/dense_product.h"

namespace sae_fast::SAE_FAST_ISA {

cpu::DenseResult dense_product(const cpu::DenseProblem& problem, const cpu::Parallel& parallel);
void finish_product(const cpu::DenseProblem& problem, const cpu::Parallel& parallel);

}  // namespace sae_fast::SAE_FAST_ISA
