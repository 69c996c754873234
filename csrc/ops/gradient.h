// Checks of a gradient's factors, shared by row_gradient_norm and fused_update_ of all back ends.
#pragma once

#include "ops/check.h"

namespace sae_fast::ops {

inline void check_gradient(const char* op, const Tensor& latent_offsets, const Tensor& rows,
                           const Tensor& coefficients, const Tensor& dense,
                           const OptionalTensor& shift, const OptionalTensor& project_onto,
                           const OptionalTensor& extra_grad) {
  check_shape(op, "latent_offsets", latent_offsets, {kAnySize});
  check_dtype(op, "latent_offsets", latent_offsets, ScalarType::Long);
  STD_TORCH_CHECK(latent_offsets.size(0) > 1, op,
                  ": latent_offsets must have d_sae + 1 >= 2 elements, got ",
                  latent_offsets.size(0));
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

// Rows of a parameter or of its optimiser state, written in place.
inline void check_state(const char* op, const char* name, const Tensor& state, int64_t d_sae,
                        int64_t d_in) {
  check_float(op, name, state, {d_sae, d_in});
  check_contiguous(op, name, state);
}

}  // namespace sae_fast::ops
