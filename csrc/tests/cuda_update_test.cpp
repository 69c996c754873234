// row_gradient_norm and fused_update, compiled for the host (the row sums they build on come with
// cuda_rows_test.cpp).
#include "kernels/cuda/update.cu"

#include "tests/cuda_testing.h"

namespace sae_fast::testing {
namespace {

constexpr float kGradScale = 0.37f;

struct UpdateProblem {
  explicit UpdateProblem(Random& random)
      : d_in(random.integer(0, 1) == 0 ? random.integer(1, 9) : 4 * random.integer(1, 280)),
        d_sae(random.integer(1, 9)),
        tokens(random.integer(1, 40)),
        room(random.integer(0, 2) * 350),
        dense(random.numbers(tokens * d_in, Numbers::kNormal), any_type(random)),
        shift(random.numbers(d_in, Numbers::kNormal)),
        extra_grad(random.numbers(d_sae * d_in, Numbers::kNormal)),
        W(random.numbers(d_sae * d_in, Numbers::kNormal)),
        exp_avg(random.numbers(d_sae * d_in, Numbers::kNormal)),
        exp_avg_sq(random.numbers(d_sae * d_in, Numbers::kNormal)),
        coefficients(random.numbers(room, Numbers::kNormal)),
        project(random.integer(0, 1) == 1),
        unit_norm(random.integer(0, 1) == 1),
        with_shift(random.integer(0, 1) == 1),
        with_extra(random.integer(0, 1) == 1),
        copy(any_type(random)) {
    for (float& square : exp_avg_sq) square = std::fabs(square);
    for (int64_t j = 0; j < d_sae; ++j) make_unit(j);
    // Not all of the room is in use, one latent has half of it, and some have none.
    for (int64_t j = 0; j < d_sae; ++j) {
      const int64_t most = j == 1 ? room / 2 : random.integer(0, 1) * 2 * room / d_sae;
      const int64_t left = room - latent_offsets.back();
      latent_offsets.push_back(latent_offsets.back() + std::min(random.integer(0, most), left));
    }
    for (int64_t p = 0; p < room; ++p) {
      rows.push_back(static_cast<int32_t>(random.integer(0, tokens - 1)));
    }
    cache = plan_row_cache(room, tokens);
  }

  void make_unit(int64_t j) {
    double square = 0.0;
    for (int64_t i = j * d_in; i < (j + 1) * d_in; ++i) square += std::pow(at(W, i), 2);
    for (int64_t i = j * d_in; i < (j + 1) * d_in; ++i) {
      W[static_cast<size_t>(i)] = static_cast<float>(at(W, i) / std::sqrt(square));
    }
  }

  template <class T>
  static double at(const std::vector<T>& numbers, int64_t i) {
    return static_cast<double>(numbers[static_cast<size_t>(i)]);
  }

  int64_t count(int64_t j) const {
    return latent_offsets[static_cast<size_t>(j) + 1] - latent_offsets[static_cast<size_t>(j)];
  }

  cuda::GradientFactors factors() const {
    return {{latent_offsets.data(), rows.data(), coefficients.data(), d_sae, room},
            typed(dense),
            with_shift ? shift.data() : nullptr,
            with_extra ? extra_grad.data() : nullptr,
            d_in};
  }

  // Row j of the gradient in double.
  std::vector<double> gradient(int64_t j) const {
    std::vector<double> row(static_cast<size_t>(d_in));
    double along = 0.0;
    for (int64_t column = 0; column < d_in; ++column) {
      double sum = with_extra ? at(extra_grad, j * d_in + column) : 0.0;
      for (int64_t p = latent_offsets[static_cast<size_t>(j)];
           p < latent_offsets[static_cast<size_t>(j) + 1]; ++p) {
        const int64_t n = rows[static_cast<size_t>(p)];
        sum += at(coefficients, p) *
               (at(dense.values, n * d_in + column) - (with_shift ? at(shift, column) : 0.0));
      }
      row[static_cast<size_t>(column)] = sum;
      along += sum * at(W, j * d_in + column);
    }
    for (int64_t column = 0; project && column < d_in; ++column) {
      row[static_cast<size_t>(column)] -= along * at(W, j * d_in + column);
    }
    return row;
  }

  int64_t d_in, d_sae, tokens, room;
  Matrix dense;
  std::vector<float> shift, extra_grad, W, exp_avg, exp_avg_sq, coefficients;
  bool project, unit_norm, with_shift, with_extra;
  cpu::Rows copy;  // the rounded copy's type; kFloat: none
  std::vector<int64_t> latent_offsets = {0};
  std::vector<int32_t> rows;
  RowCache cache{};
};

struct NormResult {
  explicit NormResult(const UpdateProblem& problem)
      : sums(stale(problem.d_sae, 777.0f)),
        cached(stale(problem.cache.rows * problem.d_in, 777.0f)),
        slots(stale(problem.d_sae, int32_t{-9})) {}

