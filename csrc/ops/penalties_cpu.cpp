// CPU side of the penalties: check, allocate, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/cpu.h"
#include "ops/penalties.h"

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

using Correlations = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Correlations code_correlation(const Tensor& h, int64_t split) {
  constexpr const char* kOp = "code_correlation";
  check_groups(kOp, h, split);
  const Input codes(h);
  const int64_t N = h.size(0);
  const Tensor within = torch::stable::new_empty(h, {});
  const Tensor between = torch::stable::new_empty(h, {});
  const Tensor n_active = torch::stable::new_empty(h, {2}, ScalarType::Long);
  const Tensor means = torch::stable::new_empty(h, {h.size(1)}, ScalarType::Double);
  const Tensor inverse_norms = torch::stable::new_empty(h, {h.size(1)});
  const Tensor gram = torch::stable::new_empty(h, {gram_matrices(h, split), N, N});
  cpu::Correlation result{mutable_data<double>(means), mutable_data<float>(inverse_norms),
                          mutable_data<float>(gram), mutable_data<int64_t>(n_active)};
  check_memory(kOp, cpu::kernels().code_correlation({codes.data<float>(), N, h.size(1), split},
                                                    result, parallel()));
  *mutable_data<float>(within) = static_cast<float>(result.within);
  *mutable_data<float>(between) = static_cast<float>(result.between);
  return {within, between, n_active, means, inverse_norms, gram};
}

Tensor code_correlation_backward(const OptionalTensor& grad_within,
                                 const OptionalTensor& grad_between, const Tensor& h, int64_t split,
                                 const Tensor& means, const Tensor& inverse_norms,
                                 const Tensor& gram) {
  constexpr const char* kOp = "code_correlation_backward";
  check_correlation(kOp, grad_within, grad_between, h, split, means, inverse_norms, gram);
  const Input codes(h), all_means(means), inverse(inverse_norms), matrices(gram);
  const Input of_within(grad_within), of_between(grad_between);
  const Tensor grad_h = torch::stable::new_empty(h, h.sizes());
  const cpu::CorrelationGradient gradient{{codes.data<float>(), h.size(0), h.size(1), split},
                                          all_means.data<double>(),
                                          inverse.data<float>(),
                                          matrices.data<float>(),
                                          of_within.data<float>(),
                                          of_between.data<float>()};
  check_memory(kOp, cpu::kernels().code_correlation_backward(gradient, mutable_data<float>(grad_h),
                                                             parallel()));
  return grad_h;
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CPU, m) {
  SAE_FAST_IMPL(m, "decorrelation", &sae_fast::ops::decorrelation);
  SAE_FAST_IMPL(m, "code_correlation", &sae_fast::ops::code_correlation);
  SAE_FAST_IMPL(m, "code_correlation_backward", &sae_fast::ops::code_correlation_backward);
}
