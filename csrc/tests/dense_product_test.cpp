// Products of dense matrices against float64: within their bound, on any number of threads alike.
#include <algorithm>

#include "tests/testing.h"

namespace sae_fast::testing {
namespace {

// A matrix [rows, depth] kept by rows or by columns, with a gap between them.
struct Dense {
  Dense(Random& random, int64_t rows, int64_t depth, int64_t kind)
      : rows(rows), depth(depth), by_rows(random.integer(0, 1) == 0) {
    const int64_t gap = random.integer(0, 3);
    row_stride = by_rows ? depth + gap : 1;
    depth_stride = by_rows ? 1 : rows + gap;
    // Nothing behind the last element: what lies there must not be read.
    storage.resize(static_cast<size_t>((rows - 1) * row_stride + (depth - 1) * depth_stride + 1));
    for (float& value : storage) value = NAN;
    for (int64_t row = 0; row < rows; ++row) {
      const float scale = kind == 1 ? std::exp(8.0f * random.number(Numbers::kNormal)) : 1.0f;
      for (int64_t k = 0; k < depth; ++k) element(row, k) = number(random, kind) * scale;
    }
  }

  static float number(Random& random, int64_t kind) {
    const float value = random.number(kind == 2 ? Numbers::kIntegers : Numbers::kNormal);
    if (kind == 3) return value > 0.5f ? value : 0.0f;  // a code after ReLU
    if (kind == 4) return value * std::exp(4.0f * random.number(Numbers::kNormal));
    if (kind == 5) return value * 1e-38f;  // subnormal
    return value;
  }

  float& element(int64_t row, int64_t k) {
    return storage[static_cast<size_t>(row * row_stride + k * depth_stride)];
  }
  float element(int64_t row, int64_t k) const {
    return storage[static_cast<size_t>(row * row_stride + k * depth_stride)];
  }
  cpu::Operand operand() const { return {storage.data(), row_stride, depth_stride}; }

