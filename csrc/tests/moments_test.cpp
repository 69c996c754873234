// The CPU's update of vectors, and of rows with moments in 16 and 8 bits.
#include "kernels/common/moments.h"

#include <algorithm>
#include <tuple>

#include "tests/moment_codes.h"
#include "tests/testing.h"
#include "tests/update_formulas.h"

namespace sae_fast::testing {
namespace {

// An update whose gradient is at hand; some rows are silent, some numbers extreme.
struct Problem {
  explicit Problem(Random& random)
      : d_in(random.integer(0, 1) == 0 ? random.integer(1, 40) : random.integer(250, 700)),
        d_sae(random.integer(1, 20)),
        offsets(static_cast<size_t>(d_sae + 1)),
        slots(static_cast<size_t>(d_sae), -1),
        W(random.numbers(d_sae * d_in, Numbers::kNormal)),
        grad(random.numbers(d_sae * d_in, Numbers::kNormal)),
        exp_avg(random.numbers(d_sae * d_in, Numbers::kNormal)),
        exp_avg_sq(random.numbers(d_sae * d_in, Numbers::kNormal)) {
    for (float& square : exp_avg_sq) square *= square;
    for (int64_t j = 0; j < d_sae; ++j) {
      const float factors[] = {1.0f, 0.0f, 1e-30f, 1e-18f, 1e15f};
      const float factor = factors[random.integer(0, 4)];
      for (int64_t i = j * d_in; i < (j + 1) * d_in; ++i) {
        const auto at = static_cast<size_t>(i);
        const float own = random.integer(0, 9) == 0 ? 1e-4f * factor : factor;
        grad[at] *= own;
        exp_avg[at] *= own;
        exp_avg_sq[at] *= own * own;
      }
    }
  }

  int64_t d_in, d_sae;
  std::vector<int64_t> offsets;
  std::vector<int32_t> slots;
  std::vector<float> W, grad, exp_avg, exp_avg_sq;
};

constexpr double kLr = 1e-2;
constexpr int64_t kStep = 3;

UpdateScalars some_step(UpdateRule rule) {
  return {0.37f, some_update_step(some_settings(rule), kLr, kStep)};
}

// Returns the weights; the moments change in place.
std::vector<float> updated(Problem& problem, UpdateRule rule, const Moments& moments,
                           const cpu::Parallel& parallel) {
  std::vector<float> W = problem.W;
  cpu::RowUpdate update{};
  update.gradient.lists = {problem.offsets.data(), nullptr, nullptr, problem.d_sae};
  update.gradient.factor = {DType::kFloat32, nullptr, nullptr, 0, problem.d_in};
  update.gradient.extra_grad = problem.grad.data();
  update.cache = {nullptr, problem.slots.data()};
  update.rule = rule;
  update.scalars = some_step(rule);
  update.unit_norm = true;
  update.W = W.data();
  update.moments = moments;
  update.encoder.d_sae = problem.d_sae;
  update.encoder.d_in = problem.d_in;
  check(cpu::kernels().fused_update(update, parallel), "fused_update: out of memory");
  return W;
}

// A vector is updated as a row of one weight each would be.
void test_vector(Random& random) {
  const int64_t size = random.integer(0, 9000);
  const auto grad = random.numbers(random.integer(0, 1) * size, Numbers::kNormal);
  const auto w = random.numbers(size, Numbers::kNormal), m = random.numbers(size, Numbers::kNormal);
  const std::vector<float> v(static_cast<size_t>(size), 0.25f);
  const UpdateRule rule = any_rule(random);
  const UpdateScalars scalars = some_step(rule);
  const auto run = [&](const cpu::Parallel& parallel) {
    auto result = std::tuple{w, m, v};
    auto& [new_w, new_m, new_v] = result;
    cpu::kernels().update_vector(
        {rule, &scalars, grad.empty() ? nullptr : grad.data(), new_w.data(), new_m.data(),
         has_exp_avg_sq(rule) ? new_v.data() : nullptr, size},
        parallel);
    return result;
  };
  const auto result = run(one_thread());
  check(result == run(four_threads()), "update_vector depends on the number of threads");
  const auto near = [](float value, double wanted) {
    return std::fabs(value - wanted) <= 1e-6 * (1.0 + std::fabs(wanted));
  };
  for (size_t i = 0; i < w.size(); ++i) {
    const double g = grad.empty() ? 0.0 : static_cast<double>(grad[i]) * scalars.grad_scale;
    const DoubleWeight wanted =
        step_in_double(some_settings(rule), kLr, kStep, g, {w[i], m[i], v[i]});
    check(near(std::get<0>(result)[i], wanted.weight), "update_vector: weight %g, not %g",
          std::get<0>(result)[i], wanted.weight);
    check(near(std::get<1>(result)[i], wanted.exp_avg) &&
              near(std::get<2>(result)[i], wanted.exp_avg_sq),
          "update_vector: moments of %zu", i);
  }
}

}  // namespace

// Compares with the update of the floats that the codes stand for, whose moments are then rounded
// one by one.
void test_moments(uint64_t seed) {
  Random random(seed);
  test_vector(random);
  Problem problem(random);
  const int64_t step = random.integer(1, int64_t{1} << 40);
  const UpdateRule rule = any_rule(random);
  for (const DType type : {DType::kBFloat16, DType::kUInt8}) {
    MomentCodes before(rule, type, problem.d_sae, problem.d_in);
    before.encode(problem.exp_avg, problem.exp_avg_sq, step - 1);
    std::vector<float> m, v;
    before.decode(m, v);
    before.step = step;
    MomentCodes one = before, four = before, wanted = before;
    Moments floats{};  // kFloat32
    floats.exp_avg = m.data();
    if (has_exp_avg_sq(rule)) floats.exp_avg_sq = v.data();
    const std::vector<float> W = updated(problem, rule, floats, one_thread());
    wanted.encode(m, v, step);
    check(same_bits(W, updated(problem, rule, one.view(), one_thread())),
          "fused_update: the weights depend on how the moments are kept");
    check(one.same_as(wanted), "fused_update: codes of moments, type %d", static_cast<int>(type));
    updated(problem, rule, four.view(), four_threads());
    check(four.same_as(one), "fused_update: codes depend on the number of threads");
  }
}

}  // namespace sae_fast::testing
