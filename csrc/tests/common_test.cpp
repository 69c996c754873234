// Tests of the arithmetic in kernels/common, which host and device share.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/common/chunks.h"
#include "kernels/common/half.h"
#include "kernels/common/order.h"
#include "kernels/common/row_norm.h"
#include "kernels/common/update_rule.h"
#include "tests/testing.h"
#include "tests/update_formulas.h"

namespace sae_fast::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

bool close(double value, double wanted, double tolerance) {
  return std::fabs(value - wanted) <= tolerance * (1.0 + std::fabs(wanted));
}

constexpr UpdateSettings kAdam{UpdateRule::kAdam, 0.0, 0.9, 0.999, 1e-8, 0.0, false};

void steps_follow_the_formulas_in_double(UpdateRule rule) {
  const double lr = 3e-4;
  for (const double weight_decay : {0.0, 0.01}) {
    UpdateSettings settings = some_settings(rule);
    settings.weight_decay = weight_decay;
    float weight = 0.5f, exp_avg = 0.0f, exp_avg_sq = 0.0f;
    DoubleWeight wanted{0.5, 0.0, 0.0};
    Random random(7);
    for (int64_t step = 1; step <= 200; ++step) {
      const auto grad = static_cast<float>(random.integer(-1000, 1000)) * 1e-3f;
      const UpdateStep numbers = some_update_step(settings, lr, step);
      weight = with_rule(rule, [&](auto known) {
        return update_weight<decltype(known)::value>(numbers, weight, grad, exp_avg, exp_avg_sq);
      });
      wanted = step_in_double(settings, lr, step, static_cast<double>(grad), wanted);
      const double rounding = static_cast<double>(step) * 0x1p-24;  // half an ulp a step
      check(close(weight, wanted.weight, rounding), "rule %d: step %ld: %.9g, not %.9g",
            static_cast<int>(rule), static_cast<long>(step), static_cast<double>(weight),
            wanted.weight);
      check(close(exp_avg, wanted.exp_avg, 1e-6) && close(exp_avg_sq, wanted.exp_avg_sq, 1e-6),
            "rule %d: moments of step %ld", static_cast<int>(rule), static_cast<long>(step));
    }
  }
}

float adam_update(const UpdateStep& step, float weight, float grad, float& m, float& v) {
  return update_weight<UpdateRule::kAdam>(step, weight, grad, m, v);
}

void adam_first_step_is_the_learning_rate() {
  const UpdateStep step = some_update_step(kAdam, 1e-3, 1);
  for (const float grad : {1e-3f, -5.0f, 2e4f}) {
    float exp_avg = 0.0f, exp_avg_sq = 0.0f;
    const float weight = adam_update(step, 0.0f, grad, exp_avg, exp_avg_sq);
    check(close(weight, grad > 0.0f ? -1e-3 : 1e-3, 1e-7), "adam: first step %g for gradient %g",
          static_cast<double>(weight), static_cast<double>(grad));
  }
}

void adam_coefficients_are_rounded_once() {
  const UpdateStep step = some_update_step(kAdam, 1e-3, 1000);
  check(step.one_minus_beta2 == static_cast<float>(1.0 - 0.999), "adam: 1 - beta2 is %.9g",
        static_cast<double>(step.one_minus_beta2));
  check(step.one_minus_beta1 == static_cast<float>(1.0 - 0.9), "adam: 1 - beta1 is %.9g",
        static_cast<double>(step.one_minus_beta1));
  check(step.decay == 1.0f, "adam: decay without weight decay is %.9g",
        static_cast<double>(step.decay));
}

void adam_leaves_a_settled_moment_alone() {
  const UpdateStep step = some_update_step(kAdam, 1e-3, 5);
  float exp_avg = 0.1f, exp_avg_sq = 0.01f;
  adam_update(step, 1.0f, 0.1f, exp_avg, exp_avg_sq);
  check(exp_avg == 0.1f, "adam: the moment moved to %.9g", static_cast<double>(exp_avg));
}

void signum_does_not_move_a_weight_without_momentum() {
  UpdateSettings settings = some_settings(UpdateRule::kSignum);
  settings.weight_decay = 0.0;
  const UpdateStep step = some_update_step(settings, 1e-3, 1);
  for (const float zero : {0.0f, -0.0f}) {
    float exp_avg = zero, unused = 0.0f;
    const float weight = update_weight<UpdateRule::kSignum>(step, 0.3f, zero, exp_avg, unused);
    check(weight == 0.3f, "signum: the weight moved to %.9g", static_cast<double>(weight));
  }
}

