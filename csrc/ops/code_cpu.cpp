// CPU side of the ops on codes by latent, and the checks of every code: check, allocate, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/cpu.h"
#include "ops/gradient.h"

namespace sae_fast::ops {
namespace {

void check_offsets(const char* op, const int64_t* offsets, int64_t tokens, int64_t entries) {
  bool ascending = offsets[0] == 0 && offsets[tokens] == entries;
  for (int64_t token = 0; token < tokens; ++token) {
    ascending = ascending && offsets[token] <= offsets[token + 1];
  }
  SAE_FAST_CHECK(ascending, op, ": offsets must ascend from 0 to the number of entries, ", entries,
                 ", got ", offsets[0], " to ", offsets[tokens]);
}

void check_indices(const char* op, const int32_t* indices, int64_t entries, int64_t d_sae) {
  int32_t lowest = 0;
  int32_t highest = 0;
  for (int64_t entry = 0; entry < entries; ++entry) {
    lowest = indices[entry] < lowest ? indices[entry] : lowest;
    highest = indices[entry] > highest ? indices[entry] : highest;
  }
  SAE_FAST_CHECK(entries == 0 || (lowest >= 0 && highest < d_sae), op, ": indices must be in [0, ",
                 d_sae, "), got ", lowest < 0 ? lowest : highest);
}

std::tuple<Tensor, Tensor, Tensor> latent_major(const Tensor& values, const Tensor& indices,
                                                const OptionalTensor& offsets, int64_t d_sae) {
  constexpr const char* kOp = "latent_major";
  check_d_sae(kOp, d_sae);
  const CodeInput code(kOp, values, indices, offsets, d_sae);
  const int64_t active = cpu::count_active(code.code(), code.entries());
  const Tensor latent_offsets = torch::stable::new_empty(values, {d_sae + 1}, ScalarType::Long);
  const Tensor entries = torch::stable::new_empty(values, {active}, ScalarType::Int);
  const Tensor rows = torch::stable::new_empty(values, {active}, ScalarType::Int);
  cpu::sort_by_latent(code.code(), d_sae, mutable_data<int64_t>(latent_offsets),
                      mutable_data<int32_t>(entries), mutable_data<int32_t>(rows), parallel());
  return {latent_offsets, entries, rows};
}

std::tuple<Tensor, Tensor> accumulate_rows(const Tensor& coefficients, const Tensor& indices,
                                           const OptionalTensor& offsets, const Tensor& dense,
                                           int64_t d_sae) {
  constexpr const char* kOp = "accumulate_rows";
  check_d_sae(kOp, d_sae);
  const CodeInput code(kOp, coefficients, indices, offsets, d_sae, "coefficients");
  check_shape(kOp, "dense", dense, {code.code().tokens, kAnySize});
  check_floating(kOp, "dense", dense);
  const auto [latent_offsets, entries, tokens] =
      latent_major(coefficients, indices, offsets, d_sae);
  const Input table(dense);
  const int64_t active = entries.size(0);
  const Tensor sorted = torch::stable::new_empty(coefficients, {active});
  cpu::gather_entries(code.code().values, mutable_data<int32_t>(entries), active,
                      mutable_data<float>(sorted), parallel());
  const Tensor rows = torch::stable::new_empty(coefficients, {d_sae, dense.size(1)});
  const Tensor sums = torch::stable::new_empty(coefficients, {d_sae});
  const cpu::LatentMajor lists{mutable_data<int64_t>(latent_offsets), mutable_data<int32_t>(tokens),
                               mutable_data<float>(sorted), d_sae};
  const cpu::DenseFactor factor{dtype_of(dense), table.data<void>(), nullptr, dense.size(0),
                                dense.size(1)};
  check_memory(kOp, cpu::kernels().accumulate_rows(lists, factor, mutable_data<float>(rows),
                                                   mutable_data<float>(sums), parallel()));
  return {rows, sums};
}

Tensor gather_entries(const Tensor& source, const Tensor& entries) {
  constexpr const char* kOp = "gather_entries";
  check_entries(kOp, entries, "source", source);
  const Input from(source), positions(entries);
  const int64_t count = entries.size(0);
  check_entry_range(kOp, "entries", positions.data<int32_t>(), count, source.numel());
  const Tensor ordered = torch::stable::new_empty(source, {count});
  cpu::gather_entries(from.data<float>(), positions.data<int32_t>(), count,
                      mutable_data<float>(ordered), parallel());
  return ordered;
}

Tensor latent_sums(const Tensor& latent_offsets, const Tensor& entries,
                   const Tensor& coefficients) {
  constexpr const char* kOp = "latent_sums";
  check_latent_offsets(kOp, latent_offsets);
  check_entries(kOp, entries, "coefficients", coefficients);
  const Input offsets(latent_offsets), positions(entries), from(coefficients);
  const int64_t d_sae = latent_offsets.size(0) - 1;
  check_partition(kOp, offsets.data<int64_t>(), d_sae, entries.size(0));
  check_entry_range(kOp, "entries", positions.data<int32_t>(), entries.size(0),
                    coefficients.numel());
  const Tensor sums = torch::stable::new_empty(coefficients, {d_sae});
  cpu::latent_sums(offsets.data<int64_t>(), d_sae, positions.data<int32_t>(), from.data<float>(),
                   mutable_data<float>(sums), parallel());
  return sums;
}

}  // namespace

CodeInput::CodeInput(const char* op, const OptionalTensor& values, const Tensor& indices,
                     const OptionalTensor& offsets, int64_t d_sae, const char* values_name)
    : values_((check_code_layout(op, values, indices, offsets, values_name), values)),
      indices_(indices),
      offsets_(offsets) {
  code_.values = values_.data<float>();
  code_.indices = indices_.data<int32_t>();
  code_.offsets = offsets_.data<int64_t>();
  code_.tokens = offsets.has_value() ? offsets->size(0) - 1 : indices.size(0);
  code_.k = offsets.has_value() ? 0 : indices.size(1);
  entries_ = indices.numel();
  SAE_FAST_CHECK(entries_ <= INT32_MAX, op, ": at most ", INT32_MAX, " entries, got ", entries_);
  if (offsets.has_value()) check_offsets(op, code_.offsets, code_.tokens, entries_);
  check_indices(op, code_.indices, entries_, d_sae);
}

}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CPU, m) {
  SAE_FAST_IMPL(m, "latent_major", &sae_fast::ops::latent_major);
  SAE_FAST_IMPL(m, "gather_entries", &sae_fast::ops::gather_entries);
  SAE_FAST_IMPL(m, "latent_sums", &sae_fast::ops::latent_sums);
  SAE_FAST_IMPL(m, "accumulate_rows", &sae_fast::ops::accumulate_rows);
}
