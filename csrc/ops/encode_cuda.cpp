// CUDA side of the encoder ops: check, guard, allocate, and torch's products between the kernels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cuda/encode/batch.h"
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
                                    dtype_of(rounded), mutable_data<float>(stats),
                                    current_stream(W_enc)));
  return {packed, stats, rounded};
}

// `option` is the argument that only this op has.
void check_encoder_device(const char* op, const Tensor& x, const Tensor& W_enc, const Tensor& b_enc,
                          const Tensor& b_dec, const NamedTensor& option,
                          const OptionalTensor& packed, const OptionalTensor& stats,
                          const OptionalTensor& rounded) {
  check_same_device(op, {{"x", x},
                         {"W_enc", W_enc},
                         {"b_enc", b_enc},
                         {"b_dec", b_dec},
                         option,
                         {"packed", packed},
                         {"stats", stats},
                         {"rounded", rounded}});
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
  check_encoder_device(kOp, x, W_enc, b_enc, b_dec, {"dead_mask", dead_mask}, packed, stats,
                       rounded);
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

// ---- encode_batch_topk

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
  check_encoder_device(kOp, x, W_enc, b_enc, b_dec, {"dead_mask", dead_mask}, packed, stats,
                       rounded);
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

Tensor full_batches_cuda(const Tensor& like) {
  check_dtype("full_batches", "like", like, ScalarType::Float);
  const DeviceGuard guard(like.get_device_index());
  const Tensor count = torch::stable::new_empty(like, {}, ScalarType::Long);
  STD_CUDA_CHECK(cuda::read_full_batches(mutable_data<int64_t>(count), current_stream(like)));
  return count;
}

// ---- encode_threshold

// Returns offsets [N + 1 + extra] from counts [N]; the caller fills the last `extra`.
Tensor offsets_of(const int64_t* counts, int64_t rows, const Tensor& like, int64_t extra) {
  const Tensor offsets = torch::stable::new_empty(like, {rows + 1 + extra}, ScalarType::Long);
  STD_CUDA_CHECK(
      cuda::count_offsets(counts, rows, mutable_data<int64_t>(offsets), current_stream(like)));
  return offsets;
}

// Copies numbers from the device, which alone knows how many entries a code has; waits for it.
template <size_t kCount>
std::array<int64_t, kCount> read_back(const int64_t* from, cudaStream_t stream) {
  std::array<int64_t, kCount> numbers{};
  STD_CUDA_CHECK(cudaMemcpyAsync(numbers.data(), from, kCount * sizeof(int64_t),
                                 cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return numbers;
}

// A threshold code block by block. Each block first gets room that is enough for most codes; if it
// is not, the product is computed again with the room that is then known to be enough.
class ThresholdCode {
 public:
  ThresholdCode(const Tensor& x, const CudaEncoder& encoder, const Tensor& threshold)
      : x_(x),
        packed_(encoder),
        threshold_(threshold),
        plan_(plan_encode(x.size(0), encoder.encoder().d_sae, 0)),
        product_(x, encoder, plan_, 0),
        stream_(current_stream(x)),
        kept_(torch::stable::new_empty(x, {x.size(0) + 1}, ScalarType::Long)),
        counts_(torch::stable::new_empty(x, {plan_.rows + 1}, ScalarType::Long)),
        scratch_(
            new_scratch(x, cuda::threshold_scratch_bytes(plan_.rows, encoder.encoder().d_sae))) {
    product_.for_each_block([&](const cuda::Tokens& tokens, int64_t first) {
      add_block(tokens, mutable_data<int64_t>(kept_) + first);
    });
  }

  std::tuple<Tensor, Tensor, Tensor> result() {
    const Tensor offsets = offsets_of(mutable_data<int64_t>(kept_), x_.size(0), x_, 0);
    if (values_.size() == 1) return {values_[0], indices_[0], offsets};
    Tensor values = torch::stable::new_empty(x_, {entries_});
    Tensor indices = torch::stable::new_empty(x_, {entries_}, ScalarType::Int);
    int64_t first = 0;
    for (size_t block = 0; block < values_.size(); ++block) {
      const int64_t count = values_[block].size(0);
      Tensor value_part = torch::stable::narrow(values, 0, first, count);
      Tensor index_part = torch::stable::narrow(indices, 0, first, count);
      torch::stable::copy_(value_part, values_[block]);
      torch::stable::copy_(index_part, indices_[block]);
      first += count;
    }
    return {values, indices, offsets};
  }

 private:
  // Collects a block's candidates and keeps those that pass. Returns the number of entries, and a
  // number above 0 if a row had too little room. The offsets are in `offsets`.
  std::array<int64_t, 2> collect(const cuda::Tokens& tokens, const cuda::CandidateRows& rows,
                                 int64_t* kept, Tensor& offsets) {
    const cuda::Encoder& encoder = packed_.encoder();
    const auto* const limits = threshold_.data<float>();
    void* const pieces = scratch_.mutable_data_ptr();
    STD_CUDA_CHECK(cuda::begin_threshold(encoder, tokens, rows, pieces, stream_));
    product_.for_each_chunk(tokens.rows, [&](const cuda::Product& product) {
      STD_CUDA_CHECK(
          cuda::select_threshold(encoder, tokens, limits, product, rows, pieces, stream_));
    });
    const Tensor most = torch::stable::new_empty(x_, {1}, ScalarType::Long);
    STD_CUDA_CHECK(cuda::finish_threshold(encoder, tokens, limits, rows, kept,
                                          mutable_data<int64_t>(most), stream_));
    offsets = offsets_of(kept, tokens.rows, x_, 1);
    int64_t* const last = mutable_data<int64_t>(offsets) + tokens.rows;
    STD_CUDA_CHECK(cudaMemcpyAsync(last + 1, most.const_data_ptr(), sizeof(int64_t),
                                   cudaMemcpyDeviceToDevice, stream_));
    return read_back<2>(last, stream_);
  }

  void add_block(const cuda::Tokens& tokens, int64_t* kept) {
    constexpr int64_t kRoomEntries = int64_t{16} << 20;  // 128 MB
    const int64_t room = std::max<int64_t>(kRoomEntries / plan_.rows, 64);
    const int64_t capacity = std::min(room, packed_.encoder().d_sae);
    auto* const counts = mutable_data<int64_t>(counts_);
    Tensor values = torch::stable::new_empty(x_, {tokens.rows * capacity});
    Tensor indices = torch::stable::new_empty(x_, {tokens.rows * capacity}, ScalarType::Int);
    cuda::CandidateRows rows{mutable_data<float>(values), mutable_data<int32_t>(indices), nullptr,
                             capacity, counts};
    Tensor offsets = kept_, rooms = kept_;
    auto [entries, overflow] = collect(tokens, rows, kept, offsets);
    if (overflow > 0) {
      rooms = offsets_of(counts, tokens.rows, x_, 0);
      rows.offsets = static_cast<const int64_t*>(rooms.const_data_ptr());
      const int64_t needed = read_back<1>(rows.offsets + tokens.rows, stream_)[0];
      values = torch::stable::new_empty(x_, {needed});
      indices = torch::stable::new_empty(x_, {needed}, ScalarType::Int);
      rows.values = mutable_data<float>(values);
      rows.indices = mutable_data<int32_t>(indices);
      entries = collect(tokens, rows, kept, offsets)[0];
    }
    values_.push_back(torch::stable::new_empty(x_, {entries}));
    indices_.push_back(torch::stable::new_empty(x_, {entries}, ScalarType::Int));
    entries_ += entries;
    STD_CUDA_CHECK(cuda::gather_code(
        rows, tokens.rows, static_cast<const int64_t*>(offsets.const_data_ptr()),
        mutable_data<float>(values_.back()), mutable_data<int32_t>(indices_.back()), stream_));
  }

  Tensor x_;
  const CudaEncoder& packed_;
  Input threshold_;
  EncodePlan plan_;
  BlockProduct product_;
  cudaStream_t stream_;
  Tensor kept_;    // [N + 1]: entries of every row
  Tensor counts_;  // [plan.rows + 1]: candidates of a block's rows
  Tensor scratch_;
  std::vector<Tensor> values_, indices_;  // of the blocks
  int64_t entries_ = 0;
};

std::tuple<Tensor, Tensor, Tensor> encode_threshold_cuda(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec,
    const Tensor& threshold, const std::string& precision, const OptionalTensor& packed,
    const OptionalTensor& stats, const OptionalTensor& rounded) {
  constexpr const char* kOp = "encode_threshold";
  check_encoder(kOp, x, W_enc, b_enc, b_dec, precision);
  check_float(kOp, "threshold", threshold, {W_enc.size(0)});
  check_encoder_device(kOp, x, W_enc, b_enc, b_dec, {"threshold", threshold}, packed, stats,
                       rounded);
  const DeviceGuard guard(x.get_device_index());
  const CudaEncoder encoder(kOp, W_enc, b_enc, b_dec, precision, packed, stats, rounded);
  return ThresholdCode(x, encoder, threshold).result();
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
  encoder_.rounded = {rounded_->const_data_ptr(), dtype_of(*rounded_)};
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
  m.impl("encode_batch_topk", TORCH_BOX(&sae_fast::ops::encode_batch_topk_cuda));
  m.impl("full_batches", TORCH_BOX(&sae_fast::ops::full_batches_cuda));
  m.impl("encode_threshold", TORCH_BOX(&sae_fast::ops::encode_threshold_cuda));
}
