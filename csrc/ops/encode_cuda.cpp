// CUDA side of the encoder ops: check, guard, allocate, and the library's products in between.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "kernels/cuda/encode.h"
#include "ops/cuda.h"
#include "ops/encode.h"

namespace sae_fast::ops {
namespace {

// "screened" and "fp32" are one path here: bfloat16 screens, float32 scores.
bool is_exact(const std::string& precision) {
  return precision == "screened" || precision == "fp32";
}

ScalarType rounded_type(const std::string& precision) {
  return precision == "fp16" ? ScalarType::Half : ScalarType::BFloat16;
}

// packed [0] is there for the CPU's sake; rounded [F, D]; stats [2, F] bound |w_j| and
// |w_j - rounded_j|.
std::tuple<Tensor, Tensor, Tensor> pack_encoder_cuda(const Tensor& W_enc,
                                                     const std::string& precision) {
  constexpr const char* kOp = "pack_encoder";
  check_float(kOp, "W_enc", W_enc, {kAnySize, kAnySize});
  check_precision(kOp, precision);
  const DeviceGuard guard(W_enc.get_device_index());
  const Input rows(W_enc);
  const int64_t d_sae = W_enc.size(0);
  const int64_t d_in = W_enc.size(1);
  const Tensor packed = torch::stable::new_empty(W_enc, {0}, ScalarType::Short);
  const Tensor stats = torch::stable::new_empty(W_enc, {2, d_sae});
  const Tensor rounded = torch::stable::new_empty(W_enc, {d_sae, d_in}, rounded_type(precision));
  STD_CUDA_CHECK(cuda::pack_encoder(rows.data<float>(), d_sae, d_in, rounded.mutable_data_ptr(),
                                    data_type(rounded), mutable_data<float>(stats),
                                    current_stream(W_enc)));
  return {packed, stats, rounded};
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("pack_encoder", TORCH_BOX(&sae_fast::ops::pack_encoder_cuda));
}