  int64_t rows, depth;
  bool by_rows;
  int64_t row_stride, depth_stride;
  std::vector<float> storage;
};

// With `rounded` a float32 sum of exact products, else the bound in sliced_tiles.h, of the largest
// numbers of the whole rows.
double bound(const Dense& left, const Dense& right, int64_t m, int64_t n, bool rounded) {
  double most_left = 0.0, most_right = 0.0, absolute = 0.0;
  for (int64_t k = 0; k < left.depth; ++k) {
    const double a = std::fabs(left.element(m, k)), b = std::fabs(right.element(n, k));
    most_left = std::max(most_left, a);
    most_right = std::max(most_right, b);
    absolute += a * b;
  }
  const auto depth = static_cast<double>(left.depth);
  if (rounded) {  // and what is subnormal counts as zero
    const double flushed = 1.2e-38 * depth * (1.0 + most_left + most_right);
    return 0x1p-24 * (depth + 40.0) * absolute * 1.02 + flushed;
  }
  return 0x1p-24 * (6.2 * depth * most_left * most_right + 12.0 * absolute) + 1e-44;
}

cpu::DenseProblem problem_of(const Dense& left, const Dense& right, bool rounded,
                             const std::vector<float>& bias, bool relu,
                             std::vector<float>& product) {
  product.assign(static_cast<size_t>(left.rows * right.rows), NAN);
  cpu::DenseProblem problem{};
  problem.left = left.operand();
  problem.right = right.operand();
  problem.rows = left.rows;
  problem.columns = right.rows;
  problem.depth = left.depth;
  problem.rounded = rounded;
  problem.bias = bias.empty() ? nullptr : bias.data();
  problem.relu = relu;
  problem.product = product.data();
  return problem;
}

void check_product(Random& random, const Dense& left, const Dense& right, bool rounded) {
  const bool relu = random.integer(0, 1) == 0;
  const std::vector<float> bias =
      random.numbers(random.integer(0, 1) * right.rows, Numbers::kNormal);
  std::vector<float> results[2];
  const cpu::Parallel parallels[] = {one_thread(), four_threads()};
  for (int i = 0; i < 2; ++i) {
    const cpu::DenseProblem problem = problem_of(left, right, rounded, bias, relu, results[i]);
    if (cpu::kernels().dense_product(problem, parallels[i]) != cpu::DenseResult::kDone) return;
  }
  check(same_bits(results[0], results[1]), "dense_product: threads change the result");
  for (int64_t m = 0; m < left.rows; ++m) {
    for (int64_t n = 0; n < right.rows; ++n) {
      double expected = 0.0;
      for (int64_t k = 0; k < left.depth; ++k) {
        const float a = left.element(m, k), b = right.element(n, k);
        const auto type = rounded ? DType::kBFloat16 : DType::kFloat32;
        expected += static_cast<double>(testing::rounded(a, type)) * testing::rounded(b, type);
      }
      const double shift = bias.empty() ? 0.0 : bias[static_cast<size_t>(n)];
      expected += shift;
      if (relu) expected = std::max(expected, 0.0);
      const double got = results[0][static_cast<size_t>(m * right.rows + n)];
      check(std::fabs(got - expected) <=
                bound(left, right, m, n, rounded) + 0x1p-24 * (std::fabs(shift) + std::fabs(got)),
            "dense_product %ld x %ld x %ld, rounded %d: %g at %ld, %ld, expected %g", left.rows,
            left.depth, right.rows, rounded, got, m, n, expected);
    }
  }
}

bool has_tiles() {
  const std::string level = cpu::instruction_set_name();
  return level == "amx" || level == "amx_emulated";
}

// Tiles refuse the products that they cannot make, and the result says so.
void check_refusals(Random& random) {
  Dense left(random, random.integer(1, 40), random.integer(1, 200), 0);
  const Dense right(random, random.integer(1, 40), left.depth, 0);
  std::vector<float> product;
  const auto result = [&](bool rounded) {
    const cpu::DenseProblem problem = problem_of(left, right, rounded, {}, false, product);
    return cpu::kernels().dense_product(problem, four_threads());
  };
  if (!has_tiles()) {
    check(result(false) == cpu::DenseResult::kUnsuited, "dense_product without tiles");
    return;
  }
  check(result(false) == cpu::DenseResult::kDone, "dense_product of ordinary numbers");
  const float odd[] = {NAN, INFINITY, -INFINITY, 2e30f};
  const int64_t row = random.integer(0, left.rows - 1), k = random.integer(0, left.depth - 1);
  left.element(row, k) = odd[random.integer(0, 3)];
  check(result(false) == cpu::DenseResult::kUnsuited, "dense_product of %g", left.element(row, k));
  check(result(true) == cpu::DenseResult::kDone, "dense_product of %g, rounded",
        left.element(row, k));
  const bool is_finite = std::isfinite(left.element(row, k));
  check(is_finite || !std::isfinite(product[static_cast<size_t>(row * right.rows)]),
        "dense_product of %g, rounded: %g", left.element(row, k),
        product[static_cast<size_t>(row * right.rows)]);
}

// Bias and ReLU of a product that others have made.
void check_finish(Random& random) {
  const Dense left(random, random.integer(1, 9), 1, 0), right(random, random.integer(1, 70), 1, 0);
  const std::vector<float> none, bias = random.numbers(right.rows, Numbers::kIntegers);
  std::vector<float> product;
  for (const bool has_bias : {false, true}) {
    for (const bool relu : {false, true}) {
      const cpu::DenseProblem problem =
          problem_of(left, right, false, has_bias ? bias : none, relu, product);
      const std::vector<float> made =
          random.numbers(static_cast<int64_t>(product.size()), Numbers::kIntegersAndSpecials);
      product = made;
      cpu::kernels().finish_product(problem, four_threads());
      for (size_t i = 0; i < made.size(); ++i) {
        const float sum = made[i] + (has_bias ? bias[i % bias.size()] : 0.0f);
        check(same(product[i], relu && sum < 0.0f ? 0.0f : sum), "finish_product: %g of %g",
              product[i], made[i]);
      }
    }
  }
}

}  // namespace

void test_dense_product(uint64_t seed) {
  Random random(seed);
  check_finish(random);
  check_refusals(random);
  if (!has_tiles()) return;
  // Now and then several passes, and blocks of columns.
  const int64_t depth =
      random.integer(0, 4) == 0 ? random.integer(700, 1700) : random.integer(1, 300);
  const int64_t columns =
      random.integer(0, 9) == 0 ? random.integer(500, 1100) : random.integer(1, 70);
  const Dense left(random, random.integer(1, 70), depth, random.integer(0, 5));
  const Dense right(random, columns, depth, random.integer(0, 5));
  check_product(random, left, right, false);
  check_product(random, left, right, true);
}

}  // namespace sae_fast::testing
