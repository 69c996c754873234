// The products of level amx: emulated tiles against the processor's own, where it has them, bit for
// bit; and the error bound of the screening product against data that stress every part of it.
#include <algorithm>
#include <string>

#include "kernels/cpu/isa/screen.h"
#include "tests/testing.h"
#include "tests/tile_case.h"

namespace sae_fast::testing {
namespace {

#if defined(SAE_FAST_WITH_AMX)
bool has_tiles() {
  const std::vector<std::string> levels = cpu::available_instruction_sets();  // asks for permission
  return std::find(levels.begin(), levels.end(), "amx") != levels.end();
}

// Operands of one kind: ordinary, small, large, subnormal, or any bits at all.
uint16_t operand(Random& random, int64_t kind) {
  if (kind == 4) return static_cast<uint16_t>(random.integer(0, 0xffff));
  const float scales[] = {1.0f, 1e-19f, 1e18f, 1e-38f};
  return round_to_bfloat16(random.number(Numbers::kNormal) * scales[kind]).bits;
}

void test_byte_emulation(Random& random) {
  alignas(64) int8_t left[1024], right[1024];
  alignas(64) int32_t emulated[256], hardware[256];
  for (int8_t& value : left) value = static_cast<int8_t>(random.integer(-128, 127));
  for (int8_t& value : right) value = static_cast<int8_t>(random.integer(-128, 127));
  for (int i = 0; i < 256; ++i) {
    emulated[i] = hardware[i] = static_cast<int32_t>(random.integer(INT32_MIN, INT32_MAX));
  }
  multiply_bytes_emulated(left, right, emulated);
  multiply_bytes_on_hardware(left, right, hardware);
  for (int i = 0; i < 256; ++i) {
    check(emulated[i] == hardware[i], "sum %d of bytes: %d emulated, %d of the processor", i,
          emulated[i], hardware[i]);
  }
}

void test_emulation(Random& random) {
  alignas(64) uint16_t left[512], right[512];
  alignas(64) float emulated[256], hardware[256];
  for (int trial = 0; trial < 40; ++trial) {
    const int64_t left_kind = random.integer(0, 4), right_kind = random.integer(0, 4);
    for (uint16_t& value : left) value = operand(random, left_kind);
    for (uint16_t& value : right) value = operand(random, right_kind);
    for (int i = 0; i < 256; ++i) {
      emulated[i] = hardware[i] =
          random.integer(0, 1) == 0 ? 0.0f
                                    : random.number(Numbers::kNormal) * (trial % 2 ? 1.0f : 1e-37f);
    }
    multiply_tile_emulated(left, right, emulated);
    multiply_tile_on_hardware(left, right, hardware);
    for (int i = 0; i < 256; ++i) {
      check(float_bits(emulated[i]) == float_bits(hardware[i]) ||
                (std::isnan(emulated[i]) && std::isnan(hardware[i])),
            "sum %d of kinds %ld and %ld: %g emulated, %g of the processor", i, left_kind,
            right_kind, emulated[i], hardware[i]);
    }
  }
  test_byte_emulation(random);
}
#endif

// Rows of x and of W that stress one part of the bound each.
struct Pair {
  std::vector<float> x, w;
};

Pair stress(Random& random, int64_t kind, int64_t d_in) {
  Pair rows;
  for (int64_t i = 0; i < d_in; ++i) {
    const float a = random.number(Numbers::kNormal), b = random.number(Numbers::kNormal);
    const float sign = random.integer(0, 1) == 0 ? 1.0f : -1.0f;
    const float halfway = 1.0f + 0x1p-8f * 0.999f;  // half a unit of bfloat16 is lost
    switch (kind) {
      case 0:  // ordinary
        rows.x.push_back(a), rows.w.push_back(b);
        break;
      case 1:  // all roundings of the operands add up
        rows.x.push_back(sign * halfway), rows.w.push_back(sign * halfway);
        break;
      case 2:  // heavy tails
        rows.x.push_back(sign * std::exp(4.0f * a)), rows.w.push_back(std::exp(4.0f * b));
        break;
      case 3:  // products that are flushed to zero
        rows.x.push_back(1e-19f * a), rows.w.push_back(1e-19f * b);
        break;
      case 4:  // subnormal operands, which count as zero
        rows.x.push_back(1e-38f * std::fabs(a)), rows.w.push_back(std::fabs(b));
        break;
      default:  // sums that cancel
        rows.x.push_back(i % 2 != 0 ? -rows.x[i - 1] : a);
        rows.w.push_back(i % 2 != 0 ? rows.w[i - 1] : b);
    }
  }
  return rows;
}

void test_bound(Random& random) {
  using Product = SAE_FAST_ISA::TileProduct;
  const int64_t d_in = random.integer(1, 700);
  const int64_t steps = Product::steps(d_in);
  constexpr int64_t kLatents = 16;
  std::vector<Pair> pairs;
  for (int64_t j = 0; j < kLatents; ++j) pairs.push_back(stress(random, j % 6, d_in));
  std::vector<int32_t> rows(kLatents * steps), groups(32 * steps), panel(64 * steps);
  std::vector<float> sums(32 * 64);
  std::vector<SAE_FAST_ISA::RowStats> x_stats, w_stats;
  SAE_FAST_ISA::Tiles tiles;
  for (int64_t j = 0; j < kLatents; ++j) {
    x_stats.push_back(Product::round(pairs[j].x.data(), d_in, rows.data()));
    Product::place(rows.data(), steps, j, groups.data());
  }
  for (int64_t j = 0; j < kLatents; ++j) {
    w_stats.push_back(Product::round(pairs[j].w.data(), d_in, rows.data() + j * steps));
  }
  Product::place_latents(rows.data(), steps, steps, 0, panel.data());
  Product::multiply(tiles, groups.data(), kLatents, panel.data(), steps, sums.data());
  for (int64_t j = 0; j < kLatents; ++j) {
    SAE_FAST_ISA::LatentBounds bounds;
    bounds.norm = w_stats[j].norm;
    bounds.error = w_stats[j].error;
    const float bound = bounds.score_error<Product>(x_stats[j], d_in);
    const float* x = pairs[j].x.data();
    const float* w = pairs[j].w.data();
    const float score = SAE_FAST_ISA::dot_in_strips(x, w, d_in);
    const float screened = *Product::sums_at(sums.data(), j, j);
    check(std::fabs(static_cast<double>(score) - screened) <= bound,
          "d_in %ld, data of kind %ld: screened %g, score %g, bound %g", d_in, j % 6, screened,
          score, bound);
  }
}

}  // namespace

void test_tiles(uint64_t seed) {
  Random random(seed);
  test_bound(random);
#if defined(SAE_FAST_WITH_AMX)
  static const bool on_hardware = has_tiles();
  if (seed == 0) {
    std::printf("emulated tiles are compared with %s\n",
                on_hardware ? "this processor's" : "nothing: this processor has none");
  }
  if (on_hardware) test_emulation(random);
#endif
}

}  // namespace sae_fast::testing
