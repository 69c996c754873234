// decorrelation, compiled for the host, its matrix products done as tensor cores do:
// against all pairs in double.
#include "kernels/cuda/decorrelation.cu"

#include "tests/cuda_testing.h"

namespace sae_fast::testing {
namespace {

struct Problem {
  explicit Problem(Random& random)
      : rows(random.integer(1, 90)),
        d_in(random.integer(0, 1) == 0 ? random.integer(1, 40) : 4 * random.integer(1, 20)),
        W(random.numbers(rows * d_in, Numbers::kNormal)) {
    const float scales[] = {1.0f, 1e-3f, 1e4f};
    for (float& w : W) w *= scales[random.integer(0, 2)];
    if (random.integer(0, 1) == 0) {
      for (int64_t d = 0; d < d_in; ++d) W[static_cast<size_t>(d)] = 0.0f;
    }
  }
  int64_t rows, d_in;
  std::vector<float> W;
};

struct Result {
  float loss;
  std::vector<float> grad;
};

// As ops/decorrelation_cuda.cpp calls the kernels, with two chunks of rows where there are enough.
Result decorrelation(const Problem& p) {
  const int64_t D = p.d_in;
  auto halves = stale(p.rows * 2 * D, __half{});
  auto norms = stale(p.rows, 777.0f);
  auto fourth_powers = stale(p.rows, 777.0);
  auto squares = stale(D, 777.0);
  check_success(cuda::split_unit_rows(p.W.data(), p.rows, D, halves.data(), norms.data(),
                                      fourth_powers.data(), nullptr),
                "split_unit_rows");
  TestScratch scratch(
      std::max(cuda::column_squares_scratch_bytes(p.rows, D), cuda::gram_scratch_bytes(D)));
  check_success(cuda::column_squares(p.W.data(), norms.data(), p.rows, D, squares.data(),
                                     scratch.data(), nullptr),
                "column_squares");
  const int64_t half = (p.rows + 1) / 2;
  const auto chunk = [&](int64_t first, int64_t rows) {
    const __half* const from = halves.data() + first * 2 * D;
    return half_product({from, 1, 2 * D}, {from, 2 * D, 1}, D, rows, 2 * D);
  };
  auto gram = chunk(0, half);
  const auto rest = chunk(half, p.rows - half);
  check_success(cuda::add_product(gram.data(), rest.data(), D * 2 * D, nullptr), "add_product");
  auto gram_halves = stale(2 * D * D, __half{});
  Result result{777.0f, stale(p.rows * D, 777.0f)};
  check_success(cuda::split_gram(gram.data(), {squares.data(), fourth_powers.data(), p.rows}, D,
                                 gram_halves.data(), &result.loss, scratch.data(), nullptr),
                "split_gram");
  const HalfMatrix rows{halves.data(), 2 * D, 1};
  const auto high = half_product(rows, {gram_halves.data() + D * D, D, 1}, p.rows, D, D);
  const auto mixed = half_product(rows, {gram_halves.data(), D, 1}, p.rows, 2 * D, D);
  check_success(cuda::decorrelation_gradient(p.W.data(), norms.data(), high.data(), mixed.data(),
                                             p.rows, D, p.rows, result.grad.data(), nullptr),
                "decorrelation_gradient");
  return result;
}

struct UnitRow {
  double norm;
  std::vector<double> at;
};

std::vector<UnitRow> unit_rows(const Problem& p) {
  std::vector<UnitRow> result;
  for (int64_t j = 0; j < p.rows; ++j) {
    UnitRow row{0.0, {p.W.begin() + j * p.d_in, p.W.begin() + (j + 1) * p.d_in}};
    for (const double w : row.at) row.norm += w * w;
    row.norm = std::max(std::sqrt(row.norm), 1e-12);
    for (double& w : row.at) w /= row.norm;
    result.push_back(row);
  }
  return result;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

void test_cuda_decorrelation(uint64_t seed) {
  Random random(seed);
  const Problem problem(random);
  const Result result = decorrelation(problem);
  const std::vector<UnitRow> rows = unit_rows(problem);
  double loss = 0.0;
  for (size_t j = 0; j < rows.size(); ++j) {
    // 4 / |w| times the sum of cosine * row, less its part along the row.
    std::vector<double> sum(rows[j].at.size());
    double along = 0.0;
    for (size_t i = 0; i < rows.size(); ++i) {
      const double cosine = i == j ? 0.0 : dot(rows[i].at, rows[j].at);
      along += cosine * cosine;
      for (size_t d = 0; d < sum.size(); ++d) sum[d] += cosine * rows[i].at[d];
    }
    loss += along;
    const double scale = 4.0 / rows[j].norm;
    for (size_t d = 0; d < sum.size(); ++d) {
      const double wanted = scale * (sum[d] - along * rows[j].at[d]);
      const auto found = static_cast<double>(result.grad[j * sum.size() + d]);
      check(std::fabs(found - wanted) <= 1.5e-6 * scale * (along + 1.0),
            "decorrelation: gradient %.9g, not %.9g", found, wanted);
    }
  }
  const double pairs = loss + static_cast<double>(rows.size());
  check(std::fabs(static_cast<double>(result.loss) - loss) <= 1e-6 * pairs,
        "decorrelation: loss %.9g, not %.9g", static_cast<double>(result.loss), loss);
}

}  // namespace sae_fast::testing
