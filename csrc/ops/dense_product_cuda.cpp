// CUDA side of dense_product: torch's product.
#include <torch/csrc/stable/library.h>

#include "ops/cuda.h"
#include "ops/dense_product.h"

namespace sae_fast::ops {
namespace {

Tensor dense_product_cuda(const Tensor& left, const Tensor& right, const std::string& precision) {
  constexpr const char* kOp = "dense_product";
  check_dense_product(kOp, left, right, precision);
  check_same_device(kOp, {{"left", left}, {"right", right}});
  const DeviceGuard guard(left.get_device_index());
  return product_by_torch(left, right, precision);
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("dense_product", TORCH_BOX(&sae_fast::ops::dense_product_cuda));
}
