// Checks of the encoder ops' arguments, shared by all back ends.
#pragma once

#include <string>

#include "ops/check.h"

namespace sae_fast::ops {

// Latents are numbered in int32.
inline void check_latents(const char* op, const Tensor& W_enc) {
  SAE_FAST_CHECK(W_enc.size(0) <= INT32_MAX, op, ": d_sae must be at most ", INT32_MAX, ", got ",
                 W_enc.size(0));
}

inline void check_precision(const char* op, const std::string& precision) {
  SAE_FAST_CHECK(
      precision == "screened" || precision == "fp32" || precision == "bf16" || precision == "fp16",
      op, ": precision must be screened, fp32, bf16 or fp16, got ", precision);
}

// The arguments that all encoders have.
inline void check_encoder(const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& b_enc,
                          const Tensor& b_dec, const std::string& precision) {
  check_float(op, "x", x, {kAnySize, kAnySize});
  check_float(op, "W_enc", W_enc, {kAnySize, x.size(1)});
  check_float(op, "b_enc", b_enc, {W_enc.size(0)});
  check_float(op, "b_dec", b_dec, {x.size(1)});
  check_latents(op, W_enc);
  SAE_FAST_CHECK(x.size(0) <= INT32_MAX, op, ": x must have at most ", INT32_MAX, " rows, got ",
                 x.size(0));
  check_precision(op, precision);
}

// The further arguments of encode_topk and encode_batch_topk.
inline void check_selection(const char* op, int64_t d_sae, int64_t k,
                            const OptionalTensor& dead_mask, int64_t k_aux) {
  SAE_FAST_CHECK(k >= 1 && k <= d_sae, op, ": k must be in [1, d_sae], got k=", k,
                 " with d_sae=", d_sae);
  SAE_FAST_CHECK(k_aux >= 0 && k_aux <= d_sae, op,
                 ": k_aux must be in [0, d_sae], got k_aux=", k_aux, " with d_sae=", d_sae);
  SAE_FAST_CHECK(dead_mask.has_value() || k_aux == 0, op,
                 ": k_aux must be 0 without a dead_mask, got k_aux=", k_aux);
  if (!dead_mask.has_value()) return;
  check_shape(op, "dead_mask", *dead_mask, {d_sae});
  check_dtype(op, "dead_mask", *dead_mask, ScalarType::Bool);
}

}  // namespace sae_fast::ops