  double squared_norm = -1.0;
  std::vector<float> sums, cached;
  std::vector<int32_t> slots;
};

NormResult test_norm(const UpdateProblem& problem) {
  NormResult result(problem);
  size_t bytes = 0;
  check_success(
      cuda::row_gradient_norm_scratch_bytes(problem.room, problem.d_sae, problem.d_in, &bytes),
      "row_gradient_norm");
  TestScratch scratch(bytes);
  check_success(cuda::row_gradient_norm(
                    problem.factors(), problem.cache, problem.project ? problem.W.data() : nullptr,
                    &result.squared_norm, result.sums.data(), result.cached.data(),
                    result.slots.data(), scratch.data(), nullptr),
                "row_gradient_norm");
  double squared_norm = 0.0;
  int32_t next_slot = 0;
  for (int64_t j = 0; j < problem.d_sae; ++j) {
    for (const double g : problem.gradient(j)) squared_norm += g * g;
    double sum = 0.0;
    for (int64_t p = problem.latent_offsets[static_cast<size_t>(j)];
         p < problem.latent_offsets[static_cast<size_t>(j) + 1]; ++p) {
      sum += UpdateProblem::at(problem.coefficients, p);
    }
    check_near("row_gradient_norm: sums", result.sums[static_cast<size_t>(j)], sum, 1e-5);
    const int32_t slot = problem.count(j) > problem.cache.above ? next_slot++ : -1;
    check_near("row_gradient_norm: slot", result.slots[static_cast<size_t>(j)], slot, 0.0);
  }
  check_near("row_gradient_norm: squared_norm", result.squared_norm, squared_norm, 1e-5);
  return result;
}

// Rounded copy: element i as the kernel should have rounded it, and as it did.
void check_copy(const UpdateProblem& problem, const std::vector<uint16_t>& copy,
                const std::vector<float>& W) {
  for (size_t i = 0; problem.copy != cpu::Rows::kFloat && i < W.size(); ++i) {
    check(copy[i] == rounded_bits(W[i], problem.copy), "fused_update: rounded copy of %g",
          static_cast<double>(W[i]));
  }
}

void test_update(const UpdateProblem& problem, const NormResult& norm) {
  constexpr double kLr = 1e-3, kBeta1 = 0.9, kBeta2 = 0.999, kEps = 1e-8, kDecay = 0.01;
  constexpr int64_t kStep = 7;
  std::vector<float> W = problem.W, m = problem.exp_avg, v = problem.exp_avg_sq;
  auto copy = stale(problem.d_sae * problem.d_in, uint16_t{0x7777});
  const bool rounds = problem.copy != cpu::Rows::kFloat;
  const cuda::RowState state{W.data(), m.data(), v.data(), rounds ? copy.data() : nullptr,
                             data_type(problem.copy)};
  check_success(
      cuda::fused_update(problem.factors(), state, norm.cached.data(), norm.slots.data(),
                         &kGradScale, make_adam_step(kLr, kBeta1, kBeta2, kEps, kDecay, kStep),
                         problem.project, problem.unit_norm, nullptr),
      "fused_update");
  const double correction1 = 1.0 - std::pow(kBeta1, kStep);
  const double correction2 = 1.0 - std::pow(kBeta2, kStep);
  for (int64_t j = 0; j < problem.d_sae; ++j) {
    const std::vector<double> gradient = problem.gradient(j);
    std::vector<double> row;
    double square = 0.0;
    for (int64_t column = 0; column < problem.d_in; ++column) {
      const int64_t i = j * problem.d_in + column;
      const double g = gradient[static_cast<size_t>(column)] * kGradScale;
      const double mean = kBeta1 * UpdateProblem::at(problem.exp_avg, i) + (1.0 - kBeta1) * g;
      const double var = kBeta2 * UpdateProblem::at(problem.exp_avg_sq, i) + (1.0 - kBeta2) * g * g;
      check_near("fused_update: exp_avg", m[static_cast<size_t>(i)], mean, 1e-5);
      check_near("fused_update: exp_avg_sq", v[static_cast<size_t>(i)], var, 1e-5);
      row.push_back(UpdateProblem::at(problem.W, i) * (1.0 - kLr * kDecay) -
                    kLr / correction1 * mean / (std::sqrt(var / correction2) + kEps));
      square += row.back() * row.back();
    }
    const double length = problem.unit_norm ? std::max(std::sqrt(square), 1e-12) : 1.0;
    for (int64_t column = 0; column < problem.d_in; ++column) {
      check_near("fused_update: W", W[static_cast<size_t>(j * problem.d_in + column)],
                 row[static_cast<size_t>(column)] / length, 1e-5);
    }
  }
  check_copy(problem, copy, W);
}

}  // namespace

void test_cuda_update(uint64_t seed) {
  Random random(seed);
  const UpdateProblem problem(random);
  test_update(problem, test_norm(problem));
}

}  // namespace sae_fast::testing
