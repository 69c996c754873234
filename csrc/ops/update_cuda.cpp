// CUDA side of the optimizer's ops: check, guard, allocate, call.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "kernels/cuda/rows.h"
#include "kernels/cuda/scalars.h"
#include "kernels/cuda/update.h"
#include "ops/cuda.h"
#include "ops/encode.h"
#include "ops/gradient.h"

namespace sae_fast::ops {
namespace {

// A gradient's factors as the kernels read them. The lists may have more room than
// latent_offsets[F] of it in use, as latent_major leaves them.
class CudaGradient {
 public:
  CudaGradient(const char* op, const Tensor& latent_offsets, const Tensor& rows,
               const Tensor& coefficients, const Tensor& dense, const OptionalTensor& shift,
               const OptionalTensor& extra_grad, UpdateRule rule = UpdateRule::kAdam,
               DType moments = DType::kFloat32)
      : offsets_(latent_offsets),
        rows_(rows),
        coefficients_(coefficients),
        dense_(dense),
        shift_(shift),
        extra_grad_(extra_grad) {
    factors_.lists = {offsets_.data<int64_t>(), rows_.data<int32_t>(), coefficients_.data<float>(),
                      latent_offsets.size(0) - 1, rows.size(0)};
    factors_.dense = {dense_.data<void>(), dtype_of(dense)};
    factors_.shift = shift_.data<float>();
    factors_.extra_grad = extra_grad_.data<float>();
    factors_.d_in = dense.size(1);
    int64_t max_d_in = 0;
    STD_CUDA_CHECK(cuda::row_update_max_d_in(rule, moments, &max_d_in));
    SAE_FAST_CHECK(factors_.d_in <= max_d_in, op, ": dense must have at most ", max_d_in,
                   " columns on this device, got ", factors_.d_in);
    SAE_FAST_CHECK(rows.size(0) <= INT_MAX, op, ": rows must have at most ", INT_MAX,
                   " entries, got ", rows.size(0));
  }

  const cuda::GradientFactors& factors() const { return factors_; }

