#include "ops/cpu.h"

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

}  // namespace

CodeInput::CodeInput(const char* op, const OptionalTensor& values, const Tensor& indices,
                     const OptionalTensor& offsets, int64_t d_sae)
    : values_((check_code_layout(op, values, indices, offsets), values)),
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
