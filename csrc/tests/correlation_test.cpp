// Correlations between latents' activations, on one thread and on four, against all pairs in
// double.
#include "tests/correlation_problem.h"

namespace sae_fast::testing {
namespace {

struct Outputs {
  CorrelationResult result;
  std::vector<double> means;
  std::vector<float> inverse_norms, gram;
};

Outputs correlate(const CorrelationProblem& p, const float* grad_within, const float* grad_between,
                  const cpu::Parallel& parallel) {
  const cpu::GroupedCodes codes{p.h.data(), p.N, p.F, p.split};
  Outputs outputs;
  outputs.means.assign(static_cast<size_t>(p.F), 777.0);
  outputs.inverse_norms.assign(static_cast<size_t>(p.F), 777.0f);
  outputs.gram.assign(static_cast<size_t>(p.groups() * p.N * p.N), 777.0f);
  outputs.result.grad_h.assign(p.h.size(), 777.0f);
  cpu::Correlation correlation{outputs.means.data(), outputs.inverse_norms.data(),
                               outputs.gram.data(), outputs.result.n_active};
  check(cpu::kernels().code_correlation(codes, correlation, parallel),
        "code_correlation: out of memory");
  outputs.result.within = correlation.within;
  outputs.result.between = correlation.between;
  const cpu::CorrelationGradient gradient{
      codes,       outputs.means.data(), outputs.inverse_norms.data(), outputs.gram.data(),
      grad_within, grad_between};
  check(cpu::kernels().code_correlation_backward(gradient, outputs.result.grad_h.data(), parallel),
        "code_correlation_backward: out of memory");
  return outputs;
}

}  // namespace

void test_correlation(uint64_t seed) {
  Random random(seed);
  const CorrelationProblem problem(random, seed % 10 == 0, 150);
  const float of_within = random.number(Numbers::kNormal);
  const float of_between = random.number(Numbers::kNormal);
  const int64_t which = random.integer(0, 3);
  const float* grad_within = (which & 1) != 0 ? &of_within : nullptr;
  const float* grad_between = (which & 2) != 0 ? &of_between : nullptr;
  const Outputs one = correlate(problem, grad_within, grad_between, one_thread());
  const Outputs four = correlate(problem, grad_within, grad_between, four_threads());
  check(one.result.within == four.result.within && one.result.between == four.result.between &&
            same_bits(one.means, four.means) && same_bits(one.inverse_norms, four.inverse_norms) &&
            same_bits(one.gram, four.gram) && same_bits(one.result.grad_h, four.result.grad_h),
        "correlations depend on the number of threads");
  check_correlation(problem, one.result, grad_within != nullptr ? *grad_within : 0.0,
                    grad_between != nullptr ? *grad_between : 0.0, 2e-6);
}

}  // namespace sae_fast::testing
