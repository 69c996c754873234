// What the CPU ops share: how they are registered, torch's thread pool as the kernels'
// parallel-for, and the sparse code.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <exception>

#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/input.h"

namespace sae_fast::ops {

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);

// Runs a boxed kernel so that its errors name the op. Its checks come first and throw
// ArgumentError; what can go wrong after them is an allocation, of a result, of scratch memory or
// of the contiguous copy of an argument, and torch's text of that error names a line of its own.
inline void run_boxed(const char* op, BoxedKernel kernel, StableIValue* stack, uint64_t n_inputs,
                      uint64_t n_outputs) {
  try {
    kernel(stack, n_inputs, n_outputs);
  } catch (const ArgumentError&) {
    throw;
  } catch (const std::exception&) {
    fail(op,
         ": out of memory for its results, scratch space or contiguous copies of its arguments");
  }
}

// Registers `function` as the op of this name.
#define SAE_FAST_IMPL(library, name, function)                                          \
  (library).impl(name, [](StableIValue* stack, uint64_t n_inputs, uint64_t n_outputs) { \
    ::sae_fast::ops::run_boxed(name, TORCH_BOX(function), stack, n_inputs, n_outputs);  \
  })

inline cpu::Parallel parallel() {
  const auto run = [](int64_t tasks, void* context, cpu::Parallel::Body body) {
    torch::stable::parallel_for(0, tasks, 1,
                                [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {run, static_cast<int>(torch::stable::get_num_threads())};
}

inline void check_memory(const char* op, bool done) {
  SAE_FAST_CHECK(done, op, ": out of memory for scratch space");
}

template <class Integer>
void check_range(const char* op, const char* name, const Integer* numbers, int64_t count,
                 int64_t bound) {
  if (count == 0) return;
  const auto [lowest, highest] = std::minmax_element(numbers, numbers + count);
  SAE_FAST_CHECK(*lowest >= 0 && *highest < bound, op, ": ", name, " must be in [0, ", bound,
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
