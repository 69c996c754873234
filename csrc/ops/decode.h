// Checks of the decoder ops' arguments, shared by all back ends.
#pragma once

#include "ops/check.h"

namespace sae_fast::ops {

inline void check_decoder(const char* op, const Tensor& W_dec, const OptionalTensor& b_dec) {
  check_shape(op, "W_dec", W_dec, {kAnySize, kAnySize});
  check_floating(op, "W_dec", W_dec);
  if (b_dec.has_value()) check_float(op, "b_dec", *b_dec, {W_dec.size(1)});
}

}  // namespace sae_fast::ops