 private:
  Input offsets_, rows_, coefficients_, dense_, shift_, extra_grad_;
  cuda::GradientFactors factors_{};
};

std::tuple<Tensor, Tensor, Tensor, Tensor> row_gradient_norm(
    const Tensor& latent_offsets, const Tensor& rows, const Tensor& coefficients,
    const Tensor& dense, const OptionalTensor& shift, const OptionalTensor& project_onto,
    const OptionalTensor& extra_grad) {
  constexpr const char* kOp = "row_gradient_norm";
  check_gradient(kOp, latent_offsets, rows, coefficients, dense, shift, project_onto, extra_grad);
  check_same_device(kOp, {{"latent_offsets", latent_offsets},
                          {"rows", rows},
                          {"coefficients", coefficients},
                          {"dense", dense},
                          {"shift", shift},
                          {"project_onto", project_onto},
                          {"extra_grad", extra_grad}});
  const DeviceGuard guard(dense.get_device_index());
  const CudaGradient gradient(kOp, latent_offsets, rows, coefficients, dense, shift, extra_grad);
  const Input directions(project_onto);
  const int64_t entries = rows.size(0);
  const int64_t d_sae = latent_offsets.size(0) - 1;
  const int64_t d_in = dense.size(1);
  const RowCache cache = plan_row_cache(entries, dense.size(0));
  const Tensor squared_norm = torch::stable::new_empty(coefficients, {}, ScalarType::Double);
  const Tensor sums = torch::stable::new_empty(coefficients, {d_sae});
  const Tensor cached = torch::stable::new_empty(coefficients, {cache.rows, d_in});
  const Tensor cache_slots = torch::stable::new_empty(rows, {d_sae});
  size_t bytes = 0;
  STD_CUDA_CHECK(cuda::row_gradient_norm_scratch_bytes(entries, d_sae, d_in, &bytes));
  const Tensor scratch = new_scratch(dense, bytes);
  STD_CUDA_CHECK(cuda::row_gradient_norm(
      gradient.factors(), cache, directions.data<float>(), mutable_data<double>(squared_norm),
      mutable_data<float>(sums), mutable_data<float>(cached), mutable_data<int32_t>(cache_slots),
      scratch.mutable_data_ptr(), current_stream(dense)));
  return {squared_norm, sums, cached, cache_slots};
}

// The copies that CUDA encoders and decoders read are W in a 16-bit type and, for an encoder, its
// stats; nothing is packed.
void check_copies(const char* op, const Tensor& W, const OptionalTensor& packed,
                  const OptionalTensor& stats, const OptionalTensor& rounded) {
  SAE_FAST_CHECK(!packed.has_value() || packed->numel() == 0, op,
                 ": packed must be empty on CUDA, got ", packed.has_value() ? packed->numel() : 0,
                 " elements");
  const bool has_stats = stats.has_value() && stats->numel() > 0;
  if (has_stats) {
    check_float(op, "stats", *stats, {2, W.size(0)});
    check_contiguous(op, "stats", *stats);
  }
  if (!rounded.has_value() || rounded->numel() == 0) {
    SAE_FAST_CHECK(!has_stats, op, ": stats must come with rounded, got none");
    return;
  }
  check_shape(op, "rounded", *rounded, {W.size(0), W.size(1)});
  SAE_FAST_CHECK(
      rounded->scalar_type() == ScalarType::BFloat16 || rounded->scalar_type() == ScalarType::Half,
      op, ": rounded must be bfloat16 or float16, got ", dtype_name(rounded->scalar_type()));
  check_contiguous(op, "rounded", *rounded);
}

cuda::RowState row_state(const Tensor& W, const Moments& moments, const OptionalTensor& stats,
                         const OptionalTensor& rounded) {
  cuda::RowState state{};
  state.W = mutable_data<float>(W);
  state.moments = moments;
  if (rounded.has_value() && rounded->numel() > 0) {
    state.rounded = rounded->mutable_data_ptr();
    state.rounded_type = dtype_of(*rounded);
  }
  if (stats.has_value() && stats->numel() > 0) state.stats = mutable_data<float>(*stats);
  return state;
}

void fused_update(const Tensor& W, const Tensor& exp_avg, const OptionalTensor& exp_avg_sq,
                  const OptionalTensor& exp_avg_scale, const OptionalTensor& exp_avg_sq_scale,
                  const Tensor& latent_offsets, const Tensor& rows, const Tensor& coefficients,
                  const Tensor& dense, const OptionalTensor& shift,
                  const OptionalTensor& extra_grad, const Tensor& sums, const Tensor& cached,
                  const Tensor& cache_slots, const Tensor& scalars,
                  const OptionalTensor& step_count, const std::string& rule, bool project,
                  bool unit_norm, const OptionalTensor& packed, const OptionalTensor& stats,
                  const OptionalTensor& rounded, const std::string& precision) {
  constexpr const char* kOp = "fused_update_";
  check_gradient(kOp, latent_offsets, rows, coefficients, dense, shift, std::nullopt, extra_grad);
  const int64_t d_sae = latent_offsets.size(0) - 1;
  const int64_t d_in = dense.size(1);
  check_weights(kOp, W, d_sae, d_in);
  const UpdateRule update_rule = checked_rule(kOp, rule);
  const Moments moments = checked_moments(kOp, rule, exp_avg, exp_avg_sq, exp_avg_scale,
                                          exp_avg_sq_scale, step_count, d_sae, d_in);
  check_cache(kOp, sums, cached, cache_slots, scalars, d_sae, d_in);
  check_precision(kOp, precision);
  check_copies(kOp, W, packed, stats, rounded);
  check_same_device(kOp, {{"W", W},
                          {"exp_avg", exp_avg},
                          {"exp_avg_sq", exp_avg_sq},
                          {"exp_avg_scale", exp_avg_scale},
                          {"exp_avg_sq_scale", exp_avg_sq_scale},
                          {"latent_offsets", latent_offsets},
                          {"rows", rows},
                          {"coefficients", coefficients},
                          {"dense", dense},
                          {"shift", shift},
                          {"extra_grad", extra_grad},
                          {"sums", sums},
                          {"cached", cached},
                          {"cache_slots", cache_slots},
                          {"scalars", scalars},
                          {"step_count", step_count},
                          {"stats", stats},
                          {"rounded", rounded}});
  const DeviceGuard guard(W.get_device_index());
  const CudaGradient gradient(kOp, latent_offsets, rows, coefficients, dense, shift, extra_grad,
                              update_rule, moments.type);
  const Input kept(cached), slots(cache_slots), step(scalars);
  STD_CUDA_CHECK(cuda::fused_update(gradient.factors(), row_state(W, moments, stats, rounded),
                                    kept.data<float>(), slots.data<int32_t>(), update_rule,
                                    step.data<UpdateScalars>(), project, unit_norm,
                                    current_stream(W)));
}

std::tuple<Tensor, Tensor> update_scalars(const Tensor& squared_norm, const Tensor& lr,
                                          const Tensor& loss_scale, const Tensor& step_count,
                                          const Tensor& halted, const OptionalTensor& lr_squares,
                                          const std::string& rule, double grad_clip, double beta1,
                                          double beta2, double eps, double weight_decay,
                                          bool skip_overflow, const OptionalTensor& fault,
                                          const OptionalTensor& losses) {
  constexpr const char* kOp = "update_scalars";
  check_update_scalars(kOp, squared_norm, lr, loss_scale, step_count, halted, lr_squares, rule,
                       fault, losses);
  check_same_device(kOp, {{"squared_norm", squared_norm},
                          {"lr", lr},
                          {"loss_scale", loss_scale},
                          {"step_count", step_count},
                          {"halted", halted},
                          {"lr_squares", lr_squares},
                          {"fault", fault},
                          {"losses", losses}});
  const DeviceGuard guard(squared_norm.get_device_index());
  const UpdateSettings settings{
      checked_rule(kOp, rule), grad_clip, beta1, beta2, eps, weight_decay, skip_overflow};
  const Tensor norm = torch::stable::new_empty(loss_scale, {});
  const Tensor scalars = torch::stable::new_empty(loss_scale, {kUpdateScalars});
  const cuda::StepPointers step{
      squared_norm.const_data_ptr<double>(),
      lr.const_data_ptr<double>(),
      loss_scale.const_data_ptr<float>(),
      first_number(fault),
      first_number(losses),
      mutable_data<int64_t>(step_count),
      mutable_data<int64_t>(halted),
      lr_squares.has_value() ? mutable_data<double>(*lr_squares) : nullptr,
      mutable_data<float>(norm),
      mutable_data<UpdateScalars>(scalars)};
  STD_CUDA_CHECK(cuda::compute_update_scalars(settings, step, current_stream(squared_norm)));
  return {norm, scalars};
}

cuda::VectorState vector_state(const Tensor& w, const Tensor& exp_avg,
                               const OptionalTensor& exp_avg_sq, const Input& grad) {
  return {grad.data<float>(), mutable_data<float>(w), mutable_data<float>(exp_avg),
          exp_avg_sq.has_value() ? mutable_data<float>(*exp_avg_sq) : nullptr, w.numel()};
}

void update_vector(const Tensor& w, const Tensor& exp_avg, const OptionalTensor& exp_avg_sq,
                   const OptionalTensor& grad, const Tensor& scalars, const std::string& rule,
                   const OptionalTensor& second_w, const OptionalTensor& second_exp_avg,
                   const OptionalTensor& second_exp_avg_sq, const OptionalTensor& second_grad) {
  constexpr const char* kOp = "update_vector_";
  check_update_vector(kOp, rule, w, exp_avg, exp_avg_sq, grad, scalars);
  check_same_device(kOp, {{"w", w},
                          {"exp_avg", exp_avg},
                          {"exp_avg_sq", exp_avg_sq},
                          {"grad", grad},
                          {"scalars", scalars},
                          {"second_w", second_w},
                          {"second_exp_avg", second_exp_avg},
                          {"second_exp_avg_sq", second_exp_avg_sq},
                          {"second_grad", second_grad}});
  check_second_vector(kOp, rule, {second_w, second_exp_avg, second_exp_avg_sq, second_grad});
  const DeviceGuard guard(w.get_device_index());
  const Input gradient(grad), other_gradient(second_grad), step(scalars);
  cuda::VectorState second{};
  if (second_w.has_value()) {
    second = vector_state(*second_w, *second_exp_avg, second_exp_avg_sq, other_gradient);
  }
  STD_CUDA_CHECK(cuda::update_vectors(checked_rule(kOp, rule), step.data<UpdateScalars>(),
                                      vector_state(w, exp_avg, exp_avg_sq, gradient), second,
                                      current_stream(w)));
}

void normalize_rows(const Tensor& W) {
  constexpr const char* kOp = "normalize_rows_";
  check_float(kOp, "W", W, {kAnySize, kAnySize});
  check_contiguous(kOp, "W", W);
  const DeviceGuard guard(W.get_device_index());
  STD_CUDA_CHECK(
      cuda::normalize_rows(mutable_data<float>(W), W.size(0), W.size(1), current_stream(W)));
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("row_gradient_norm", TORCH_BOX(&sae_fast::ops::row_gradient_norm));
  m.impl("update_scalars", TORCH_BOX(&sae_fast::ops::update_scalars));
  m.impl("fused_update_", TORCH_BOX(&sae_fast::ops::fused_update));
  m.impl("update_vector_", TORCH_BOX(&sae_fast::ops::update_vector));
  m.impl("normalize_rows_", TORCH_BOX(&sae_fast::ops::normalize_rows));
}
