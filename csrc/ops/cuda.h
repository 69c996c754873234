// Helpers of the CUDA ops: all arguments on one device, its current stream, the sparse code's
// layout and scratch memory. Values of indices and offsets are not checked: reading them would wait
// for the device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime_api.h>

#include <climits>
#include <initializer_list>
#include <string>

#include "kernels/cuda/types.h"
#include "ops/check.h"
#include "ops/input.h"

namespace sae_fast::ops {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline std::string device_name(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index())
                          : std::string(tensor.is_cpu() ? "cpu" : "another device");
}

// The dispatcher calls a CUDA op when any argument is on a CUDA device; all of them must be on one.
inline void check_same_device(const char* op, std::initializer_list<NamedTensor> arguments) {
  const NamedTensor& first = *arguments.begin();
  SAE_FAST_CHECK(first.tensor->is_cuda(), op, ": ", first.name,
                 " must be on the CUDA device of the other arguments, got ",
                 device_name(*first.tensor));
  for (const NamedTensor& argument : arguments) {
    if (argument.tensor == nullptr) continue;
    SAE_FAST_CHECK(argument.tensor->is_cuda() &&
                       argument.tensor->get_device_index() == first.tensor->get_device_index(),
                   op, ": ", argument.name, " must be on ", device_name(*first.tensor), " as ",
                   first.name, " is, got ", device_name(*argument.tensor));
  }
}

// For a tensor that check_floating has passed.
inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

// A code whose layout has been checked: [N, K], or flat with offsets [N + 1].
class CudaCode {
 public:
  CudaCode(const char* op, const OptionalTensor& values, const Tensor& indices,
           const OptionalTensor& offsets, const char* values_name = "values")
      : values_((check_code_layout(op, values, indices, offsets, values_name), values)),
        indices_(indices),
        offsets_(offsets) {
    SAE_FAST_CHECK(indices.numel() <= INT_MAX, op, ": indices must have at most ", INT_MAX,
                   " entries, got ", indices.numel());
    rows_.offsets = offsets_.data<int64_t>();
    rows_.k = offsets.has_value() ? 0 : indices.size(1);
    rows_.rows = offsets.has_value() ? offsets->size(0) - 1 : indices.size(0);
    rows_.entries = indices.numel();
  }

  const float* values() const { return values_.data<float>(); }
  const int32_t* indices() const { return indices_.data<int32_t>(); }
  const cuda::CodeRows& rows() const { return rows_; }

 private:
  Input values_, indices_, offsets_;
  cuda::CodeRows rows_{};
};

inline Tensor new_scratch(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

}  // namespace sae_fast::ops
