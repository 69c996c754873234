// Checks of the ops around a step's passes over the weights, shared by all back ends.
#pragma once

#include "ops/check.h"

namespace sae_fast::ops {

inline void check_batch_statistics(const char* op, const Tensor& squared_error,
                                   const Tensor& target, const Tensor& values,
                                   const Tensor& indices, const OptionalTensor& variance,
                                   int64_t d_sae) {
  check_float(op, "squared_error", squared_error, {kAnySize});
  check_float(op, "target", target, {squared_error.size(0), kAnySize});
  check_dtype(op, "indices", indices, ScalarType::Int);
  check_dtype(op, "values", values, ScalarType::Float);
  SAE_FAST_CHECK(shape_text(values) == shape_text(indices), op,
                 ": values must have the shape of indices, ", shape_text(indices), ", got ",
                 shape_text(values));
  SAE_FAST_CHECK(indices.numel() <= INT32_MAX, op, ": at most ", INT32_MAX, " entries, got ",
                 indices.numel());
  if (variance.has_value()) check_float(op, "variance", *variance, {});
  check_d_sae(op, d_sae);
}

inline void check_code_gradients(const char* op, const Tensor& residual_dot, const Tensor& values,
                                 const Tensor& grad_error) {
  check_float(op, "values", values, {kAnySize, kAnySize});
  check_float(op, "residual_dot", residual_dot, {values.size(0), values.size(1)});
  check_float(op, "grad_error", grad_error, {values.size(0)});
  SAE_FAST_CHECK(values.numel() <= INT32_MAX && values.size(0) <= INT32_MAX, op, ": at most ",
                 INT32_MAX, " entries, got ", values.numel());
}

inline void check_weighted_row_sum(const char* op, const Tensor& weights, const Tensor& matrix) {
  check_float(op, "weights", weights, {kAnySize});
  check_shape(op, "matrix", matrix, {weights.size(0), kAnySize});
  check_floating(op, "matrix", matrix);
  SAE_FAST_CHECK(weights.size(0) <= INT32_MAX, op, ": at most ", INT32_MAX, " rows, got ",
                 weights.size(0));
}

// A number that an op changes.
inline void check_counter(const char* op, const char* name, const Tensor& number, ScalarType type) {
  check_shape(op, name, number, {});
  check_dtype(op, name, number, type);
}

inline void check_add_squares(const char* op, const Tensor& total, const Tensor& grad,
                              const OptionalTensor& second, const OptionalTensor& more) {
  check_counter(op, "total", total, ScalarType::Double);
  check_dtype(op, "grad", grad, ScalarType::Float);
  if (second.has_value()) check_dtype(op, "second", *second, ScalarType::Float);
  if (more.has_value()) check_counter(op, "more", *more, ScalarType::Double);
}

inline void check_finish_step(const char* op, const Tensor& poison, const Tensor& steps,
                              const Tensor& metrics, const Tensor& tokens_since_fired,
                              const OptionalTensor& fault, const Tensor& losses, const Tensor& norm,
                              const Tensor& variance, const Tensor& fired) {
  check_counter(op, "poison", poison, ScalarType::Float);
  check_counter(op, "steps", steps, ScalarType::Long);
  check_float(op, "losses", losses, {kAnySize});
  check_float(op, "metrics", metrics, {losses.size(0) + 2});
  check_contiguous(op, "metrics", metrics);
  check_shape(op, "tokens_since_fired", tokens_since_fired, {kAnySize});
  check_dtype(op, "tokens_since_fired", tokens_since_fired, ScalarType::Long);
  check_contiguous(op, "tokens_since_fired", tokens_since_fired);
  if (fault.has_value()) check_float(op, "fault", *fault, {});
  check_float(op, "norm", norm, {});
  check_float(op, "variance", variance, {});
  check_shape(op, "fired", fired, {tokens_since_fired.size(0)});
  check_dtype(op, "fired", fired, ScalarType::Bool);
}

}  // namespace sae_fast::ops
