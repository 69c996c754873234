// CPU side of the decorrelation penalty: check, allocate, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/cpu.h"

namespace sae_fast::ops {
namespace {

std::tuple<Tensor, Tensor> decorrelation(const Tensor& W) {
  constexpr const char* kOp = "decorrelation";
  check_float(kOp, "W", W, {kAnySize, kAnySize});
  const Input rows(W);
  const Tensor grad = torch::stable::new_empty(W, W.sizes());
  const Tensor loss = torch::stable::new_empty(W, {});
  double total = 0.0;
  if (W.numel() == 0) {
    *mutable_data<float>(loss) = 0.0f;
    return {loss, grad};
  }
  check_memory(kOp, cpu::kernels().decorrelation(rows.data<float>(), W.size(0), W.size(1), &total,
                                                 mutable_data<float>(grad), parallel()));
  *mutable_data<float>(loss) = static_cast<float>(total);
  return {loss, grad};
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CPU, m) {
  SAE_FAST_IMPL(m, "decorrelation", &sae_fast::ops::decorrelation);
}
