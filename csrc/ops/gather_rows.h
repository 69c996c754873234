// Checks of gather_rows_, shared by both back ends. The CPU op alone checks the row numbers.
#pragma once

#include "ops/check.h"

namespace sae_fast::ops {

inline void check_gather_rows(const char* op, const Tensor& out, const OptionalTensor& places,
                              const Tensor& source, const Tensor& rows,
                              const OptionalTensor& mean) {
  check_float(op, "out", out, {kAnySize, kAnySize});
  check_contiguous(op, "out", out);
  check_shape(op, "source", source, {kAnySize, out.size(1)});
  check_floating(op, "source", source);
  check_shape(op, "rows", rows, {places.has_value() ? kAnySize : out.size(0)});
  check_dtype(op, "rows", rows, ScalarType::Long);
  if (places.has_value()) {
    check_shape(op, "places", *places, {rows.size(0)});
    check_dtype(op, "places", *places, ScalarType::Long);
  }
  if (mean.has_value()) check_float(op, "mean", *mean, {out.size(1)});
}

}  // namespace sae_fast::ops
