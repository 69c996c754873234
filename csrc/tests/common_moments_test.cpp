// Tests of the moments' codes: every one of them, and every choice of the 16 random bits.
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/common/moments.h"
#include "tests/testing.h"

namespace sae_fast::testing {
namespace {

constexpr uint32_t kChoices = 1u << 16;

// Returns random bits that are equal for both moments.
uint32_t both_halves(uint32_t random) { return random << 16 | random; }

template <class Moment>
float through_16(float value, uint32_t random) {
  const uint32_t code = round_moment_to_16<Moment>(float_bits(value), both_halves(random));
  return to_float(BFloat16{static_cast<uint16_t>(code)});
}

template <class Moment>
float through_8(float value, float scale, uint32_t random) {
  return decode_moment<Moment>(encode_moment<Moment>(value, scale, both_halves(random)), scale);
}

template <class Moment>
float scale_of(float largest) {
  return float_from_bits(block_scale_bits<Moment>(float_bits(largest)));
}

template <class Moment>
void codes_survive_the_round_trip() {
  for (const float scale : {scale_of<Moment>(1e-38f), 0x1p-30f, 1.0f, scale_of<Moment>(FLT_MAX)}) {
    for (uint32_t code = 0; code < 256; ++code) {
      const float value = decode_moment<Moment>(static_cast<uint8_t>(code), scale);
      check(std::isfinite(value), "moment: code %u decodes to %g", code,
            static_cast<double>(value));
      for (const uint32_t random : {0u, 1u, kChoices / 2, kChoices - 1}) {
        const uint32_t again = encode_moment<Moment>(value, scale, both_halves(random));
        check(again == code, "moment: code %u becomes %u", code, again);
      }
    }
  }
}

template <class Moment>
void codes_ascend() {
  float before = -1.0f;
  for (uint32_t code = 0; code <= Moment::kLargestCode; ++code) {
    const float value = decode_moment<Moment>(static_cast<uint8_t>(code), 1.0f);
    check(value > before, "moment: code %u is %g, not above %g", code, static_cast<double>(value),
          static_cast<double>(before));
    before = value;
  }
}

// Over all choices a number is rounded to its two neighbours so that the mean is the number.
template <class Moment>
void rounding_has_the_right_mean() {
  Random random(5);
  for (int i = 0; i < 40; ++i) {
    const auto exponent = static_cast<float>(random.integer(-60, 0)) / 5.0f;
    const float value = std::exp2(exponent) * (Moment::kSignCode != 0 && i % 2 == 0 ? -1.0f : 1.0f);
    const float scale = scale_of<Moment>(1.0f);
    double sum_8 = 0.0, sum_16 = 0.0;
    for (uint32_t choice = 0; choice < kChoices; ++choice) {
      sum_8 += static_cast<double>(through_8<Moment>(value, scale, choice));
      sum_16 += static_cast<double>(through_16<Moment>(value, choice));
    }
    const double wanted = static_cast<double>(value) * kChoices;
    // Half a choice, of which each moves by the distance of two codes.
    const double step = std::fabs(static_cast<double>(value)) / 8.0 + scale / 8.0f;
    check(std::fabs(sum_8 - wanted) <= 0.51 * step, "moment in 8 bits: mean of %g off by %g",
          static_cast<double>(value), (sum_8 - wanted) / kChoices);
    check(sum_16 == wanted, "moment in 16 bits: mean of %g off by %g", static_cast<double>(value),
          (sum_16 - wanted) / kChoices);
  }
}

// A block's largest number has a code whatever the choice, and that is a neighbour of it.
template <class Moment>
void largest_number_is_kept() {
  for (const float largest : {1e-20f, 1.0f, std::nextafter(2.0f, 0.0f), 1.9e10f, 8e37f}) {
    const float scale = scale_of<Moment>(largest);
    for (const uint32_t random : {0u, kChoices - 1}) {
      const double error = static_cast<double>(through_8<Moment>(largest, scale, random) - largest);
      check(std::fabs(error) <= largest / 8.0, "moment: %g is off by %g",
            static_cast<double>(largest), error);
    }
  }
}

void second_moments_never_become_0() {
  for (const float value : {FLT_TRUE_MIN, FLT_MIN, 1e-30f, 1e-20f}) {
    check(through_16<ExpAvgSq>(value, 0) > 0.0f, "moment in 16 bits: %g becomes 0",
          static_cast<double>(value));
    check(through_8<ExpAvgSq>(value, scale_of<ExpAvgSq>(1e10f), 0) > 0.0f,
          "moment in 8 bits: %g becomes 0", static_cast<double>(value));
  }
  check(through_16<ExpAvg>(5e-41f, 0) == 0.0f, "moment in 16 bits: exp_avg keeps less than a code");
  for (const uint32_t random : {0u, kChoices - 1}) {
    check(through_16<ExpAvgSq>(0.0f, random) == 0.0f, "moment in 16 bits: 0 becomes another");
    check(through_8<ExpAvgSq>(0.0f, scale_of<ExpAvgSq>(0.0f), random) == 0.0f,
          "moment in 8 bits: 0 becomes another");
    check(through_8<ExpAvg>(0.0f, scale_of<ExpAvg>(0.0f), random) == 0.0f,
          "moment in 8 bits: 0 becomes another");
  }
}

template <class Moment>
void nothing_becomes_infinite() {
  for (const float value : {FLT_MAX, INFINITY, NAN}) {
    for (const uint32_t random : {0u, kChoices - 1}) {
      const float in_16 = through_16<Moment>(value, random);
      const float in_8 = through_8<Moment>(value, scale_of<Moment>(value), random);
      check(std::isfinite(in_16) && in_16 > 3e38f, "moment in 16 bits: %g becomes %g",
            static_cast<double>(value), static_cast<double>(in_16));
      check(std::isfinite(in_8) && in_8 > 1e38f, "moment in 8 bits: %g becomes %g",
            static_cast<double>(value), static_cast<double>(in_8));
    }
  }
}

// Every bit is set half of the time, for neighbours in each of the three numbers and both halves.
void random_bits_are_even() {
  constexpr int kDraws = 1 << 14;
  for (int axis = 0; axis < 3; ++axis) {
    std::vector<int> set(32);
    for (int i = 0; i < kDraws; ++i) {
      const int64_t step = axis == 0 ? i : int64_t{3} << 31;
      const uint32_t seed = moment_seed(step, axis == 1 ? i : 77);
      const uint32_t random = moment_random(seed, axis == 2 ? static_cast<uint32_t>(i) : 5u);
      for (int bit = 0; bit < 32; ++bit) set[static_cast<size_t>(bit)] += random >> bit & 1u;
    }
    for (const int count : set) {  // five standard deviations
      check(std::abs(count - kDraws / 2) < 5 * 64, "random bits: %d of %d along axis %d", count,
            kDraws, axis);
    }
  }
  check(moment_seed(1, 0) != moment_seed(1 + (int64_t{1} << 32), 0), "random bits: a step's half");
}

}  // namespace

void test_moment_codes() {
  codes_survive_the_round_trip<ExpAvg>();
  codes_survive_the_round_trip<ExpAvgSq>();
  codes_ascend<ExpAvg>();
  codes_ascend<ExpAvgSq>();
  rounding_has_the_right_mean<ExpAvg>();
  rounding_has_the_right_mean<ExpAvgSq>();
  largest_number_is_kept<ExpAvg>();
  largest_number_is_kept<ExpAvgSq>();
  second_moments_never_become_0();
  nothing_becomes_infinite<ExpAvg>();
  nothing_becomes_infinite<ExpAvgSq>();
  random_bits_are_even();
}

}  // namespace sae_fast::testing
