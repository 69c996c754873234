// Pieces of ops that nothing but a benchmark calls, in a namespace of their own.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "ops/cpu.h"
#include "ops/encode.h"
#include "ops/packed_encoder.h"

namespace sae_fast::ops {
namespace {

// The product inside encode_topk alone: same blocks, same panels, nothing selected.
void encoder_product(const Tensor& x, const Tensor& W_enc, const std::string& precision,
                     const Tensor& packed, const Tensor& stats, const Tensor& rounded) {
  constexpr const char* kOp = "encoder_product";
  check_float(kOp, "x", x, {kAnySize, kAnySize});
  check_float(kOp, "W_enc", W_enc, {kAnySize, x.size(1)});
  check_precision(kOp, precision);
  check_packed(kOp, W_enc, precision, packed, stats, rounded);
  const Tensor zeros = torch::stable::new_zeros(x, {std::max(W_enc.size(0), W_enc.size(1))});
  const Input rows(W_enc), tokens(x);
  cpu::TopKProblem problem{};
  problem.encoder = packed_encoder(W_enc, precision, packed, stats, rounded);
  problem.encoder.W_enc = rows.data<float>();
  problem.x = tokens.data<float>();
  problem.b_enc = mutable_data<float>(zeros);
  problem.b_dec = mutable_data<float>(zeros);
  problem.tokens = x.size(0);
  problem.k = 1;
  check_memory(kOp, cpu::kernels().encoder_product(problem, parallel()));
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY(sae_fast_benchmark, m) {
  m.def(
      "encoder_product(Tensor x, Tensor W_enc, str precision, Tensor packed, Tensor stats, "
      "Tensor rounded) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sae_fast_benchmark, CPU, m) {
  SAE_FAST_IMPL(m, "encoder_product", &sae_fast::ops::encoder_product);
}
