// What the CPU ops share: torch's thread pool as the kernels' parallel-for, and the sparse code.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/input.h"

namespace sae_fast::ops {

inline cpu::Parallel parallel() {
  const auto run = [](int64_t tasks, void* context, cpu::Parallel::Body body) {
    torch::stable::parallel_for(0, tasks, 1,
                                [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {run, static_cast<int>(torch::stable::get_num_threads())};
}

inline void check_memory(const char* op, bool done) {
  STD_TORCH_CHECK(done, op, ": out of memory for scratch space");
}

template <class Integer>
void check_range(const char* op, const char* name, const Integer* numbers, int64_t count,
                 int64_t bound) {
  if (count == 0) return;
  const auto [lowest, highest] = std::minmax_element(numbers, numbers + count);
  STD_TORCH_CHECK(*lowest >= 0 && *highest < bound, op, ": ", name, " must be in [0, ", bound,
                  "), got ", *lowest < 0 ? *lowest : *highest);
}

inline cpu::Rows rows_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return cpu::Rows::kBFloat16;
    case ScalarType::Half:
      return cpu::Rows::kFloat16;
    default:
      return cpu::Rows::kFloat;
  }
}

// A checked code: values [N, K] and indices of the same shape, or flat ones with offsets [N + 1].
// Every index is checked to lie in [0, d_sae): an op reads rows by it.
class CodeInput {
 public:
  CodeInput(const char* op, const OptionalTensor& values, const Tensor& indices,
            const OptionalTensor& offsets, int64_t d_sae);

  const cpu::Code& code() const { return code_; }
  int64_t entries() const { return entries_; }

 private:
  cpu::Code code_{};
  int64_t entries_ = 0;
  Input values_, indices_, offsets_;
};

}  // namespace sae_fast::ops
