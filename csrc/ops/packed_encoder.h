// The packed encoder of the CPU at the boundary to torch, for the encoder ops and fused_update_.
#pragma once

#include <string>
#include <tuple>

#include "kernels/cpu/encode.h"
#include "ops/check.h"

namespace sae_fast::ops {

// Checks that `rounded` has the dtype of a precision that rounds.
void check_rounded_dtype(const char* op, const std::string& precision, const Tensor& rounded);

// Checks tensors that pack_encoder made for a W_enc of this shape.
void check_packed(const char* op, const Tensor& W_enc, const std::string& precision,
                  const Tensor& packed, const Tensor& stats, const Tensor& rounded);

// The pointers of these tensors. The caller sets W_enc's, and keeps the contiguous copy.
cpu::PackedEncoder packed_encoder(const Tensor& W_enc, const std::string& precision,
                                  const Tensor& packed, const Tensor& stats, const Tensor& rounded);

std::tuple<Tensor, Tensor, Tensor> pack_encoder(const Tensor& W_enc, const std::string& precision);

}  // namespace sae_fast::ops