// x is the mean of the walk where the learning rate does not change, whatever the momentum.
void schedule_free_signum_averages_its_walk() {
  for (const double beta : {0.5, 0.9, 0.95}) {
    UpdateSettings settings = some_settings(UpdateRule::kScheduleFreeSignum);
    settings.weight_decay = 0.0;
    settings.beta1 = beta;
    float weight = 0.25f, exp_avg = 0.0f, unused = 0.0f;
    double z = 0.25, sum = 0.0;
    Random random(11);
    for (int64_t step = 1; step <= 50; ++step) {
      const auto grad = static_cast<float>(random.integer(-2, 3));
      z -= grad > 0.0f ? 1e-2 : grad < 0.0f ? -1e-2 : 0.0;
      sum += z;
      weight = update_weight<UpdateRule::kScheduleFreeSignum>(
          some_update_step(settings, 1e-2, step), weight, grad, exp_avg, unused);
      const double difference = exp_avg;
      const double x = weight - (1.0 - beta) / beta * difference;
      check(close(x, sum / static_cast<double>(step), 1e-6), "schedule-free: x is %.9g, not %.9g",
            x, sum / static_cast<double>(step));
      check(close(weight + difference, z, 1e-6), "schedule-free: z is %.9g, not %.9g",
            weight + difference, z);
    }
  }
}

void schedule_free_signum_counts_a_step_by_its_squared_rate() {
  const UpdateSettings settings = some_settings(UpdateRule::kScheduleFreeSignum);
  const double rates[] = {0.0, 1e-3, 2e-3, 2e-3}, wanted[] = {0.0, 1.0, 4.0 / 5.0, 4.0 / 9.0};
  int64_t steps = 0, halted = -1;
  double lr_squares = 0.0;
  for (int i = 0; i < 4; ++i) {
    UpdateScalars scalars{};
    update_scalars(settings, {1.0, rates[i], 1.0f}, steps, halted, &lr_squares, scalars);
    check(close(scalars.step.average_share, wanted[i], 1e-6), "schedule-free: share %g, not %g",
          static_cast<double>(scalars.step.average_share), wanted[i]);
  }
  const double before = lr_squares;
  UpdateScalars scalars{};
  update_scalars(settings, {HUGE_VAL, 1.0, 1.0f}, steps, halted, &lr_squares, scalars);
  check(lr_squares == before, "schedule-free: a step that is not made counts in the average");
}

void keys_ascend_with_values() {
  const float denormal = std::numeric_limits<float>::denorm_min();
  const float smallest = std::numeric_limits<float>::min();
  const float largest = std::numeric_limits<float>::max();
  const std::vector<float> ascending = {-kInfinity,
                                        -largest,
                                        -2.0f,
                                        -1.0f,
                                        -smallest,
                                        -denormal,
                                        0.0f,
                                        denormal,
                                        smallest,
                                        1.0f,
                                        std::nextafter(1.0f, 2.0f),
                                        largest,
                                        kInfinity};
  for (size_t i = 1; i < ascending.size(); ++i) {
    check(ordered_key(ascending[i - 1]) < ordered_key(ascending[i]), "key: %g not below %g",
          static_cast<double>(ascending[i - 1]), static_cast<double>(ascending[i]));
  }
  check(ordered_key(-0.0f) == 0 && ordered_key(0.0f) == 0, "key: the zeros differ");
  for (const float nan :
       {kNan, -kNan, float_from_bits(0x7f800001u), float_from_bits(0xffffffffu)}) {
    check(ordered_key(nan) == kNanKey, "key: a NaN has key %d", ordered_key(nan));
    check(ordered_key(nan) > ordered_key(kInfinity), "key: a NaN is not above infinity");
  }
}

// Exactly one of a before b, b before a, or the same candidate; and what is before is transitive.
void better_is_a_strict_total_order() {
  const std::vector<float> values = {kNan, -kNan, kInfinity, 1.0f, 0.0f, -0.0f, -1.0f, -kInfinity};
  struct Candidate {
    float value;
    int32_t index;
  };
  std::vector<Candidate> all;
  for (const float value : values) {
    for (const int32_t index : {0, 1, INT32_MAX}) all.push_back({value, index});
  }
  const auto before = [](const Candidate& a, const Candidate& b) {
    return better(a.value, a.index, b.value, b.index);
  };
  for (const Candidate& a : all) {
    for (const Candidate& b : all) {
      const bool same = ordered_key(a.value) == ordered_key(b.value) && a.index == b.index;
      check(int{before(a, b)} + int{before(b, a)} + int{same} == 1, "order: (%g, %d), (%g, %d)",
            static_cast<double>(a.value), a.index, static_cast<double>(b.value), b.index);
      for (const Candidate& c : all) {
        check(!before(a, b) || !before(b, c) || before(a, c), "order: not transitive");
      }
    }
  }
}

