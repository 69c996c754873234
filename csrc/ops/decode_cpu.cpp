// CPU side of the decoder ops: check, allocate, call.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "ops/cpu.h"
#include "ops/decode.h"

namespace sae_fast::ops {
namespace {

Tensor decode(const Tensor& values, const Tensor& indices, const OptionalTensor& offsets,
              const Tensor& W_dec, const OptionalTensor& b_dec) {
  constexpr const char* kOp = "decode";
  check_decoder(kOp, W_dec, b_dec);
  const CodeInput code(kOp, values, indices, offsets, W_dec.size(0));
  const Input rows(W_dec), bias(b_dec);
  const Tensor x_hat =
      torch::stable::new_empty(values, {code.code().tokens, W_dec.size(1)}, ScalarType::Float);
  if (x_hat.numel() == 0) return x_hat;  // of no columns there may be any number of rows
  const cpu::Decoder decoder{dtype_of(W_dec), rows.data<void>(), bias.data<float>(), W_dec.size(0),
                             W_dec.size(1)};
  check_memory(kOp,
               cpu::kernels().decode(code.code(), decoder, mutable_data<float>(x_hat), parallel()));
  return x_hat;
}

Tensor decode_backward(const Tensor& grad, const Tensor& indices, const OptionalTensor& offsets,
                       const Tensor& W_dec) {
  constexpr const char* kOp = "decode_backward";
  check_decoder(kOp, W_dec, std::nullopt);
  const CodeInput code(kOp, std::nullopt, indices, offsets, W_dec.size(0));
  check_float(kOp, "grad", grad, {code.code().tokens, W_dec.size(1)});
  const Input rows(W_dec), output_grad(grad);
  const Tensor grad_values = torch::stable::new_empty(indices, indices.sizes(), ScalarType::Float);
  const cpu::Decoder decoder{dtype_of(W_dec), rows.data<void>(), nullptr, W_dec.size(0),
                             W_dec.size(1)};
  check_memory(kOp, cpu::kernels().decode_backward(code.code(), decoder, output_grad.data<float>(),
                                                   mutable_data<float>(grad_values), parallel()));
  return grad_values;
}

std::tuple<Tensor, Tensor, Tensor> reconstruct(const Tensor& values, const Tensor& indices,
                                               const OptionalTensor& offsets, const Tensor& W_dec,
                                               const OptionalTensor& b_dec, const Tensor& x) {
  constexpr const char* kOp = "reconstruct";
  check_decoder(kOp, W_dec, b_dec);
  const CodeInput code(kOp, values, indices, offsets, W_dec.size(0));
  const int64_t tokens = code.code().tokens;
  check_float(kOp, "x", x, {tokens, W_dec.size(1)});
  const Input rows(W_dec), bias(b_dec), target(x);
  const Tensor residual = torch::stable::new_empty(x, {tokens, W_dec.size(1)}, W_dec.scalar_type());
  const Tensor squared_error = torch::stable::new_empty(x, {tokens});
  const Tensor residual_dot = torch::stable::new_empty(values, indices.sizes());
  if (W_dec.size(1) == 0) {  // sums of nothing
    std::fill_n(mutable_data<float>(squared_error), tokens, 0.0f);
    std::fill_n(mutable_data<float>(residual_dot), code.entries(), 0.0f);
    return {residual, squared_error, residual_dot};
  }
  const cpu::Decoder decoder{dtype_of(W_dec), rows.data<void>(), bias.data<float>(), W_dec.size(0),
                             W_dec.size(1)};
  const cpu::Reconstruction outputs{target.data<float>(), residual.mutable_data_ptr(),
                                    mutable_data<float>(squared_error),
                                    mutable_data<float>(residual_dot)};
  check_memory(kOp, cpu::kernels().reconstruct(code.code(), decoder, outputs, parallel()));
  return {residual, squared_error, residual_dot};
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CPU, m) {
  SAE_FAST_IMPL(m, "decode", &sae_fast::ops::decode);
  SAE_FAST_IMPL(m, "decode_backward", &sae_fast::ops::decode_backward);
  SAE_FAST_IMPL(m, "reconstruct", &sae_fast::ops::reconstruct);
}
