// The table of kernels that every instruction set fills.
#pragma once

#include "kernels/cpu/decode.h"
#include "kernels/cpu/dense_product.h"
#include "kernels/cpu/encode.h"
#include "kernels/cpu/gather_rows.h"
#include "kernels/cpu/penalties.h"
#include "kernels/cpu/update.h"

namespace sae_fast::cpu {

struct Kernels {
  const char* instruction_set;
  PackEncoder pack_encoder;
  EncodeTopK encode_topk;
  EncodeBatchTopK encode_batch_topk;
  EncodeThreshold encode_threshold;
  EncoderProduct encoder_product;
  Decode decode;
  DecodeBackward decode_backward;
  Reconstruct reconstruct;
  AccumulateRows accumulate_rows;
  GradientNorm gradient_norm;
  FusedUpdate fused_update;
  UpdateVector update_vector;
  NormalizeRows normalize_rows;
  GatherRows gather_rows;
  Decorrelation decorrelation;
  DenseProduct dense_product;
  FinishProduct finish_product;
  CodeCorrelation code_correlation;
  CodeCorrelationBackward code_correlation_backward;
};

}  // namespace sae_fast::cpu
