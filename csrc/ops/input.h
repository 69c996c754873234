// Tensors as the kernels read and write them: contiguous, as plain pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace sae_fast::ops {

// An input; keeps the contiguous copy alive, if one was needed.
class Input {
 public:
  explicit Input(const torch::stable::Tensor& tensor)
      : tensor_(torch::stable::contiguous(tensor)) {}
  explicit Input(const std::optional<torch::stable::Tensor>& tensor) {
    if (tensor.has_value()) tensor_ = torch::stable::contiguous(*tensor);
  }

  template <class T>
  const T* data() const {
    return tensor_.has_value() ? static_cast<const T*>(tensor_->const_data_ptr()) : nullptr;
  }

 private:
  std::optional<torch::stable::Tensor> tensor_;
};

template <class T>
T* mutable_data(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace sae_fast::ops
