// Helpers of the tests of the emulated CUDA kernels.
#pragma once

#include <cuda_fp16.h>

#include "kernels/cuda/types.h"
#include "tests/testing.h"

namespace sae_fast::testing {

inline cuda::TypedPointer typed(const Matrix& matrix) { return {matrix.data(), matrix.type}; }

inline cuda::CodeRows rows_of(const CodeProblem& code) {
  return {code.offsets.empty() ? nullptr : code.offsets.data(), code.k, code.tokens,
          code.entries()};
}

inline DType any_type(Random& random) { return static_cast<DType>(random.integer(0, 2)); }

// The token of every entry.
inline std::vector<int64_t> tokens_of(const CodeProblem& code) {
  std::vector<int64_t> tokens;
  for (int64_t n = 0; n < code.tokens; ++n) {
    const int64_t count = code.offsets.empty() ? code.k
                                               : code.offsets[static_cast<size_t>(n) + 1] -
                                                     code.offsets[static_cast<size_t>(n)];
    tokens.insert(tokens.end(), static_cast<size_t>(count), n);
  }
  return tokens;
}

inline void check_success(cudaError_t error, const char* what) {
  check(error == cudaSuccess, "%s: error %d", what, static_cast<int>(error));
}

// Compares with a sum in double: exact where the terms are small integers.
inline void check_near(const char* what, double value, double wanted, double tolerance) {
  check(same(value, wanted) || std::fabs(value - wanted) <= tolerance * (1.0 + std::fabs(wanted)),
        "%s: %.9g, not %.9g", what, value, wanted);
}

// As a device allocation is: filled with what was there before, and aligned.
template <class T>
std::vector<T> stale(int64_t count, T value) {
  return std::vector<T>(static_cast<size_t>(count), value);
}

// Scratch for a kernel whose query gave this size.
class TestScratch {
 public:
  explicit TestScratch(size_t bytes) : memory_(bytes / sizeof(Block) + 1) {
    std::memset(memory_.data(), 0xfb, memory_.size() * sizeof(Block));
  }
  void* data() { return memory_.data(); }
  size_t bytes() const { return memory_.size() * sizeof(Block); }

 private:
  struct alignas(256) Block {
    unsigned char bytes[256];
  };
  std::vector<Block> memory_;
};

// [m, n] = a [m, k] b [k, n] of float16 with the given strides, as tensor cores do it: 16 products
// at a time are added to a float, which is cut off instead of rounded.
struct HalfMatrix {
  const __half* data;
  int64_t row, column;
};
inline float cut_off(double exact) {
  const auto rounded = static_cast<float>(exact);
  const bool farther = std::fabs(static_cast<double>(rounded)) > std::fabs(exact);
  return farther ? std::nextafter(rounded, 0.0f) : rounded;
}
inline std::vector<float> half_product(HalfMatrix a, HalfMatrix b, int64_t m, int64_t k,
                                       int64_t n) {
  constexpr int64_t kProducts = 16;
  std::vector<float> result(static_cast<size_t>(m * n));
  std::vector<double> sums(static_cast<size_t>(n));
  for (int64_t i = 0; i < m; ++i) {
    float* const row = result.data() + i * n;
    for (int64_t l = 0; l < k; ++l) {
      const auto factor = static_cast<double>(__half2float(a.data[i * a.row + l * a.column]));
      for (int64_t j = 0; j < n; ++j) {
        const __half other = b.data[l * b.row + j * b.column];
        sums[static_cast<size_t>(j)] += factor * static_cast<double>(__half2float(other));
      }
      if ((l + 1) % kProducts != 0 && l + 1 != k) continue;
      for (int64_t j = 0; j < n; ++j) {
        row[j] = cut_off(static_cast<double>(row[j]) + sums[static_cast<size_t>(j)]);
        sums[static_cast<size_t>(j)] = 0.0;
      }
    }
  }
  return result;
}

// Each defined in a file of its name.
void test_cuda_batch(uint64_t seed);
void test_cuda_bookkeeping(uint64_t seed);
void test_cuda_correlation(uint64_t seed);
void test_cuda_decode(uint64_t seed);
void test_cuda_decorrelation(uint64_t seed);
void test_cuda_encode(uint64_t seed);
void test_cuda_gather_rows(uint64_t seed);
void test_cuda_threshold(uint64_t seed);
void test_cuda_rows(uint64_t seed);
void test_cuda_update(uint64_t seed);

}  // namespace sae_fast::testing
