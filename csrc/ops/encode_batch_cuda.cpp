// CUDA side of encode_batch_topk: one list of candidates for the whole batch, and beside it the
// lists of the dead latents, row by row, as encode_topk makes them.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "kernels/cuda/encode_batch.h"
#include "ops/encode_cuda.h"

namespace sae_fast::ops {
namespace {

// The dead latents' part of a block's tokens; the main lists are the batch's.
cuda::TopK aux_of_block(const cuda::TopK& aux, int64_t first) {
  cuda::TopK block = aux;
  block.aux_values += flat_index(first, aux.k_aux, 0);
  block.aux_indices += flat_index(first, aux.k_aux, 0);
  return block;
}

// `aux` has k = 0.
void run_batch(const Tensor& x, const CudaEncoder& packed, const cuda::BatchSize& size,
               const cuda::TopK& aux, const cuda::BatchCode& code) {
  const cuda::Encoder& encoder = packed.encoder();
  const cudaStream_t stream = current_stream(x);
  bool streams = false;
  STD_CUDA_CHECK(cuda::topk_streams(0, aux.k_aux, &streams));
  const int64_t listed = streams ? aux.k_aux : 0;  // what the rows' lists hold
  const EncodePlan plan = plan_encode(size.tokens, encoder.d_sae, cuda::topk_row_bytes(0, listed));
  BlockProduct blocks(x, packed, plan,
                      aux.k_aux > 0 ? cuda::exact_bytes(encoder.d_sae, 0, aux.k_aux) : 0);
  const Tensor block_scratch =
      new_scratch(x, cuda::topk_scratch_bytes(plan.rows, encoder.d_sae, 0, listed));
  size_t bytes = 0;
  STD_CUDA_CHECK(cuda::batch_scratch_bytes(size, &bytes));
  const Tensor scratch = new_scratch(x, bytes);
  void* const batch = scratch.mutable_data_ptr();
  void* const pieces = block_scratch.mutable_data_ptr();
  const float* all_x = nullptr;
  cuda::Tightening tightening;
  STD_CUDA_CHECK(cuda::begin_batch(size, batch, stream));
  blocks.for_each_block([&](const cuda::Tokens& tokens, int64_t first) {
    if (first == 0) all_x = tokens.x;
    cuda::TopK dead = aux_of_block(aux, first);
    const cuda::BlockScratch block{pieces, listed, first};
    dead.k_aux = listed;
    STD_CUDA_CHECK(cuda::begin_topk(encoder, tokens, dead, pieces, stream));
    STD_CUDA_CHECK(cuda::add_block(encoder, tokens, size, block, batch, stream));
    blocks.for_each_chunk(tokens.rows, [&](const cuda::Product& product) {
      const bool due = tightening.due(tokens.rows * product.columns);
      STD_CUDA_CHECK(cuda::select_batch(encoder, tokens, size, product, due, block, batch, stream));
      STD_CUDA_CHECK(cuda::select_topk(encoder, tokens, dead, product, pieces, stream));
    });
    dead.k_aux = aux.k_aux;
    if (aux.k_aux == 0) return;
    STD_CUDA_CHECK(streams
                       ? cuda::finish_topk(encoder, tokens, dead, blocks.memory(), pieces, stream)
                       : cuda::exact_topk(encoder, tokens, dead, blocks.memory(), stream));
  });
  STD_CUDA_CHECK(cuda::finish_batch(encoder, all_x, size, code, batch, stream));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> encode_batch_topk_cuda(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec, int64_t k,
    const std::string& precision, const OptionalTensor& dead_mask, int64_t k_aux,
    const OptionalTensor& packed, const OptionalTensor& stats, const OptionalTensor& rounded) {
  constexpr const char* kOp = "encode_batch_topk";
  check_encoder(kOp, x, W_enc, b_enc, b_dec, precision);
  check_selection(kOp, W_enc.size(0), k, dead_mask, k_aux);
  const cuda::BatchSize size{x.size(0), W_enc.size(0), k};
  SAE_FAST_CHECK(size.tokens <= INT32_MAX / k, kOp, ": at most ", INT32_MAX, " entries, got ",
                 size.tokens, " * ", k);
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
  const Tensor values = torch::stable::new_empty(x, {size.wanted()});
  const Tensor indices = torch::stable::new_empty(x, {size.wanted()}, ScalarType::Int);
  const Tensor offsets = torch::stable::new_zeros(x, {size.tokens + 1}, ScalarType::Long);
  const Tensor aux_values = torch::stable::new_empty(x, {size.tokens, k_aux});
  const Tensor aux_indices = torch::stable::new_empty(x, {size.tokens, k_aux}, ScalarType::Int);
  if (size.tokens > 0) {
    run_batch(x, encoder, size,
              {dead.data<bool>(), 0, k_aux, nullptr, nullptr, mutable_data<float>(aux_values),
               mutable_data<int32_t>(aux_indices)},
              {mutable_data<float>(values), mutable_data<int32_t>(indices),
               mutable_data<int64_t>(offsets)});
  }
  return {values, indices, offsets, aux_values, aux_indices};
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("encode_batch_topk", TORCH_BOX(&sae_fast::ops::encode_batch_topk_cuda));
}
