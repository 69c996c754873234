// Helpers of the kernel tests: checks, random problems, and std::thread as the parallel-for, whose
// threads a sanitizer can see.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "kernels/common/half.h"
#include "kernels/cpu/dispatch.h"

namespace sae_fast::testing {

inline int failures = 0;

// Prints the first few failures of a run; the rest only count.
template <class... Arguments>
void check(bool holds, const char* format, Arguments... arguments) {
  if (holds) return;
  if (++failures > 20) return;
  std::fprintf(stderr, "FAILED: ");
  if constexpr (sizeof...(arguments) == 0) {
    std::fputs(format, stderr);
  } else {
    std::fprintf(stderr, format, arguments...);
  }
  std::fputc('\n', stderr);
}

inline cpu::Parallel one_thread() {
  return {[](int64_t tasks, void* context, cpu::Parallel::Body body) { body(context, 0, tasks); },
          1};
}

inline cpu::Parallel four_threads() {
  const auto run = [](int64_t tasks, void* context, cpu::Parallel::Body body) {
    constexpr int64_t kThreads = 4;
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < kThreads; ++i) {
      threads.emplace_back(body, context, tasks * i / kThreads, tasks * (i + 1) / kThreads);
    }
    for (std::thread& thread : threads) thread.join();
  };
  return {run, 4};
}

// The distribution of the numbers of a problem. Small integers make every sum exact in every order
// and in every format, so results can be compared bit for bit, ties included.
enum class Numbers { kIntegers, kIntegersAndSpecials, kNormal };

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  int64_t integer(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }

  float number(Numbers numbers) {
    if (numbers == Numbers::kNormal) return std::normal_distribution<float>()(engine_);
    if (numbers == Numbers::kIntegersAndSpecials && integer(0, 199) == 0) {
      const float specials[] = {NAN, INFINITY, -INFINITY};
      return specials[integer(0, 2)];
    }
    return static_cast<float>(integer(-2, 2));
  }

  std::vector<float> numbers(int64_t count, Numbers numbers) {
    std::vector<float> result(static_cast<size_t>(count));
    for (float& value : result) value = number(numbers);
    return result;
  }

 private:
  std::mt19937_64 engine_;
};

// The 16 bits of a value in a low-precision format.
inline uint16_t rounded_bits(float value, DType type) {
  return type == DType::kBFloat16 ? round_to_bfloat16(value).bits : round_to_float16(value).bits;
}

inline float from_bits(uint16_t bits, DType type) {
  return type == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

inline float rounded(float value, DType type) {
  return type == DType::kFloat32 ? value : from_bits(rounded_bits(value, type), type);
}

// A matrix of the given type: the values that its elements stand for, and the elements.
struct Matrix {
  Matrix(std::vector<float> numbers, DType type) : type(type), values(std::move(numbers)) {
    for (float& value : values) {
      if (type != DType::kFloat32) elements.push_back(rounded_bits(value, type));
      value = rounded(value, type);
    }
  }

  const void* data() const {
    return type == DType::kFloat32 ? static_cast<const void*>(values.data()) : elements.data();
  }

  DType type;
  std::vector<float> values;
  std::vector<uint16_t> elements;  // empty for kFloat
};

// Equal as numbers, or both NaN.
inline bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Bit for bit, except that any NaN equals any other: which of two a sum passes on is the compiler's
// choice.
inline bool same_bits_or_nan(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(float)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) {
      return false;
    }
  }
  return true;
}

// A sparse code with its storage: k entries a token, or rows of any length with offsets.
struct CodeProblem {
  CodeProblem(Random& random, int64_t tokens, int64_t k, int64_t d_sae, bool with_offsets)
      : tokens(tokens), k(k) {
    int64_t entries = tokens * k;
    if (with_offsets) {
      offsets.push_back(0);
      for (int64_t n = 0; n < tokens; ++n) offsets.push_back(offsets.back() + random.integer(0, k));
      entries = offsets.back();
    }
    for (int64_t i = 0; i < entries; ++i) {
      values.push_back(static_cast<float>(random.integer(0, 2)));
      indices.push_back(static_cast<int32_t>(random.integer(0, d_sae - 1)));
    }
  }

  cpu::Code code() const {
    return {values.data(), indices.data(), offsets.empty() ? nullptr : offsets.data(), tokens, k};
  }
  int64_t entries() const { return static_cast<int64_t>(values.size()); }

  int64_t tokens, k;
  std::vector<float> values;
  std::vector<int32_t> indices;
  std::vector<int64_t> offsets;
};

// Each defined in a file of its name.
void test_encode(uint64_t seed);
void test_tiles(uint64_t seed);
void test_decode(uint64_t seed);
void test_dense_product(uint64_t seed);
void test_gather_rows(uint64_t seed);
void test_moments(uint64_t seed);
void test_rows(uint64_t seed);
void test_correlation(uint64_t seed);

}  // namespace sae_fast::testing
