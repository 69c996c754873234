// Helpers of the CPU ops: their registration, torch's thread pool as the kernels'
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

// Checks that the offsets [d_sae + 1] ascend from 0 to the number of entries.
inline void check_partition(const char* op, const int64_t* latent_offsets, int64_t d_sae,
                            int64_t entries) {
  bool ascending = latent_offsets[0] == 0 && latent_offsets[d_sae] == entries;
  for (int64_t j = 0; j < d_sae; ++j) {
    ascending = ascending && latent_offsets[j] <= latent_offsets[j + 1];
  }
  SAE_FAST_CHECK(ascending, op, ": latent_offsets must ascend from 0 to the number of entries, ",
                 entries, ", got ", latent_offsets[0], " to ", latent_offsets[d_sae]);
}

// Checks that the numbers of a long list are in [0, bound), on all threads.
inline void check_entry_range(const char* op, const char* name, const int32_t* numbers,
                              int64_t count, int64_t bound) {
  if (!cpu::in_range(numbers, count, bound, parallel())) {
    check_range(op, name, numbers, count, bound);
  }
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

// A checked code: values [N, K] and indices of the same shape, or flat ones with offsets [N + 1].
// Every index is checked to be in [0, d_sae), because ops read rows by it.
class CodeInput {
 public:
  CodeInput(const char* op, const OptionalTensor& values, const Tensor& indices,
            const OptionalTensor& offsets, int64_t d_sae, const char* values_name = "values");

  const cpu::Code& code() const { return code_; }
  int64_t entries() const { return entries_; }

 private:
  cpu::Code code_{};
  int64_t entries_ = 0;
  Input values_, indices_, offsets_;
};

}  // namespace sae_fast::ops
