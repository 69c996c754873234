// This instruction set's kernels, each of the type that the table has for it.
#pragma once

#include <type_traits>

#include "kernels/cpu/kernels.h"

namespace sae_fast::SAE_FAST_ISA {

template <class Pointer>
using Kernel = std::remove_pointer_t<Pointer>;

Kernel<cpu::PackEncoder> pack_encoder;
Kernel<cpu::EncodeTopK> encode_topk;
Kernel<cpu::EncodeBatchTopK> encode_batch_topk;
Kernel<cpu::EncodeThreshold> encode_threshold;
Kernel<cpu::EncoderProduct> encoder_product;
Kernel<cpu::Decode> decode;
Kernel<cpu::DecodeBackward> decode_backward;
Kernel<cpu::Reconstruct> reconstruct;
Kernel<cpu::AccumulateRows> accumulate_rows;
Kernel<cpu::GradientNorm> gradient_norm;
Kernel<cpu::FusedUpdate> fused_update;
Kernel<cpu::UpdateVector> update_vector;
Kernel<cpu::NormalizeRows> normalize_rows;
Kernel<cpu::GatherRows> gather_rows;
Kernel<cpu::Decorrelation> decorrelation;
Kernel<cpu::DenseProduct> dense_product;
Kernel<cpu::FinishProduct> finish_product;
Kernel<cpu::CodeCorrelation> code_correlation;
Kernel<cpu::CodeCorrelationBackward> code_correlation_backward;

}  // namespace sae_fast::SAE_FAST_ISA
