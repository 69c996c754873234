// CUDA side of the ops around a step's passes over the weights: check, guard, allocate, call.
#include "ops/bookkeeping.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "kernels/cuda/bookkeeping.h"
#include "ops/cuda.h"

namespace sae_fast::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_statistics(
    const Tensor& squared_error, const Tensor& target, const Tensor& values, const Tensor& indices,
    const OptionalTensor& variance, int64_t d_sae, bool is_signed) {
  constexpr const char* kOp = "batch_statistics";
  check_batch_statistics(kOp, squared_error, target, values, indices, variance, d_sae);
  check_same_device(kOp, {{"squared_error", squared_error},
                          {"target", target},
                          {"values", values},
                          {"indices", indices},
                          {"variance", variance}});
  const DeviceGuard guard(squared_error.get_device_index());
  const Input errors(squared_error), x(target), amounts(values), latents(indices), given(variance);
  const cuda::BatchArrays batch{errors.data<float>(),
                                x.data<float>(),
                                given.data<float>(),
                                amounts.data<float>(),
                                latents.data<int32_t>(),
                                target.size(0),
                                target.size(1),
                                indices.numel(),
                                d_sae,
                                is_signed};
  const Tensor fvu = torch::stable::new_empty(squared_error, {});
  const Tensor l0 = torch::stable::new_empty(squared_error, {});
  const Tensor found = torch::stable::new_empty(squared_error, {});
  const Tensor fired = torch::stable::new_empty(squared_error, {d_sae}, ScalarType::Bool);
  size_t bytes = 0;
  STD_CUDA_CHECK(cuda::batch_statistics_scratch_bytes(batch, &bytes));
  const Tensor scratch = new_scratch(squared_error, bytes);
  STD_CUDA_CHECK(cuda::batch_statistics(batch, mutable_data<float>(fvu), mutable_data<float>(l0),
                                        mutable_data<float>(found), mutable_data<bool>(fired),
                                        scratch.mutable_data_ptr(), current_stream(squared_error)));
  return {fvu, l0, found, fired};
}

std::tuple<Tensor, Tensor, Tensor> code_gradients(const Tensor& residual_dot, const Tensor& values,
                                                  const Tensor& grad_error) {
  constexpr const char* kOp = "code_gradients";
  check_code_gradients(kOp, residual_dot, values, grad_error);
  check_same_device(
      kOp, {{"residual_dot", residual_dot}, {"values", values}, {"grad_error", grad_error}});
  const DeviceGuard guard(values.get_device_index());
  const Input dots(residual_dot), amounts(values);
  const Tensor grad_values = torch::stable::new_empty(values, values.sizes());
  const Tensor coefficients = torch::stable::new_empty(values, values.sizes());
  const Tensor scale = torch::stable::new_empty(values, {values.size(0)});
  STD_CUDA_CHECK(cuda::code_gradients(
      {amounts.data<float>(), dots.data<float>(), grad_error.const_data_ptr<float>(),
       grad_error.stride(0), mutable_data<float>(grad_values), mutable_data<float>(coefficients),
       mutable_data<float>(scale), values.size(0), values.size(1)},
      current_stream(values)));
  return {grad_values, coefficients, scale};
}

Tensor weighted_row_sum(const Tensor& weights, const Tensor& matrix, double factor) {
  constexpr const char* kOp = "weighted_row_sum";
  check_weighted_row_sum(kOp, weights, matrix);
  check_same_device(kOp, {{"weights", weights}, {"matrix", matrix}});
  const DeviceGuard guard(weights.get_device_index());
  const Input numbers(weights), table(matrix);
  const int64_t d_in = matrix.size(1);
  const Tensor sum = torch::stable::new_empty(weights, {d_in});
  size_t bytes = 0;
  STD_CUDA_CHECK(cuda::weighted_row_sum_scratch_bytes(d_in, &bytes));
  const Tensor scratch = new_scratch(weights, bytes);
  STD_CUDA_CHECK(cuda::weighted_row_sum(numbers.data<float>(),
                                        {table.data<void>(), dtype_of(matrix)}, weights.size(0),
                                        d_in, static_cast<float>(factor), mutable_data<float>(sum),
                                        scratch.mutable_data_ptr(), current_stream(weights)));
  return sum;
}

void add_squares(const Tensor& total, const Tensor& grad, const OptionalTensor& second,
                 const OptionalTensor& more) {
  constexpr const char* kOp = "add_squares_";
  check_add_squares(kOp, total, grad, second, more);
  check_same_device(kOp, {{"total", total}, {"grad", grad}, {"second", second}, {"more", more}});
  const DeviceGuard guard(total.get_device_index());
  const Input numbers(grad), others(second);
  STD_CUDA_CHECK(cuda::add_squares(
      {more.has_value() ? more->const_data_ptr<double>() : nullptr, numbers.data<float>(),
       others.data<float>(), grad.numel(), second.has_value() ? second->numel() : 0},
      mutable_data<double>(total), current_stream(total)));
}

void finish_step(const Tensor& poison, const Tensor& steps, const Tensor& metrics,
                 const Tensor& tokens_since_fired, const OptionalTensor& fault,
                 const Tensor& losses, const Tensor& norm, const Tensor& variance,
                 const Tensor& fired, int64_t n_tokens, bool norm_poisons) {
  constexpr const char* kOp = "finish_step_";
  check_finish_step(kOp, poison, steps, metrics, tokens_since_fired, fault, losses, norm, variance,
                    fired);
  check_same_device(kOp, {{"poison", poison},
                          {"steps", steps},
                          {"metrics", metrics},
                          {"tokens_since_fired", tokens_since_fired},
                          {"fault", fault},
                          {"losses", losses},
                          {"norm", norm},
                          {"variance", variance},
                          {"fired", fired}});
  const DeviceGuard guard(poison.get_device_index());
  const Input terms(losses), latents(fired);
  STD_CUDA_CHECK(cuda::finish_step(
      {mutable_data<float>(poison), mutable_data<int64_t>(steps), mutable_data<float>(metrics)},
      {fault.has_value() ? fault->const_data_ptr<float>() : nullptr, terms.data<float>(),
       norm.const_data_ptr<float>(), variance.const_data_ptr<float>(), losses.size(0),
       norm_poisons},
      mutable_data<int64_t>(tokens_since_fired), latents.data<bool>(), fired.size(0), n_tokens,
      current_stream(poison)));
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("batch_statistics", TORCH_BOX(&sae_fast::ops::batch_statistics));
  m.impl("code_gradients", TORCH_BOX(&sae_fast::ops::code_gradients));
  m.impl("weighted_row_sum", TORCH_BOX(&sae_fast::ops::weighted_row_sum));
  m.impl("add_squares_", TORCH_BOX(&sae_fast::ops::add_squares));
  m.impl("finish_step_", TORCH_BOX(&sae_fast::ops::finish_step));
}
