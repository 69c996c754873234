// CUDA side of dense_product: torch's product.
#include <torch/csrc/stable/library.h>

#include <array>

#include "ops/cuda.h"
#include "ops/dense_product.h"

namespace sae_fast::ops {
namespace {

Tensor relu_by_torch(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::relu", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor dense_product_cuda(const Tensor& left, const Tensor& right, const OptionalTensor& bias,
                          bool relu, const std::string& precision) {
  constexpr const char* kOp = "dense_product";
  check_dense_product(kOp, left, right, bias, precision);
  check_same_device(kOp, {{"left", left}, {"right", right}, {"bias", bias}});
  const DeviceGuard guard(left.get_device_index());
  Tensor product = product_by_torch(left, right, precision);
  if (bias.has_value()) product = torch::stable::subtract(product, *bias, -1.0);
  return relu ? relu_by_torch(product) : product;
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("dense_product", TORCH_BOX(&sae_fast::ops::dense_product_cuda));
}
