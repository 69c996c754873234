// CUDA side of pack_encoder and encode_topk: check, guard, allocate, and the library's products in
// between.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "ops/encode_cuda.h"

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

// The part of a result that belongs to the tokens from `first` on.
cuda::TopK topk_of_block(const cuda::TopK& topk, int64_t first) {
  cuda::TopK block = topk;
  block.values += flat_index(first, topk.k, 0);
  block.indices += flat_index(first, topk.k, 0);
  block.aux_values += flat_index(first, topk.k_aux, 0);
  block.aux_indices += flat_index(first, topk.k_aux, 0);
  return block;
}

void run_topk(const Tensor& x, const CudaEncoder& packed, const cuda::TopK& topk) {
  const cuda::Encoder& encoder = packed.encoder();
  const cudaStream_t stream = current_stream(x);
  const int64_t exact_bytes = cuda::exact_bytes(encoder.d_sae, topk.k, topk.k_aux);
  bool streams = false;
  STD_CUDA_CHECK(cuda::topk_streams(topk.k, topk.k_aux, &streams));
  const int64_t row_bytes = streams ? cuda::topk_row_bytes(topk.k, topk.k_aux) : 0;
  const EncodePlan plan = plan_encode(x.size(0), encoder.d_sae, row_bytes);
  BlockProduct blocks(x, packed, plan, exact_bytes);
  const Tensor scratch = new_scratch(
      x, streams ? cuda::topk_scratch_bytes(plan.rows, encoder.d_sae, topk.k, topk.k_aux) : 0);
  void* const pieces = scratch.mutable_data_ptr();
  blocks.for_each_block([&](const cuda::Tokens& tokens, int64_t first) {
    const cuda::TopK block = topk_of_block(topk, first);
    if (!streams) {
      STD_CUDA_CHECK(cuda::exact_topk(encoder, tokens, block, blocks.memory(), stream));
      return;
    }
    STD_CUDA_CHECK(cuda::begin_topk(encoder, tokens, block, pieces, stream));
    blocks.for_each_chunk(tokens.rows, [&](const cuda::Product& product) {
      STD_CUDA_CHECK(cuda::select_topk(encoder, tokens, block, product, pieces, stream));
    });
    STD_CUDA_CHECK(cuda::finish_topk(encoder, tokens, block, blocks.memory(), pieces, stream));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_topk_cuda(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec, int64_t k,
    const std::string& precision, const OptionalTensor& dead_mask, int64_t k_aux,
    const OptionalTensor& packed, const OptionalTensor& stats, const OptionalTensor& rounded) {
  constexpr const char* kOp = "encode_topk";
  check_encoder(kOp, x, W_enc, b_enc, b_dec, precision);
  check_selection(kOp, W_enc.size(0), k, dead_mask, k_aux);
  check_same_device(kOp, {{"x", x},
                          {"W_enc", W_enc},
                          {"b_enc", b_enc},
                          {"b_dec", b_dec},
                          {"dead_mask", dead_mask},
                          {"packed", packed},
                          {"stats", stats},
                          {"rounded", rounded}});
  const DeviceGuard guard(x.get_device_index());
  const CudaEncoder encoder(kOp, W_enc, b_enc, b_dec, precision, packed, stats, rounded);
  const Input dead(dead_mask);
  const int64_t tokens = x.size(0);
  const Tensor values = torch::stable::new_empty(x, {tokens, k});
  const Tensor indices = torch::stable::new_empty(x, {tokens, k}, ScalarType::Int);
  const Tensor aux_values = torch::stable::new_empty(x, {tokens, k_aux});
  const Tensor aux_indices = torch::stable::new_empty(x, {tokens, k_aux}, ScalarType::Int);
  if (tokens > 0) {
    run_topk(
        x, encoder,
        {dead.data<bool>(), k, k_aux, mutable_data<float>(values), mutable_data<int32_t>(indices),
         mutable_data<float>(aux_values), mutable_data<int32_t>(aux_indices)});
  }
  return {values, indices, aux_values, aux_indices};
}

}  // namespace

CudaEncoder::CudaEncoder(const char* op, const Tensor& W_enc, const Tensor& b_enc,
                         const Tensor& b_dec, const std::string& precision,
                         const OptionalTensor& packed, const OptionalTensor& stats,
                         const OptionalTensor& rounded)
    : W_enc_(W_enc), b_enc_(b_enc), b_dec_(b_dec) {
  if (packed.has_value() && stats.has_value() && rounded.has_value()) {
    check_float(op, "stats", *stats, {2, W_enc.size(0)});
    check_shape(op, "rounded", *rounded, {W_enc.size(0), W_enc.size(1)});
    check_dtype(op, "rounded", *rounded, rounded_type(precision));
    check_contiguous(op, "stats", *stats);
    check_contiguous(op, "rounded", *rounded);
    stats_ = stats;
    rounded_ = rounded;
  } else {
    auto [no_packed, made_stats, made_rounded] = pack_encoder_cuda(W_enc, precision);
    stats_ = made_stats;
    rounded_ = made_rounded;
  }
  encoder_.W_enc = W_enc_.data<float>();
  encoder_.rounded = {rounded_->const_data_ptr(), data_type(*rounded_)};
  encoder_.stats = static_cast<const float*>(stats_->const_data_ptr());
  encoder_.b_enc = b_enc_.data<float>();
  encoder_.b_dec = b_dec_.data<float>();
  encoder_.d_sae = W_enc.size(0);
  encoder_.d_in = W_enc.size(1);
  encoder_.exact = is_exact(precision);
}

}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("pack_encoder", TORCH_BOX(&sae_fast::ops::pack_encoder_cuda));
  m.impl("encode_topk", TORCH_BOX(&sae_fast::ops::encode_topk_cuda));
}
