// Statistics of a batch, sums over rows and the counters of a step, compiled for the host.
#include "kernels/cuda/bookkeeping.cu"

#include "tests/cuda_nodes.h"

namespace sae_fast::testing {
namespace {

size_t place(int64_t index) { return static_cast<size_t>(index); }

double variance_of(const std::vector<float>& x, int64_t rows, int64_t d_in) {
  double variance = 0.0;
  for (int64_t d = 0; d < d_in; ++d) {
    double mean = 0.0;
    for (int64_t n = 0; n < rows; ++n) mean += x[place(n * d_in + d)] / static_cast<double>(rows);
    for (int64_t n = 0; n < rows; ++n) variance += std::pow(x[place(n * d_in + d)] - mean, 2);
  }
  return variance;
}

void test_statistics(Random& random) {
  const int64_t rows = random.integer(1, random.integer(0, 1) == 0 ? 9 : 600);
  const int64_t d_in = random.integer(1, 70);
  const int64_t d_sae = random.integer(1, 40);
  const int64_t entries = random.integer(0, 1) == 0 ? 0 : rows * random.integer(1, 3);
  const bool is_signed = random.integer(0, 1) == 1;
  std::vector<float> target = random.numbers(rows * d_in, Numbers::kNormal);
  for (float& number : target) number += 100.0f;  // a mean far from the origin
  const std::vector<float> errors = random.numbers(rows, Numbers::kIntegers);
  const std::vector<float> values = random.numbers(entries, Numbers::kIntegers);
  std::vector<int32_t> indices;
  std::vector<char> expected(place(d_sae), 0);
  double active = 0.0;
  for (const float value : values) {
    indices.push_back(static_cast<int32_t>(random.integer(0, d_sae - 1)));
    if (!(is_signed ? value != 0.0f : value > 0.0f)) continue;
    expected[place(indices.back())] = 1;
    ++active;
  }
  const float given = 3.0f;
  const bool has_variance = random.integer(0, 2) == 0;
  const cuda::BatchArrays batch{errors.data(), target.data(),  has_variance ? &given : nullptr,
                                values.data(), indices.data(), rows,
                                d_in,          entries,        d_sae,
                                is_signed};
  size_t bytes = 0;
  check_success(cuda::batch_statistics_scratch_bytes(batch, &bytes), "batch_statistics");
  TestScratch scratch(bytes);
  float fvu = 777.0f, l0 = 777.0f, variance = 777.0f;
  std::vector<char> fired(place(d_sae), 7);
  check_nodes("batch_statistics", [&] {
    return cuda::batch_statistics(batch, &fvu, &l0, &variance,
                                  reinterpret_cast<bool*>(fired.data()), scratch.data(), nullptr);
  });
  double error = 0.0;
  for (const float number : errors) error += number;
  const double wanted = has_variance ? given : variance_of(target, rows, d_in);
  check_near("batch_statistics: variance", variance, wanted, 1e-6);
  check_near("batch_statistics: l0", l0, active / static_cast<double>(rows), 1e-6);
  if (wanted > 0.0) check_near("batch_statistics: fvu", fvu, error / wanted, 1e-5);
  check(fired == expected, "batch_statistics: fired");
}

void test_code_gradients(Random& random) {
  const int64_t rows = random.integer(0, 40);
  const int64_t k = random.integer(0, 30);
  const int64_t stride = random.integer(0, 1);
  const std::vector<float> values = random.numbers(rows * k, Numbers::kNormal);
  const std::vector<float> dots = random.numbers(rows * k, Numbers::kNormal);
  const std::vector<float> grads = random.numbers(rows + 1, Numbers::kNormal);
  auto grad_values = stale(rows * k, 777.0f);
  auto coefficients = stale(rows * k, 777.0f);
  auto scale = stale(rows, 777.0f);
  check_nodes("code_gradients", [&] {
    return cuda::code_gradients({values.data(), dots.data(), grads.data(), stride,
                                 grad_values.data(), coefficients.data(), scale.data(), rows, k},
                                nullptr);
  });
  for (int64_t n = 0; n < rows; ++n) {
    const float twice = 2.0f * grads[place(n * stride)];
    check(same(scale[place(n)], twice), "code_gradients: scale");
    for (int64_t entry = n * k; entry < (n + 1) * k; ++entry) {
      check(same(grad_values[place(entry)], dots[place(entry)] * twice), "code_gradients: values");
      check(same(coefficients[place(entry)], values[place(entry)] * twice),
            "code_gradients: coefficients");
    }
  }
}

void test_weighted_row_sum(Random& random) {
  const int64_t rows = random.integer(0, random.integer(0, 1) == 0 ? 9 : 900);
  const int64_t d_in =
      random.integer(0, 1) == 0 ? random.integer(1, 40) : 8 * random.integer(1, 60);
  const std::vector<float> weights = random.numbers(rows, Numbers::kIntegers);
  const Matrix matrix(random.numbers(rows * d_in, Numbers::kIntegers), any_type(random));
  auto sum = stale(d_in, 777.0f);
  size_t bytes = 0;
  check_success(cuda::weighted_row_sum_scratch_bytes(d_in, &bytes), "weighted_row_sum");
  TestScratch scratch(bytes);
  check_nodes("weighted_row_sum", [&] {
    return cuda::weighted_row_sum(weights.data(), typed(matrix), rows, d_in, -0.5f, sum.data(),
                                  scratch.data(), nullptr);
  });
  for (int64_t d = 0; d < d_in; ++d) {
    double wanted = 0.0;
    for (int64_t m = 0; m < rows; ++m)
      wanted += weights[place(m)] * matrix.values[place(m * d_in + d)];
    check_near("weighted_row_sum", sum[place(d)], -0.5 * wanted, 0.0);
  }
}

void test_add_squares(Random& random) {
  const std::vector<float> numbers = random.numbers(random.integer(0, 5000), Numbers::kIntegers);
  const auto others = random.numbers(random.integer(0, 1) * 300, Numbers::kIntegers);
  const double more = 7.0;
  const bool has_more = random.integer(0, 1) == 1;
  double total = 3.0;
  double wanted = has_more ? total + more : total;
  for (const float number : numbers) wanted += std::pow(number, 2);
  for (const float number : others) wanted += std::pow(number, 2);
  const cuda::SquareSums sums{has_more ? &more : nullptr, numbers.data(), others.data(),
                              static_cast<int64_t>(numbers.size()),
                              static_cast<int64_t>(others.size())};
  check_nodes("add_squares_", [&] { return cuda::add_squares(sums, &total, nullptr); });
  check_near("add_squares", total, wanted, 0.0);
}

void test_finish_step(Random& random) {
  const int64_t d_sae = random.integer(0, 600);
  const bool bad_loss = random.integer(0, 3) == 0;
  const std::vector<float> losses = {bad_loss ? HUGE_VALF : 1.0f, 2.0f, 3.0f};
  const bool failed_before = random.integer(0, 1) == 1;
  const bool fails = random.integer(0, 1) == 1;
  const bool norm_poisons = random.integer(0, 1) == 1;
  float poison = failed_before ? NAN : 0.0f;
  const int kind_of_fault = static_cast<int>(random.integer(0, 3));  // 0: NaN, 1: 0, else none
  const float fault = kind_of_fault == 0 ? NAN : 0.0f, variance = 5.0f;
  const float norm = fails ? HUGE_VALF : 4.0f;
  int64_t steps = 7;
  std::vector<float> metrics(5, 777.0f);
  std::vector<int64_t> tokens, expected_tokens;
  std::vector<char> fired;
  for (int64_t j = 0; j < d_sae; ++j) {
    tokens.push_back(j);
    fired.push_back(random.integer(0, 1) == 1 ? 1 : 0);
    expected_tokens.push_back(fired.back() != 0 ? 0 : j + 9);
  }
  check_nodes("finish_step_", [&] {
    return cuda::finish_step(
        {&poison, &steps, metrics.data()},
        {kind_of_fault > 1 ? nullptr : &fault, losses.data(), &norm, &variance, 3, norm_poisons},
        tokens.data(), reinterpret_cast<const bool*>(fired.data()), d_sae, 9, nullptr);
  });
  check(tokens == expected_tokens, "finish_step: tokens");
  check(steps == (failed_before ? 7 : 8), "finish_step: %ld steps", static_cast<long>(steps));
  const bool failed = bad_loss || kind_of_fault == 0 || (fails && norm_poisons);
  check(std::isnan(poison) == (failed_before || failed), "finish_step: poison");
  const std::vector<float> written = {losses[0], 2.0f, 3.0f, norm, 5.0f};
  check(metrics == (failed_before ? std::vector<float>(5, 777.0f) : written),
        "finish_step: metrics");
}

}  // namespace

void test_cuda_bookkeeping(uint64_t seed) {
  Random random(seed);
  test_statistics(random);
  test_code_gradients(random);
  test_weighted_row_sum(random);
  test_add_squares(random);
  test_finish_step(random);
}

}  // namespace sae_fast::testing
