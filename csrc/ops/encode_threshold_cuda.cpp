// CUDA side of encode_threshold. How many entries a code has is known on the device only, so this
// op waits for it once; a code that is denser than expected costs a second product.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "ops/encode_cuda.h"

namespace sae_fast::ops {
namespace {

// offsets [N + 1 + extra] of counts [N + 1]; what is beyond N is the caller's.
Tensor offsets_of(const int64_t* counts, int64_t rows, const Tensor& like, int64_t extra) {
  const Tensor offsets = torch::stable::new_empty(like, {rows + 1 + extra}, ScalarType::Long);
  size_t bytes = 0;
  STD_CUDA_CHECK(cuda::offsets_scratch_bytes(rows, &bytes));
  const Tensor scratch = new_scratch(like, bytes);
  STD_CUDA_CHECK(cuda::count_offsets(counts, rows, mutable_data<int64_t>(offsets),
                                     scratch.mutable_data_ptr(), bytes, current_stream(like)));
  return offsets;
}

// Numbers from the device: how many entries a code has is known there only.
template <size_t kCount>
std::array<int64_t, kCount> read_back(const int64_t* from, cudaStream_t stream) {
  std::array<int64_t, kCount> numbers{};
  STD_CUDA_CHECK(cudaMemcpyAsync(numbers.data(), from, kCount * sizeof(int64_t),
                                 cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return numbers;
}

// A threshold code block by block. Each block is first given a room that most codes fit; where one
// does not, its product is made again with the room that it then is known to need.
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
  // Collects a block's candidates and keeps those that pass. Returns the number of entries, then 0
  // or, where a row had not enough room, more. The offsets stay in `offsets`.
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
  check_same_device(kOp, {{"x", x},
                          {"W_enc", W_enc},
                          {"b_enc", b_enc},
                          {"b_dec", b_dec},
                          {"threshold", threshold},
                          {"packed", packed},
                          {"stats", stats},
                          {"rounded", rounded}});
  const DeviceGuard guard(x.get_device_index());
  const CudaEncoder encoder(kOp, W_enc, b_enc, b_dec, precision, packed, stats, rounded);
  return ThresholdCode(x, encoder, threshold).result();
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("encode_threshold", TORCH_BOX(&sae_fast::ops::encode_threshold_cuda));
}
