// The CPU's update with moments in 16 and 8 bits.
#include "kernels/common/moments.h"

#include <algorithm>

#include "tests/moment_codes.h"
#include "tests/testing.h"

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

UpdateScalars some_step() { return {0.37f, make_adam_step(1e-2, 0.9, 0.999, 1e-8, 0.01, 3)}; }

// Returns the weights; the moments change in place.
std::vector<float> updated(Problem& problem, const Moments& moments,
                           const cpu::Parallel& parallel) {
  std::vector<float> W = problem.W;
  cpu::RowUpdate update{};
  update.gradient.lists = {problem.offsets.data(), nullptr, nullptr, problem.d_sae};
  update.gradient.factor = {cpu::Rows::kFloat, nullptr, nullptr, 0, problem.d_in};
  update.gradient.extra_grad = problem.grad.data();
  update.cache = {nullptr, problem.slots.data()};
  update.scalars = some_step();
  update.unit_norm = true;
  update.W = W.data();
  update.moments = moments;
  update.encoder.d_sae = problem.d_sae;
  update.encoder.d_in = problem.d_in;
  check(cpu::kernels().fused_update(update, parallel), "fused_update: out of memory");
  return W;
}

}  // namespace

// The same update of the floats that the codes stand for, whose moments are then rounded one by
// one.
void test_moments(uint64_t seed) {
  Random random(seed);
  Problem problem(random);
  const int64_t step = random.integer(1, int64_t{1} << 40);
  for (const MomentType type : {MomentType::kBFloat16, MomentType::kBlocks}) {
    MomentCodes before(type, problem.d_sae, problem.d_in);
    before.encode(problem.exp_avg, problem.exp_avg_sq, step - 1);
    std::vector<float> m, v;
    before.decode(m, v);
    before.step = step;
    MomentCodes one = before, four = before, wanted = before;
    const Moments floats{MomentType::kFloat32, m.data(), v.data(), nullptr, nullptr, nullptr};
    const std::vector<float> W = updated(problem, floats, one_thread());
    wanted.encode(m, v, step);
    check(same_bits(W, updated(problem, one.view(), one_thread())),
          "fused_update: the weights depend on how the moments are kept");
    check(one.same_as(wanted), "fused_update: codes of moments, type %d", static_cast<int>(type));
    updated(problem, four.view(), four_threads());
    check(four.same_as(one), "fused_update: codes depend on the number of threads");
  }
}

}  // namespace sae_fast::testing
