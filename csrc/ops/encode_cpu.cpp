// CPU side of the encoder ops: check, allocate, call.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "ops/cpu.h"
#include "ops/encode.h"
#include "ops/packed_encoder.h"

namespace sae_fast::ops {
namespace {

DType scoring_type(const std::string& precision) {
  if (precision == "bf16") return DType::kBFloat16;
  return precision == "fp16" ? DType::kFloat16 : DType::kFloat32;
}

// The packed encoder of a call: the caller's, or one made for the call.
class EncoderInput {
 public:
  EncoderInput(const char* op, const Tensor& W_enc, const std::string& precision,
               const OptionalTensor& packed, const OptionalTensor& stats,
               const OptionalTensor& rounded)
      : W_enc_(W_enc) {
    if (packed.has_value() && stats.has_value() && rounded.has_value()) {
      packed_ = packed;
      stats_ = stats;
      rounded_ = rounded;
      check_packed(op, W_enc, precision, *packed, *stats, *rounded);
    } else {
      SAE_FAST_CHECK(!packed.has_value() && !stats.has_value() && !rounded.has_value(), op,
                     ": packed, stats and rounded must be given together");
      auto [made_packed, made_stats, made_rounded] = pack_encoder(W_enc, precision);
      packed_ = made_packed;
      stats_ = made_stats;
      rounded_ = made_rounded;
    }
    encoder_ = packed_encoder(W_enc, precision, *packed_, *stats_, *rounded_);
    encoder_.W_enc = W_enc_.data<float>();
  }

  const cpu::PackedEncoder& encoder() const { return encoder_; }

