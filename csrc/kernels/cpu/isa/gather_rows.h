// This instruction set's gather of whole rows; dispatch.cpp lists it.
#pragma once

#include "kernels/cpu/gather_rows.h"

namespace sae_fast::SAE_FAST_ISA {

void gather_rows(const cpu::RowGather& gather, const cpu::Parallel& parallel);

}  // namespace sae_fast::SAE_FAST_ISA
