// Checks of a gradient's factors and of the optimiser's ops, shared by all back ends.
#pragma once

#include <string>

#include "kernels/common/moments.h"
#include "kernels/common/update_rule.h"
#include "ops/check.h"
#include "ops/input.h"

namespace sae_fast::ops {

inline void check_latent_offsets(const char* op, const Tensor& latent_offsets) {
  check_shape(op, "latent_offsets", latent_offsets, {kAnySize});
  check_dtype(op, "latent_offsets", latent_offsets, ScalarType::Long);
  SAE_FAST_CHECK(latent_offsets.size(0) > 1, op,
                 ": latent_offsets must have d_sae + 1 >= 2 elements, got ",
                 latent_offsets.size(0));
}

// Flat positions in a tensor of coefficients.
inline void check_entries(const char* op, const Tensor& entries, const char* name,
                          const Tensor& source) {
  check_dtype(op, name, source, ScalarType::Float);
  check_shape(op, "entries", entries, {kAnySize});
  check_dtype(op, "entries", entries, ScalarType::Int);
}

inline void check_gradient(const char* op, const Tensor& latent_offsets, const Tensor& rows,
                           const Tensor& coefficients, const Tensor& dense,
                           const OptionalTensor& shift, const OptionalTensor& project_onto,
                           const OptionalTensor& extra_grad) {
  check_latent_offsets(op, latent_offsets);
  check_shape(op, "rows", rows, {kAnySize});
  check_dtype(op, "rows", rows, ScalarType::Int);
  check_float(op, "coefficients", coefficients, {rows.size(0)});
  check_shape(op, "dense", dense, {kAnySize, kAnySize});
  check_floating(op, "dense", dense);
  const int64_t d_sae = latent_offsets.size(0) - 1;
  const int64_t d_in = dense.size(1);
  if (shift.has_value()) check_float(op, "shift", *shift, {d_in});
  if (project_onto.has_value()) check_float(op, "project_onto", *project_onto, {d_sae, d_in});
  if (extra_grad.has_value()) check_float(op, "extra_grad", *extra_grad, {d_sae, d_in});
}

// Weight rows, written in place.
inline void check_weights(const char* op, const Tensor& W, int64_t d_sae, int64_t d_in) {
  check_float(op, "W", W, {d_sae, d_in});
  check_contiguous(op, "W", W);
}

// A tensor that comes with some dtypes of exp_avg and not with the others.
inline void check_companion(const char* op, const char* name, const OptionalTensor& tensor,
                            bool wanted, ScalarType type) {
  SAE_FAST_CHECK(tensor.has_value() || !wanted, op, ": ", name, " must be given where exp_avg is ",
                 dtype_name(type), ", got none");
  SAE_FAST_CHECK(wanted || !tensor.has_value(), op, ": ", name, " must be none where exp_avg is ",
                 dtype_name(type), ", got a tensor");
}

inline UpdateRule checked_rule(const char* op, const std::string& rule) {
  if (rule == "adam") return UpdateRule::kAdam;
  if (rule == "sgd") return UpdateRule::kSgd;
  if (rule == "signum") return UpdateRule::kSignum;
  SAE_FAST_CHECK(rule == "schedule_free_signum", op,
                 ": rule must be adam, sgd, signum or schedule_free_signum, got ", rule);
  return UpdateRule::kScheduleFreeSignum;
}

// Checks a tensor that only some rules have.
inline void check_of_rule(const char* op, const char* name, const OptionalTensor& tensor,
                          const std::string& rule, bool wanted) {
  SAE_FAST_CHECK(tensor.has_value() || !wanted, op, ": ", name, " must be given where rule is ",
                 rule, ", got none");
  SAE_FAST_CHECK(wanted || !tensor.has_value(), op, ": ", name, " must be none where rule is ",
                 rule, ", got a tensor");
}

inline void check_scale(const char* op, const char* name, const OptionalTensor& scale, bool wanted,
                        ScalarType type, int64_t d_sae, int64_t d_in) {
  check_companion(op, name, scale, wanted, type);
  if (!wanted) return;
  check_float(op, name, *scale, {d_sae, moment_blocks(d_in)});
  check_contiguous(op, name, *scale);
}

// The moments of a weight matrix with what belongs to their dtype, checked, as kernels take them.
inline Moments checked_moments(const char* op, const std::string& rule, const Tensor& exp_avg,
                               const OptionalTensor& exp_avg_sq,
                               const OptionalTensor& exp_avg_scale,
                               const OptionalTensor& exp_avg_sq_scale,
                               const OptionalTensor& step_count, int64_t d_sae, int64_t d_in) {
  check_of_rule(op, "exp_avg_sq", exp_avg_sq, rule, has_exp_avg_sq(checked_rule(op, rule)));
  check_shape(op, "exp_avg", exp_avg, {d_sae, d_in});
  const ScalarType type = exp_avg.scalar_type();
  const bool in_blocks = type == ScalarType::Byte;
  SAE_FAST_CHECK(in_blocks || type == ScalarType::Float || type == ScalarType::BFloat16, op,
                 ": exp_avg must be float32, bfloat16 or uint8, got ", dtype_name(type));
  if (exp_avg_sq.has_value()) {
    check_shape(op, "exp_avg_sq", *exp_avg_sq, {d_sae, d_in});
    check_dtype(op, "exp_avg_sq", *exp_avg_sq, type);
  } else {
    SAE_FAST_CHECK(!exp_avg_sq_scale.has_value(), op,
                   ": exp_avg_sq_scale must be none where rule is ", rule, ", got a tensor");
  }
  const bool scaled_sq = in_blocks && exp_avg_sq.has_value();
  check_scale(op, "exp_avg_scale", exp_avg_scale, in_blocks, type, d_sae, d_in);
  check_scale(op, "exp_avg_sq_scale", exp_avg_sq_scale, scaled_sq, type, d_sae, d_in);
  if (type != ScalarType::Float) check_companion(op, "step_count", step_count, true, type);
  if (step_count.has_value()) {
    check_shape(op, "step_count", *step_count, {});
    check_dtype(op, "step_count", *step_count, ScalarType::Long);
  }
  check_storage(op, "exp_avg", exp_avg);
  check_contiguous(op, "exp_avg", exp_avg);
  if (exp_avg_sq.has_value()) check_contiguous(op, "exp_avg_sq", *exp_avg_sq);
  Moments moments{};
  moments.type = in_blocks                   ? DType::kUInt8
                 : type == ScalarType::Float ? DType::kFloat32
                                             : DType::kBFloat16;
  moments.exp_avg = exp_avg.mutable_data_ptr();
  if (in_blocks) moments.exp_avg_scale = mutable_data<float>(*exp_avg_scale);
  if (exp_avg_sq.has_value()) moments.exp_avg_sq = exp_avg_sq->mutable_data_ptr();
  if (scaled_sq) moments.exp_avg_sq_scale = mutable_data<float>(*exp_avg_sq_scale);
  if (step_count.has_value()) moments.step = step_count->const_data_ptr<int64_t>();
  return moments;
}

// Checks the results of row_gradient_norm and update_scalars.
inline void check_cache(const char* op, const Tensor& sums, const Tensor& cached,
                        const Tensor& cache_slots, const Tensor& scalars, int64_t d_sae,
                        int64_t d_in) {
  check_float(op, "sums", sums, {d_sae});
  check_float(op, "cached", cached, {kAnySize, d_in});
  check_shape(op, "cache_slots", cache_slots, {d_sae});
  check_dtype(op, "cache_slots", cache_slots, ScalarType::Int);
  check_float(op, "scalars", scalars, {kUpdateScalars});
}

inline const float* first_number(const OptionalTensor& numbers) {
  return numbers.has_value() ? numbers->const_data_ptr<float>() : nullptr;
}

inline void check_update_scalars(const char* op, const Tensor& squared_norm, const Tensor& lr,
                                 const Tensor& loss_scale, const Tensor& step_count,
                                 const Tensor& halted, const OptionalTensor& lr_squares,
                                 const std::string& rule, const OptionalTensor& fault,
                                 const OptionalTensor& losses) {
  const auto check_scalar = [op](const char* name, const Tensor& tensor, ScalarType type) {
    check_shape(op, name, tensor, {});
    check_dtype(op, name, tensor, type);
  };
  check_scalar("squared_norm", squared_norm, ScalarType::Double);
  check_scalar("lr", lr, ScalarType::Double);
  check_scalar("loss_scale", loss_scale, ScalarType::Float);
  check_scalar("step_count", step_count, ScalarType::Long);
  check_scalar("halted", halted, ScalarType::Long);
  const bool averages = checked_rule(op, rule) == UpdateRule::kScheduleFreeSignum;
  check_of_rule(op, "lr_squares", lr_squares, rule, averages);
  if (averages) check_scalar("lr_squares", *lr_squares, ScalarType::Double);
  if (fault.has_value()) check_scalar("fault", *fault, ScalarType::Float);
  if (!losses.has_value()) return;
  check_float(op, "losses", *losses, {kAnySize});
  SAE_FAST_CHECK(losses->size(0) >= 1, op, ": losses must have at least one, got none");
}

inline void check_update_vector(const char* op, const std::string& rule, const Tensor& w,
                                const Tensor& exp_avg, const OptionalTensor& exp_avg_sq,
                                const OptionalTensor& grad, const Tensor& scalars) {
  check_of_rule(op, "exp_avg_sq", exp_avg_sq, rule, has_exp_avg_sq(checked_rule(op, rule)));
  const auto check_like_w = [&](const char* name, const Tensor& tensor) {
    SAE_FAST_CHECK(shape_text(tensor) == shape_text(w), op, ": ", name,
                   " must have the shape of w, ", shape_text(w), ", got ", shape_text(tensor));
    check_dtype(op, name, tensor, ScalarType::Float);
  };
  check_like_w("w", w);
  check_like_w("exp_avg", exp_avg);
  if (exp_avg_sq.has_value()) check_like_w("exp_avg_sq", *exp_avg_sq);
  if (grad.has_value()) check_like_w("grad", *grad);
  check_float(op, "scalars", scalars, {kUpdateScalars});
  check_contiguous(op, "w", w);
  check_contiguous(op, "exp_avg", exp_avg);
  if (exp_avg_sq.has_value()) check_contiguous(op, "exp_avg_sq", *exp_avg_sq);
}

// The second vector of update_vector_, in tensors that are there or not together.
struct SecondVector {
  OptionalTensor w, exp_avg, exp_avg_sq, grad;
};

inline void check_second_vector(const char* op, const std::string& rule,
                                const SecondVector& second) {
  const bool there = second.w.has_value();
  SAE_FAST_CHECK(!there || second.exp_avg.has_value(), op,
                 ": second_exp_avg must be given where second_w is given, got none");
  const auto check_none = [&](const char* name, const OptionalTensor& tensor) {
    SAE_FAST_CHECK(!tensor.has_value(), op, ": ", name,
                   " must be none where second_w is none, got a tensor");
  };
  if (!there) {
    check_none("second_exp_avg", second.exp_avg);
    check_none("second_exp_avg_sq", second.exp_avg_sq);
    check_none("second_grad", second.grad);
    return;
  }
  const bool has_square = has_exp_avg_sq(checked_rule(op, rule));
  check_of_rule(op, "second_exp_avg_sq", second.exp_avg_sq, rule, has_square);
  const auto check_like_w = [&](const char* name, const OptionalTensor& tensor) {
    if (!tensor.has_value()) return;
    SAE_FAST_CHECK(shape_text(*tensor) == shape_text(*second.w), op, ": ", name,
                   " must have the shape of second_w, ", shape_text(*second.w), ", got ",
                   shape_text(*tensor));
    check_dtype(op, name, *tensor, ScalarType::Float);
  };
  check_like_w("second_w", second.w);
  check_like_w("second_exp_avg", second.exp_avg);
  check_like_w("second_exp_avg_sq", second.exp_avg_sq);
  check_like_w("second_grad", second.grad);
  check_contiguous(op, "second_w", *second.w);
  check_contiguous(op, "second_exp_avg", *second.exp_avg);
  if (has_square) check_contiguous(op, "second_exp_avg_sq", *second.exp_avg_sq);
}

}  // namespace sae_fast::ops