void ties_go_to_the_lower_index_and_nan_comes_first() {
  check(better(2.0f, 9, 1.0f, 0), "order: the larger value is not first");
  check(better(1.0f, 3, 1.0f, 4) && !better(1.0f, 4, 1.0f, 3), "order: a tie of values");
  check(better(-0.0f, 3, 0.0f, 4) && better(0.0f, 3, -0.0f, 4), "order: a tie of zeros");
  check(better(kNan, 9, kInfinity, 0), "order: NaN is not first");
  check(better(-kNan, 3, kNan, 4), "order: a tie of NaNs");
}

void halves_survive_the_round_trip() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float brain = to_float(BFloat16{half});
    const float single = to_float(Float16{half});
    check(std::isnan(brain) ? std::isnan(to_float(round_to_bfloat16(brain)))
                            : round_to_bfloat16(brain).bits == half,
          "bfloat16 %04x", bits);
    check(std::isnan(single) ? std::isnan(to_float(round_to_float16(single)))
                             : round_to_float16(single).bits == half,
          "float16 %04x", bits);
  }
}

void row_norm_has_a_floor_and_keeps_nan() {
  check(row_norm(0.0f) == kSmallestRowNorm, "row_norm: of a zero row");
  check(row_norm(4.0f) == 2.0f, "row_norm: of 4");
  check(std::isnan(row_norm(kNan)), "row_norm: of NaN");
}

// Latents of 129 entries waste the most room: two chunks for hardly more than one.
void chunks_fit_the_room_planned_for_them() {
  Random random(3);
  for (int problem = 0; problem < 2000; ++problem) {
    const int64_t longest = problem % 2 == 0 ? kChunkEntries + 1 : random.integer(1, 2000);
    int64_t entries = 0, chunks = 0, covered = 0;
    for (int64_t latent = 0; latent < 50; ++latent) {
      const int64_t count = problem % 4 == 0 ? longest : random.integer(0, longest);
      entries += count;
      chunks += chunks_in(count);
      covered += chunks_in(count) > 0 ? chunks_in(count) * kChunkEntries : count;
    }
    check(chunks <= max_chunks(entries), "chunks: %ld of %ld entries", static_cast<long>(chunks),
          static_cast<long>(entries));
    check(covered >= entries, "chunks: entries are left out");
  }
}

void cached_rows_fit_and_are_all_sums_in_chunks_and_few_others() {
  Random random(4);
  for (int problem = 0; problem < 2000; ++problem) {
    const int64_t tokens = random.integer(0, 300);
    const int64_t entries = tokens * random.integer(0, 800);
    const RowCache cache = plan_row_cache(entries, tokens);
    const int64_t most_in_chunks = entries / (kChunkEntries + 1);
    check(cache.rows <= std::max(2 * tokens, most_in_chunks), "cache: %ld rows for %ld tokens",
          static_cast<long>(cache.rows), static_cast<long>(tokens));
    check(chunks_in(cache.above) == 0, "cache: a sum of %ld entries, in chunks, is not kept",
          static_cast<long>(cache.above));
    const int64_t most = entries / (cache.above + 1);  // latents of `above` + 1 entries each
    check(most <= cache.rows, "cache: %ld rows, %ld needed", static_cast<long>(cache.rows),
          static_cast<long>(most));
  }
}

}  // namespace

void test_moment_codes();  // common_moments_test.cpp

}  // namespace sae_fast::testing

int main() {
  using namespace sae_fast::testing;
  for (const auto rule : kRules) steps_follow_the_formulas_in_double(rule);
  signum_does_not_move_a_weight_without_momentum();
  schedule_free_signum_averages_its_walk();
  schedule_free_signum_counts_a_step_by_its_squared_rate();
  adam_first_step_is_the_learning_rate();
  adam_coefficients_are_rounded_once();
  adam_leaves_a_settled_moment_alone();
  keys_ascend_with_values();
  better_is_a_strict_total_order();
  ties_go_to_the_lower_index_and_nan_comes_first();
  halves_survive_the_round_trip();
  row_norm_has_a_floor_and_keeps_nan();
  chunks_fit_the_room_planned_for_them();
  cached_rows_fit_and_are_all_sums_in_chunks_and_few_others();
  test_moment_codes();
  std::printf("common: %d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
