// CUDA side of the optimiser's scalars and biases: check, guard, allocate, call.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "kernels/cuda/scalars.h"
#include "ops/cuda.h"
#include "ops/gradient.h"

namespace sae_fast::ops {
namespace {

std::tuple<Tensor, Tensor> update_scalars(const Tensor& squared_norm, const Tensor& lr,
                                          const Tensor& loss_scale, const Tensor& step_count,
                                          const Tensor& halted, const OptionalTensor& lr_squares,
                                          const std::string& rule, double grad_clip, double beta1,
                                          double beta2, double eps, double weight_decay,
                                          bool skip_overflow) {
  constexpr const char* kOp = "update_scalars";
  check_update_scalars(kOp, squared_norm, lr, loss_scale, step_count, halted, lr_squares, rule);
  check_same_device(kOp, {{"squared_norm", squared_norm},
                          {"lr", lr},
                          {"loss_scale", loss_scale},
                          {"step_count", step_count},
                          {"halted", halted},
                          {"lr_squares", lr_squares}});
  const DeviceGuard guard(squared_norm.get_device_index());
  const UpdateSettings settings{
      checked_rule(kOp, rule), grad_clip, beta1, beta2, eps, weight_decay, skip_overflow};
  const Tensor norm = torch::stable::new_empty(loss_scale, {});
  const Tensor scalars = torch::stable::new_empty(loss_scale, {kUpdateScalars});
  const cuda::StepPointers step{
      squared_norm.const_data_ptr<double>(),
      lr.const_data_ptr<double>(),
      loss_scale.const_data_ptr<float>(),
      mutable_data<int64_t>(step_count),
      mutable_data<int64_t>(halted),
      lr_squares.has_value() ? mutable_data<double>(*lr_squares) : nullptr,
      mutable_data<float>(norm),
      mutable_data<UpdateScalars>(scalars)};
  STD_CUDA_CHECK(cuda::compute_update_scalars(settings, step, current_stream(squared_norm)));
  return {norm, scalars};
}

void update_vector(const Tensor& w, const Tensor& exp_avg, const OptionalTensor& exp_avg_sq,
                   const OptionalTensor& grad, const Tensor& scalars, const std::string& rule) {
  constexpr const char* kOp = "update_vector_";
  check_update_vector(kOp, rule, w, exp_avg, exp_avg_sq, grad, scalars);
  check_same_device(kOp, {{"w", w},
                          {"exp_avg", exp_avg},
                          {"exp_avg_sq", exp_avg_sq},
                          {"grad", grad},
                          {"scalars", scalars}});
  const DeviceGuard guard(w.get_device_index());
  const Input gradient(grad), step(scalars);
  STD_CUDA_CHECK(cuda::update_vector(
      checked_rule(kOp, rule), step.data<UpdateScalars>(), gradient.data<float>(),
      mutable_data<float>(w), mutable_data<float>(exp_avg),
      exp_avg_sq.has_value() ? mutable_data<float>(*exp_avg_sq) : nullptr, w.numel(),
      current_stream(w)));
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("update_scalars", TORCH_BOX(&sae_fast::ops::update_scalars));
  m.impl("update_vector_", TORCH_BOX(&sae_fast::ops::update_vector));
}
