// Checks of the penalties' arguments, shared by all back ends.
#pragma once

#include "ops/check.h"

namespace sae_fast::ops {

// h [N, F], of which latents [0, split) are the first group.
inline void check_groups(const char* op, const Tensor& h, int64_t split) {
  check_float(op, "h", h, {kAnySize, kAnySize});
  SAE_FAST_CHECK(split >= 0 && split <= h.size(1), op,
                 ": split must be in [0, d_sae], got split=", split, " with d_sae=", h.size(1));
}

// Gram matrices of codes: without a second group there is one.
inline int64_t gram_matrices(const Tensor& h, int64_t split) { return split < h.size(1) ? 2 : 1; }

// Checks the results of the forward: means float64 [F], inverse_norms [F], gram [G, N, N].
inline void check_correlation(const char* op, const OptionalTensor& grad_within,
                              const OptionalTensor& grad_between, const Tensor& h, int64_t split,
                              const Tensor& means, const Tensor& inverse_norms,
                              const Tensor& gram) {
  check_groups(op, h, split);
  check_shape(op, "means", means, {h.size(1)});
  check_dtype(op, "means", means, ScalarType::Double);
  check_float(op, "inverse_norms", inverse_norms, {h.size(1)});
  check_float(op, "gram", gram, {gram_matrices(h, split), h.size(0), h.size(0)});
  if (grad_within.has_value()) check_float(op, "grad_within", *grad_within, {});
  if (grad_between.has_value()) check_float(op, "grad_between", *grad_between, {});
}

}  // namespace sae_fast::ops
