// CUDA side of the decoder ops: check, guard, allocate, call.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "kernels/cuda/decode.h"
#include "ops/cuda.h"
#include "ops/decode.h"

namespace sae_fast::ops {
namespace {

Tensor decode(const Tensor& values, const Tensor& indices, const OptionalTensor& offsets,
              const Tensor& W_dec, const OptionalTensor& b_dec) {
  constexpr const char* kOp = "decode";
  check_decoder(kOp, W_dec, b_dec);
  check_same_device(kOp, {{"values", values},
                          {"indices", indices},
                          {"offsets", offsets},
                          {"W_dec", W_dec},
                          {"b_dec", b_dec}});
  const DeviceGuard guard(values.get_device_index());
  const CudaCode code(kOp, values, indices, offsets);
  const Input weights(W_dec), bias(b_dec);
  const int64_t d_in = W_dec.size(1);
  const Tensor x_hat = torch::stable::new_empty(values, {code.rows().rows, d_in});
  STD_CUDA_CHECK(cuda::decode(code.values(), code.indices(), code.rows(),
                              {weights.data<void>(), dtype_of(W_dec)}, bias.data<float>(),
                              mutable_data<float>(x_hat), d_in, current_stream(values)));
  return x_hat;
}

Tensor decode_backward(const Tensor& grad, const Tensor& indices, const OptionalTensor& offsets,
                       const Tensor& W_dec) {
  constexpr const char* kOp = "decode_backward";
  check_decoder(kOp, W_dec, std::nullopt);
  check_same_device(kOp,
                    {{"grad", grad}, {"indices", indices}, {"offsets", offsets}, {"W_dec", W_dec}});
  const DeviceGuard guard(grad.get_device_index());
  const CudaCode code(kOp, std::nullopt, indices, offsets);
  const int64_t d_in = W_dec.size(1);
  check_float(kOp, "grad", grad, {code.rows().rows, d_in});
  const Input weights(W_dec), output_grad(grad);
  const Tensor grad_values = torch::stable::new_empty(grad, indices.sizes());
  STD_CUDA_CHECK(cuda::decode_backward(output_grad.data<float>(), code.indices(), code.rows(),
                                       {weights.data<void>(), dtype_of(W_dec)},
                                       mutable_data<float>(grad_values), d_in,
                                       current_stream(grad)));
  return grad_values;
}

std::tuple<Tensor, Tensor, Tensor> reconstruct(const Tensor& values, const Tensor& indices,
                                               const OptionalTensor& offsets, const Tensor& W_dec,
                                               const OptionalTensor& b_dec, const Tensor& x) {
  constexpr const char* kOp = "reconstruct";
  check_decoder(kOp, W_dec, b_dec);
  check_same_device(kOp, {{"values", values},
                          {"indices", indices},
                          {"offsets", offsets},
                          {"W_dec", W_dec},
                          {"b_dec", b_dec},
                          {"x", x}});
  const DeviceGuard guard(values.get_device_index());
  const CudaCode code(kOp, values, indices, offsets);
  const int64_t tokens = code.rows().rows;
  const int64_t d_in = W_dec.size(1);
  check_float(kOp, "x", x, {tokens, d_in});
  const Input weights(W_dec), bias(b_dec), target(x);
  const Tensor residual = torch::stable::new_empty(x, {tokens, d_in}, W_dec.scalar_type());
  const Tensor squared_error = torch::stable::new_empty(x, {tokens});
  const Tensor residual_dot = torch::stable::new_empty(values, indices.sizes());
  STD_CUDA_CHECK(cuda::reconstruct(
      code.values(), code.indices(), code.rows(), {weights.data<void>(), dtype_of(W_dec)},
      bias.data<float>(), target.data<float>(), residual.mutable_data_ptr(),
      mutable_data<float>(squared_error), mutable_data<float>(residual_dot), d_in,
      current_stream(values)));
  return {residual, squared_error, residual_dot};
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("decode", TORCH_BOX(&sae_fast::ops::decode));
  m.impl("decode_backward", TORCH_BOX(&sae_fast::ops::decode_backward));
  m.impl("reconstruct", TORCH_BOX(&sae_fast::ops::reconstruct));
}
