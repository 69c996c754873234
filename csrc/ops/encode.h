// The packed encoder at the boundary to torch, for the encoder ops and for fused_update_.
#pragma once

#include <string>
#include <tuple>

#include "kernels/cpu/encode.h"
#include "ops/check.h"

namespace sae_fast::ops {

void check_precision(const char* op, const std::string& precision);

// The arguments that all encoders share, and those of encode_topk and encode_batch_topk.
void check_encoder(const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& b_enc,
                   const Tensor& b_dec, const std::string& precision);
void check_selection(const char* op, int64_t d_sae, int64_t k, const OptionalTensor& dead_mask,
                     int64_t k_aux);

// The dtype of `rounded` for a precision that rounds.
void check_rounded_dtype(const char* op, const std::string& precision, const Tensor& rounded);

// Checks tensors that pack_encoder made for a W_enc of this shape.
void check_packed(const char* op, const Tensor& W_enc, const std::string& precision,
                  const Tensor& packed, const Tensor& stats, const Tensor& rounded);

// Their pointers; W_enc's own is left to the caller, who keeps the contiguous copy.
cpu::PackedEncoder packed_encoder(const Tensor& W_enc, const std::string& precision,
                                  const Tensor& packed, const Tensor& stats, const Tensor& rounded);

std::tuple<Tensor, Tensor, Tensor> pack_encoder(const Tensor& W_enc, const std::string& precision);

}  // namespace sae_fast::ops
