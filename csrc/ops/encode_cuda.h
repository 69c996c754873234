// Parts that the CUDA encoder ops share: the packed encoder, and the walk over blocks of tokens and
// chunks of latents with the library's product of each.
#pragma once

#include <algorithm>
#include <string>

#include "kernels/common/encode_plan.h"
#include "kernels/cuda/encode/encode.h"
#include "ops/cuda.h"
#include "ops/encode.h"
#include "ops/product_cuda.h"

namespace sae_fast::ops {

// The packed encoder of a call: the caller's, or one made for the call.
class CudaEncoder {
 public:
  CudaEncoder(const char* op, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec,
              const std::string& precision, const OptionalTensor& packed,
              const OptionalTensor& stats, const OptionalTensor& rounded);

  const cuda::Encoder& encoder() const { return encoder_; }
  Tensor rounded() const { return *rounded_; }

 private:
  Input W_enc_, b_enc_, b_dec_;
  OptionalTensor stats_, rounded_;
  cuda::Encoder encoder_{};
};

// The memory of a call, and its walk over blocks of tokens and chunks of latents.
class BlockProduct {
 public:
  BlockProduct(const Tensor& x, const CudaEncoder& encoder, const EncodePlan& plan,
               int64_t least_bytes)
      : x_(torch::stable::contiguous(x)),
        rounded_(encoder.rounded()),
        plan_(plan),
        rounded_x_(torch::stable::new_empty(x, {plan.rows, x.size(1)}, rounded_.scalar_type())),
        product_(torch::stable::new_empty(
            x, {std::max(plan.product_elements(), (least_bytes + 3) / 4)})) {}

  // Calls call(tokens, index of the first of them) for each block.
  template <typename Call>
  void for_each_block(Call&& call) const {
    for (int64_t first = 0; first < x_.size(0); first += plan_.rows) {
      const float* const x = static_cast<const float*>(x_.const_data_ptr());
      call(cuda::Tokens{x + flat_index(first, x_.size(1), 0), rounded_x_.mutable_data_ptr(),
                        std::min(plan_.rows, x_.size(0) - first)},
           first);
    }
  }

  // Calls call(product) for each chunk, once the block's tokens are rounded.
  template <typename Call>
  void for_each_chunk(int64_t rows, Call&& call) {
    const Tensor tokens = torch::stable::narrow(rounded_x_, 0, 0, rows);
    for (int64_t first = 0; first < rounded_.size(0); first += plan_.columns) {
      const int64_t columns = std::min(plan_.columns, rounded_.size(0) - first);
      Tensor elements = torch::stable::narrow(product_, 0, 0, rows * columns);
      const Tensor latents = torch::stable::narrow(rounded_, 0, first, columns);
      product_into(torch::stable::view(elements, {rows, columns}), tokens,
                   torch::stable::transpose(latents, 0, 1));
      call(cuda::Product{static_cast<const float*>(product_.const_data_ptr()), first, columns});
    }
  }

  cuda::Memory memory() const {
    return {product_.mutable_data_ptr(), product_.numel() * static_cast<int64_t>(sizeof(float))};
  }

 private:
  Tensor x_, rounded_;
  EncodePlan plan_;
  Tensor rounded_x_;  // [plan.rows, D]
  Tensor product_;    // [>= plan.rows * plan.columns]
};

}  // namespace sae_fast::ops
