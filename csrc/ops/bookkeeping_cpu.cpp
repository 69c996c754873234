// CPU side of the ops around a step's passes over the weights: check, allocate, call.
#include "ops/bookkeeping.h"

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "kernels/common/bookkeeping.h"
#include "kernels/cpu/bookkeeping.h"
#include "ops/cpu.h"

namespace sae_fast::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_statistics(
    const Tensor& squared_error, const Tensor& target, const Tensor& values, const Tensor& indices,
    const OptionalTensor& variance, int64_t d_sae, bool is_signed) {
  constexpr const char* kOp = "batch_statistics";
  check_batch_statistics(kOp, squared_error, target, values, indices, variance, d_sae);
  const Input errors(squared_error), x(target), amounts(values), latents(indices);
  check_entry_range(kOp, "indices", latents.data<int32_t>(), indices.numel(), d_sae);
  const int64_t rows = squared_error.size(0);
  BatchSums sums{};
  sums.rows = rows;
  sums.squared_error = cpu::sum_of(errors.data<float>(), rows);
  if (variance.has_value()) {
    sums.variance = *variance->const_data_ptr<float>();
  } else {
    check_memory(kOp, cpu::total_variance(x.data<float>(), rows, target.size(1), &sums.variance,
                                          parallel()));
  }
  const Tensor fired = torch::stable::new_empty(values, {d_sae}, ScalarType::Bool);
  sums.active = cpu::mark_fired(amounts.data<float>(), latents.data<int32_t>(), indices.numel(),
                                is_signed, d_sae, mutable_data<bool>(fired));
  const BatchStatistics statistics = sae_fast::batch_statistics(sums);
  const auto scalar = [&](float number) {
    Tensor tensor = torch::stable::new_empty(squared_error, {});
    *mutable_data<float>(tensor) = number;
    return tensor;
  };
  return {scalar(statistics.fvu), scalar(statistics.l0), scalar(statistics.variance), fired};
}

std::tuple<Tensor, Tensor, Tensor> code_gradients(const Tensor& residual_dot, const Tensor& values,
                                                  const Tensor& grad_error) {
  constexpr const char* kOp = "code_gradients";
  check_code_gradients(kOp, residual_dot, values, grad_error);
  const Input dots(residual_dot), amounts(values);
  const Tensor grad_values = torch::stable::new_empty(values, values.sizes());
  const Tensor coefficients = torch::stable::new_empty(values, values.sizes());
  const Tensor scale = torch::stable::new_empty(values, {values.size(0)});
  cpu::code_gradients(
      {amounts.data<float>(), dots.data<float>(), grad_error.const_data_ptr<float>(),
       grad_error.stride(0), mutable_data<float>(grad_values), mutable_data<float>(coefficients),
       mutable_data<float>(scale), values.size(0), values.size(1)},
      parallel());
  return {grad_values, coefficients, scale};
}

// The rows are decoded as a code in which each token has one part of them.
Tensor weighted_row_sum(const Tensor& weights, const Tensor& matrix, double factor) {
  constexpr const char* kOp = "weighted_row_sum";
  check_weighted_row_sum(kOp, weights, matrix);
  const Input numbers(weights), table(matrix);
  const int64_t rows = weights.size(0);
  const int64_t d_in = matrix.size(1);
  const Tensor sum = torch::stable::new_empty(weights, {d_in});
  if (d_in == 0) return sum;
  std::vector<int32_t> indices(static_cast<size_t>(rows));
  std::iota(indices.begin(), indices.end(), 0);
  std::vector<int64_t> offsets;
  for (int64_t part = 0; part <= cpu::kRowParts; ++part) {
    offsets.push_back(part * rows / cpu::kRowParts);
  }
  const Tensor partials = torch::stable::new_empty(weights, {cpu::kRowParts, d_in});
  auto* const parts = mutable_data<float>(partials);
  check_memory(kOp,
               cpu::kernels().decode(
                   {numbers.data<float>(), indices.data(), offsets.data(), cpu::kRowParts, 0},
                   {dtype_of(matrix), table.data<void>(), nullptr, rows, d_in}, parts, parallel()));
  cpu::sum_row_parts(parts, d_in, static_cast<float>(factor), mutable_data<float>(sum));
  return sum;
}

void add_squares(const Tensor& total, const Tensor& grad, const OptionalTensor& second,
                 const OptionalTensor& more) {
  constexpr const char* kOp = "add_squares_";
  check_add_squares(kOp, total, grad, second, more);
  check_apart(kOp, {{"total", total}}, {{"grad", grad}, {"second", second}, {"more", more}});
  const Input numbers(grad), others(second);
  double& sum = *mutable_data<double>(total);
  if (more.has_value()) sum += *more->const_data_ptr<double>();
  sum += cpu::square_sum(numbers.data<float>(), grad.numel());
  if (second.has_value()) sum += cpu::square_sum(others.data<float>(), second->numel());
}

void finish_step(const Tensor& poison, const Tensor& steps, const Tensor& metrics,
                 const Tensor& tokens_since_fired, const OptionalTensor& fault,
                 const Tensor& losses, const Tensor& norm, const Tensor& variance,
                 const Tensor& fired, int64_t n_tokens, bool norm_poisons) {
  constexpr const char* kOp = "finish_step_";
  check_finish_step(kOp, poison, steps, metrics, tokens_since_fired, fault, losses, norm, variance,
                    fired);
  check_apart(kOp,
              {{"poison", poison},
               {"steps", steps},
               {"metrics", metrics},
               {"tokens_since_fired", tokens_since_fired}},
              {{"fault", fault},
               {"losses", losses},
               {"norm", norm},
               {"variance", variance},
               {"fired", fired}});
  const Input terms(losses), latents(fired);
  sae_fast::finish_step(
      {mutable_data<float>(poison), mutable_data<int64_t>(steps), mutable_data<float>(metrics)},
      {fault.has_value() ? fault->const_data_ptr<float>() : nullptr, terms.data<float>(),
       norm.const_data_ptr<float>(), variance.const_data_ptr<float>(), losses.size(0),
       norm_poisons});
  cpu::count_silent(mutable_data<int64_t>(tokens_since_fired), latents.data<bool>(), fired.size(0),
                    n_tokens);
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CPU, m) {
  SAE_FAST_IMPL(m, "batch_statistics", &sae_fast::ops::batch_statistics);
  SAE_FAST_IMPL(m, "code_gradients", &sae_fast::ops::code_gradients);
  SAE_FAST_IMPL(m, "weighted_row_sum", &sae_fast::ops::weighted_row_sum);
  SAE_FAST_IMPL(m, "add_squares_", &sae_fast::ops::add_squares);
  SAE_FAST_IMPL(m, "finish_step_", &sae_fast::ops::finish_step);
}
