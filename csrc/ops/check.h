// Argument checks with one wording: "op: argument must be ..., got ...". All of a call's checks
// come before anything is allocated.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sae_fast::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An argument that an op cannot take; Python sees a RuntimeError with this text and nothing else.
class ArgumentError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw ArgumentError(text.str());
}

// The parts of the message are only put together where the condition does not hold.
#define SAE_FAST_CHECK(condition, ...)                    \
  do {                                                    \
    if (!(condition)) ::sae_fast::ops::fail(__VA_ARGS__); \
  } while (false)

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
    case ScalarType::Char:
      return "int8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
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

// The bytes between the first and the last element of a tensor, from the start of its storage.
struct Extent {
  int64_t begin, end;
};

inline Extent extent(const Tensor& tensor) {
  int64_t offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  int64_t last = offset;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  return {offset * bytes, tensor.numel() == 0 ? offset * bytes : (last + 1) * bytes};
}

// Elements that lie in the storage: a tensor keeps its shape when its storage is freed or cut.
inline void check_storage(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  int64_t size = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &size));
  const int64_t needed = extent(tensor).end;
  SAE_FAST_CHECK(needed <= size, op, ": ", name, " must have a storage of at least ", needed,
                 " bytes, got ", size);
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType wanted) {
  SAE_FAST_CHECK(tensor.scalar_type() == wanted, op, ": ", name, " must be ", dtype_name(wanted),
                 ", got ", dtype_name(tensor.scalar_type()));
  check_storage(op, name, tensor);
}

// float32, bfloat16 or float16.
inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  SAE_FAST_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
      ": ", name, " must be float32, bfloat16 or float16, got ", dtype_name(type));
  check_storage(op, name, tensor);
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> wanted) {
  bool fits = tensor.dim() == static_cast<int64_t>(wanted.size());
  int64_t dimension = 0;
  for (const int64_t size : wanted) {
    fits = fits && (size == kAnySize || tensor.size(dimension) == size);
    ++dimension;
  }
  SAE_FAST_CHECK(fits, op, ": ", name, " must have shape ", shape_text(wanted), ", got ",
                 shape_text(tensor));
}

// Latents are numbered in int32, and the CUDA kernels need one number more for entries of none.
inline void check_d_sae(const char* op, int64_t d_sae) {
  constexpr int64_t kMost = INT32_MAX - 1;
  SAE_FAST_CHECK(d_sae >= 1, op, ": d_sae must be at least 1, got ", d_sae);
  SAE_FAST_CHECK(d_sae <= kMost, op, ": d_sae must be at most ", kMost, ", got ", d_sae);
}

inline void check_float(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  check_shape(op, name, tensor, shape);
  check_dtype(op, name, tensor, ScalarType::Float);
}

// A tensor that an op writes in place cannot be copied to make it contiguous.
inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  SAE_FAST_CHECK(tensor.is_contiguous(), op, ": ", name,
                 " is changed in place and must be contiguous");
}

// An argument with its name, for messages.
struct NamedTensor {
  const char* name;
  const Tensor* tensor;  // null where an op was not given it

  NamedTensor(const char* its_name, const Tensor& given) : name(its_name), tensor(&given) {}
  NamedTensor(const char* its_name, const OptionalTensor& given)
      : name(its_name), tensor(given.has_value() ? &*given : nullptr) {}
};

// Tensors that an op writes share no memory with each other, nor with tensors that it reads: what
// it would read depends on how far it has got.
inline void check_apart(const char* op, std::initializer_list<NamedTensor> written,
                        std::initializer_list<NamedTensor> read) {
  const auto check = [op](const NamedTensor& one, const NamedTensor& other) {
    if (one.tensor == nullptr || other.tensor == nullptr) return;
    if (one.tensor->numel() == 0 || other.tensor->numel() == 0) return;
    const auto start = [](const Tensor& tensor) {
      return reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    };
    const auto end = [start](const Tensor& tensor) {
      const Extent bytes = extent(tensor);
      return start(tensor) + static_cast<uintptr_t>(bytes.end - bytes.begin);
    };
    const bool apart =
        end(*one.tensor) <= start(*other.tensor) || end(*other.tensor) <= start(*one.tensor);
    SAE_FAST_CHECK(apart, op, ": ", one.name, " is changed in place and must share no memory with ",
                   other.name);
  };
  for (const auto* one = written.begin(); one != written.end(); ++one) {
    for (const auto* other = one + 1; other != written.end(); ++other) check(*one, *other);
    for (const NamedTensor& other : read) check(*one, other);
  }
}

// A sparse code: values (absent where an op has none) and indices [N, K], or flat ones with offsets
// [N + 1].
inline void check_code_layout(const char* op, const OptionalTensor& values, const Tensor& indices,
                              const OptionalTensor& offsets, const char* values_name = "values") {
  if (offsets.has_value()) {
    check_shape(op, "indices", indices, {kAnySize});
    check_shape(op, "offsets", *offsets, {kAnySize});
    check_dtype(op, "offsets", *offsets, ScalarType::Long);
    SAE_FAST_CHECK(offsets->size(0) > 0, op, ": offsets must have N + 1 elements, got none");
  } else {
    check_shape(op, "indices", indices, {kAnySize, kAnySize});
  }
  // Before a copy of a tensor that claims any size, by strides of 0, is made.
  SAE_FAST_CHECK(indices.numel() <= INT32_MAX, op, ": at most ", INT32_MAX, " entries, got ",
                 indices.numel());
  SAE_FAST_CHECK(offsets.has_value() || indices.size(0) <= INT32_MAX, op, ": at most ", INT32_MAX,
                 " rows, got ", indices.size(0));
  check_dtype(op, "indices", indices, ScalarType::Int);
  if (values.has_value()) {
    check_dtype(op, values_name, *values, ScalarType::Float);
    SAE_FAST_CHECK(shape_text(*values) == shape_text(indices), op, ": ", values_name,
                   " must have the shape of indices, ", shape_text(indices), ", got ",
                   shape_text(*values));
  }
}

}  // namespace sae_fast::ops
