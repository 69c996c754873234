// This instruction set's decoder kernels; dispatch.cpp lists them.
#pragma once

#include "kernels/cpu/decode.h"

namespace sae_fast::SAE_FAST_ISA {

bool decode(const cpu::Code& code, const cpu::Decoder& decoder, float* x_hat,
            const cpu::Parallel& parallel);
bool decode_backward(const cpu::Code& code, const cpu::Decoder& decoder, const float* grad,
                     float* grad_values, const cpu::Parallel& parallel);
bool reconstruct(const cpu::Code& code, const cpu::Decoder& decoder,
                 const cpu::Reconstruction& reconstruction, const cpu::Parallel& parallel);

}  // namespace sae_fast::SAE_FAST_ISA