 private:
  Input W_enc_;
  OptionalTensor packed_, stats_, rounded_;
  cpu::PackedEncoder encoder_{};
};

cpu::TopKProblem topk_problem(const EncoderInput& encoder, const Input& x, const Input& b_enc,
                              const Input& b_dec, int64_t tokens) {
  cpu::TopKProblem problem{};
  problem.encoder = encoder.encoder();
  problem.x = x.data<float>();
  problem.b_enc = b_enc.data<float>();
  problem.b_dec = b_dec.data<float>();
  problem.tokens = tokens;
  return problem;
}

// The part that encode_topk and encode_batch_topk share; the caller lays out values and indices.
struct AuxCode {
  Tensor values, indices;  // [N, k_aux]
};

AuxCode new_aux_code(const Tensor& x, int64_t k_aux) {
  return {torch::stable::new_empty(x, {x.size(0), k_aux}),
          torch::stable::new_empty(x, {x.size(0), k_aux}, ScalarType::Int)};
}

void set_outputs(cpu::TopKProblem& problem, int64_t k, const Tensor& values, const Tensor& indices,
                 int64_t k_aux, const Input& dead, const AuxCode& aux) {
  problem.dead_mask = k_aux > 0 ? dead.data<bool>() : nullptr;
  problem.k = k;
  problem.k_aux = k_aux;
  problem.values = mutable_data<float>(values);
  problem.indices = mutable_data<int32_t>(indices);
  problem.aux_values = mutable_data<float>(aux.values);
  problem.aux_indices = mutable_data<int32_t>(aux.indices);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_topk(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec, int64_t k,
    const std::string& precision, const OptionalTensor& dead_mask, int64_t k_aux,
    const OptionalTensor& packed, const OptionalTensor& stats, const OptionalTensor& rounded) {
  constexpr const char* kOp = "encode_topk";
  check_encoder(kOp, x, W_enc, b_enc, b_dec, precision);
  check_selection(kOp, W_enc.size(0), k, dead_mask, k_aux);
  const EncoderInput encoder(kOp, W_enc, precision, packed, stats, rounded);
  const Input tokens(x), encoder_bias(b_enc), decoder_bias(b_dec), dead(dead_mask);
  const int64_t n = x.size(0);
  const Tensor values = torch::stable::new_empty(x, {n, k});
  const Tensor indices = torch::stable::new_empty(x, {n, k}, ScalarType::Int);
  const AuxCode aux = new_aux_code(x, k_aux);
  cpu::TopKProblem problem = topk_problem(encoder, tokens, encoder_bias, decoder_bias, n);
  set_outputs(problem, k, values, indices, k_aux, dead, aux);
  check_memory(kOp, cpu::kernels().encode_topk(problem, parallel()));
  return {values, indices, aux.values, aux.indices};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> encode_batch_topk(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec, int64_t k,
    const std::string& precision, const OptionalTensor& dead_mask, int64_t k_aux,
    const OptionalTensor& packed, const OptionalTensor& stats, const OptionalTensor& rounded) {
  constexpr const char* kOp = "encode_batch_topk";
  check_encoder(kOp, x, W_enc, b_enc, b_dec, precision);
  check_selection(kOp, W_enc.size(0), k, dead_mask, k_aux);
  const int64_t n = x.size(0);
  SAE_FAST_CHECK(n <= INT32_MAX / k, kOp, ": at most ", INT32_MAX, " entries, got ", n, " * ", k);
  const EncoderInput encoder(kOp, W_enc, precision, packed, stats, rounded);
  const Input tokens(x), encoder_bias(b_enc), decoder_bias(b_dec), dead(dead_mask);
  const Tensor values = torch::stable::new_empty(x, {n * k});
  const Tensor indices = torch::stable::new_empty(x, {n * k}, ScalarType::Int);
  const Tensor offsets = torch::stable::new_empty(x, {n + 1}, ScalarType::Long);
  const AuxCode aux = new_aux_code(x, k_aux);
  cpu::TopKProblem problem = topk_problem(encoder, tokens, encoder_bias, decoder_bias, n);
  set_outputs(problem, k, values, indices, k_aux, dead, aux);
  check_memory(
      kOp, cpu::kernels().encode_batch_topk(problem, mutable_data<int64_t>(offsets), parallel()));
  return {values, indices, offsets, aux.values, aux.indices};
}

Tensor full_batches(const Tensor& like) {
  check_dtype("full_batches", "like", like, ScalarType::Float);
  return torch::stable::new_zeros(like, {}, ScalarType::Long);
}

// Collects rows of a threshold code as they are found.
class RowSink : public cpu::ThresholdSink {
 public:
  explicit RowSink(int64_t tokens) : rows_(static_cast<size_t>(tokens)) {}

  bool row(int64_t token, const float* values, const int32_t* indices, int64_t count) override {
    try {
      Row& to = rows_[static_cast<size_t>(token)];
      to.values.assign(values, values + count);
      to.indices.assign(indices, indices + count);
    } catch (const std::bad_alloc&) {
      return false;
    }
    return true;
  }

  // Returns the number of entries.
  int64_t write_offsets(int64_t* offsets) const {
    offsets[0] = 0;
    for (size_t token = 0; token < rows_.size(); ++token) {
      offsets[token + 1] = offsets[token] + static_cast<int64_t>(rows_[token].values.size());
    }
    return offsets[rows_.size()];
  }

  void write_entries(float* values, int32_t* indices) const {
    for (const Row& row : rows_) {
      values = std::copy(row.values.begin(), row.values.end(), values);
      indices = std::copy(row.indices.begin(), row.indices.end(), indices);
    }
  }

 private:
  struct Row {
    std::vector<float> values;
    std::vector<int32_t> indices;
  };
  std::vector<Row> rows_;
};

std::tuple<Tensor, Tensor, Tensor> encode_threshold(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const Tensor& b_dec,
    const Tensor& threshold, const std::string& precision, const OptionalTensor& packed,
    const OptionalTensor& stats, const OptionalTensor& rounded) {
  constexpr const char* kOp = "encode_threshold";
  check_encoder(kOp, x, W_enc, b_enc, b_dec, precision);
  check_float(kOp, "threshold", threshold, {W_enc.size(0)});
  const EncoderInput encoder(kOp, W_enc, precision, packed, stats, rounded);
  const Input tokens(x), encoder_bias(b_enc), decoder_bias(b_dec), limits(threshold);
  const int64_t n = x.size(0);
  cpu::ThresholdProblem problem{};
  problem.encoder = encoder.encoder();
  problem.x = tokens.data<float>();
  problem.b_enc = encoder_bias.data<float>();
  problem.b_dec = decoder_bias.data<float>();
  problem.threshold = limits.data<float>();
  problem.tokens = n;
  const Tensor offsets = torch::stable::new_empty(x, {n + 1}, ScalarType::Long);
  RowSink sink(n);
  check_memory(kOp, cpu::kernels().encode_threshold(problem, sink, parallel()));
  const int64_t entries = sink.write_offsets(mutable_data<int64_t>(offsets));
  const Tensor values = torch::stable::new_empty(x, {entries});
  const Tensor indices = torch::stable::new_empty(x, {entries}, ScalarType::Int);
  sink.write_entries(mutable_data<float>(values), mutable_data<int32_t>(indices));
  return {values, indices, offsets};
}

}  // namespace

cpu::PackedEncoder packed_encoder(const Tensor& W_enc, const std::string& precision,
                                  const Tensor& packed, const Tensor& stats,
                                  const Tensor& rounded) {
  cpu::PackedEncoder encoder{};
  encoder.screen = precision == "fp32" ? cpu::Screen::kFloat : cpu::Screen::kNarrow;
  encoder.type = scoring_type(precision);
  encoder.packed = packed.mutable_data_ptr();
  encoder.stats = mutable_data<float>(stats);
  encoder.rounded = encoder.type == DType::kFloat32 ? nullptr : rounded.mutable_data_ptr();
  encoder.d_sae = W_enc.size(0);
  encoder.d_in = W_enc.size(1);
  return encoder;
}

void check_rounded_dtype(const char* op, const std::string& precision, const Tensor& rounded) {
  check_dtype(op, "rounded", rounded,
              precision == "bf16" ? ScalarType::BFloat16 : ScalarType::Half);
}

void check_packed(const char* op, const Tensor& W_enc, const std::string& precision,
                  const Tensor& packed, const Tensor& stats, const Tensor& rounded) {
  const int64_t panels = cpu::panels(W_enc.size(0));
  if (precision == "fp32") {
    check_float(op, "packed", packed, {panels, W_enc.size(1), cpu::kPanelLatents});
  } else {
    const int64_t steps = cpu::packed_steps(cpu::Screen::kNarrow, W_enc.size(1));
    check_shape(op, "packed", packed, {panels, steps, cpu::kPanelLatents, 2});
    check_dtype(op, "packed", packed, ScalarType::Short);
  }
  check_float(op, "stats", stats, {4, panels * cpu::kPanelLatents});
  if (scoring_type(precision) != DType::kFloat32) {
    check_shape(op, "rounded", rounded, {W_enc.size(0), W_enc.size(1)});
    check_rounded_dtype(op, precision, rounded);
    check_contiguous(op, "rounded", rounded);
  }
  check_contiguous(op, "packed", packed);
  check_contiguous(op, "stats", stats);
}

std::tuple<Tensor, Tensor, Tensor> pack_encoder(const Tensor& W_enc, const std::string& precision) {
  constexpr const char* kOp = "pack_encoder";
  check_float(kOp, "W_enc", W_enc, {kAnySize, kAnySize});
  check_latents(kOp, W_enc);
  check_precision(kOp, precision);
  const int64_t d_sae = W_enc.size(0);
  const int64_t d_in = W_enc.size(1);
  const int64_t panels = cpu::panels(d_sae);
  const Tensor packed =
      precision == "fp32"
          ? torch::stable::new_empty(W_enc, {panels, d_in, cpu::kPanelLatents})
          : torch::stable::new_empty(
                W_enc,
                {panels, cpu::packed_steps(cpu::Screen::kNarrow, d_in), cpu::kPanelLatents, 2},
                ScalarType::Short);
  const Tensor stats = torch::stable::new_empty(W_enc, {4, panels * cpu::kPanelLatents});
  const bool rounds = scoring_type(precision) != DType::kFloat32;
  const Tensor rounded = torch::stable::new_empty(
      W_enc, {rounds ? d_sae : 0, d_in},
      !rounds ? ScalarType::Float
              : (precision == "bf16" ? ScalarType::BFloat16 : ScalarType::Half));
  const Input rows(W_enc);
  cpu::PackedEncoder encoder = packed_encoder(W_enc, precision, packed, stats, rounded);
  encoder.W_enc = rows.data<float>();
  check_memory(kOp, cpu::kernels().pack_encoder(encoder, parallel()));
  return {packed, stats, rounded};
}

}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CPU, m) {
  SAE_FAST_IMPL(m, "pack_encoder", &sae_fast::ops::pack_encoder);
  SAE_FAST_IMPL(m, "encode_topk", &sae_fast::ops::encode_topk);
  SAE_FAST_IMPL(m, "encode_batch_topk", &sae_fast::ops::encode_batch_topk);
  SAE_FAST_IMPL(m, "full_batches", &sae_fast::ops::full_batches);
  SAE_FAST_IMPL(m, "encode_threshold", &sae_fast::ops::encode_threshold);
}
