// Argument checks with one wording: "op: argument must be ..., got ...". All of a call's checks
// come before anything is allocated.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace sae_fast::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Stands for "any size" in check_shape.
constexpr int64_t kAnySize = -1;

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "dtype number " + std::to_string(static_cast<int>(type));
  }
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += size == kAnySize ? "*" : std::to_string(size);
  }
  return text + "]";
}

inline std::string shape_text(const Tensor& tensor) { return shape_text(tensor.sizes()); }

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType wanted) {
  STD_TORCH_CHECK(tensor.scalar_type() == wanted, op, ": ", name, " must be ", dtype_name(wanted),
                  ", got ", dtype_name(tensor.scalar_type()));
}

// float32, bfloat16 or float16.
inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
      ": ", name, " must be float32, bfloat16 or float16, got ", dtype_name(type));
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> wanted) {
  bool fits = tensor.dim() == static_cast<int64_t>(wanted.size());
  int64_t dimension = 0;
  for (const int64_t size : wanted) {
    fits = fits && (size == kAnySize || tensor.size(dimension) == size);
    ++dimension;
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " must have shape ", shape_text(wanted), ", got ",
                  shape_text(tensor));
}

inline void check_float(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  check_shape(op, name, tensor, shape);
  check_dtype(op, name, tensor, ScalarType::Float);
}

// A tensor that an op writes in place cannot be copied to make it contiguous.
inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name,
                  " is changed in place and must be contiguous");
}

// A sparse code: values (absent where an op has none) and indices [N, K], or flat ones with offsets
// [N + 1].
inline void check_code_layout(const char* op, const OptionalTensor& values, const Tensor& indices,
                              const OptionalTensor& offsets) {
  if (offsets.has_value()) {
    check_shape(op, "indices", indices, {kAnySize});
    check_shape(op, "offsets", *offsets, {kAnySize});
    check_dtype(op, "offsets", *offsets, ScalarType::Long);
    STD_TORCH_CHECK(offsets->size(0) > 0, op, ": offsets must have N + 1 elements, got none");
  } else {
    check_shape(op, "indices", indices, {kAnySize, kAnySize});
  }
  check_dtype(op, "indices", indices, ScalarType::Int);
  if (values.has_value()) {
    check_dtype(op, "values", *values, ScalarType::Float);
    STD_TORCH_CHECK(shape_text(*values) == shape_text(indices), op,
                    ": values must have the shape of indices, ", shape_text(indices), ", got ",
                    shape_text(*values));
  }
}

}  // namespace sae_fast::ops
