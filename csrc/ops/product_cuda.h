// Matrix products of 16-bit factors with a float32 result, which torch's library does in tensor
// cores.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

#include "ops/check.h"

namespace sae_fast::ops {

inline void call_product(const char* op, const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(ScalarType::Float),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over what the call returned: out
}

// out = a b; a and b float16 or bfloat16 with any strides, out float32 and contiguous.
inline void product_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  call_product("aten::mm", out, a, b);
}

// out[i] = a[i] b[i] for several products: out [n, *, *].
inline void products_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  call_product("aten::bmm", out, a, b);
}

}  // namespace sae_fast::ops
