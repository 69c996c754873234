// This instruction set's encoder kernels; dispatch.cpp lists them.
#pragma once

#include "kernels/cpu/encode.h"

namespace sae_fast::SAE_FAST_ISA {

bool pack_encoder(const cpu::PackedEncoder& encoder, const cpu::Parallel& parallel);
bool encode_topk(const cpu::TopKProblem& problem, const cpu::Parallel& parallel);
bool encode_batch_topk(const cpu::TopKProblem& problem, int64_t* offsets,
                       const cpu::Parallel& parallel);
bool encoder_product(const cpu::TopKProblem& problem, const cpu::Parallel& parallel);
bool encode_threshold(const cpu::ThresholdProblem& problem, cpu::ThresholdSink& sink,
                      const cpu::Parallel& parallel);

}  // namespace sae_fast::SAE_FAST_ISA
