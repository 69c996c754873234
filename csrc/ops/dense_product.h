// Checks of dense_product, shared by both back ends, and torch's product, which either may use.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>

#include "ops/check.h"
#include "ops/encode.h"

namespace sae_fast::ops {

inline void check_dense_product(const char* op, const Tensor& left, const Tensor& right,
                                const OptionalTensor& bias, const std::string& precision) {
  check_float(op, "left", left, {kAnySize, kAnySize});
  check_float(op, "right", right, {left.size(1), kAnySize});
  if (bias.has_value()) check_float(op, "bias", *bias, {right.size(1)});
  check_precision(op, precision);
}

// `tensor` with numbers of the dtype that the precision rounds to.
inline Tensor rounded_operand(const Tensor& tensor, const std::string& precision) {
  if (precision != "bf16" && precision != "fp16") return tensor;
  const ScalarType type = precision == "bf16" ? ScalarType::BFloat16 : ScalarType::Half;
  return torch::stable::to(torch::stable::to(tensor, type), ScalarType::Float);
}

inline Tensor product_by_torch(const Tensor& left, const Tensor& right,
                               const std::string& precision) {
  return torch::stable::matmul(rounded_operand(left, precision), rounded_operand(right, precision));
}

}  // namespace sae_fast::ops
