// The encoder's product X Wᵀ on AMX: bfloat16 operands, float32 sums, packed as the tiles are read.
//
// A k-step is 32 columns: 64 bytes of a row. Tokens stand in groups of 32, latents in halves of a
// panel, 32 too, each k-step of which is two tiles: [group][k-step][2][1 KB]. A tile of tokens
// holds 16 rows; a tile of latents holds 16 latents side by side, a pair of columns of each in a
// row.
#pragma once

#if defined(SAE_FAST_TILES)

#include "kernels/cpu/isa/product.h"
#include "kernels/cpu/isa/tiles.h"

namespace sae_fast::SAE_FAST_ISA {

// Rounds a row to steps(d_in) pairs of bfloat16, of which the pad is zero. Subnormal results, which
// tiles take for zero, are far below the slack of the error.
inline RowStats round_row_to_pairs(const float* row, int64_t d_in, int64_t steps, int32_t* pairs) {
  auto* to = reinterpret_cast<uint16_t*>(pairs);
  const float norm = norm_bound(row, d_in);
  if (!(norm < 1e18f)) {
    std::memset(pairs, 0, static_cast<size_t>(steps) * sizeof(int32_t));
    return {0.0f, norm, norm};
  }
  Vec squares = {};
  const auto round = [&](Vec value, uint16_t* out, int64_t count) {
    const auto bits = (VecInt)value;
    const VecInt rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & static_cast<int32_t>(0xffff0000);
    const Vec lost = value - (Vec)rounded;  // exact
    squares += lost * lost;
    for (int lane = 0; lane < count; ++lane) {
      out[lane] = static_cast<uint16_t>(static_cast<uint32_t>(rounded[lane]) >> 16);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= d_in; i += kLanes) round(load(row + i), to + i, kLanes);
  if (i < d_in) round(load_tail(row + i, d_in - i), to + i, d_in - i);
  for (i = d_in; i < 2 * steps; ++i) to[i] = 0;
  const double error = std::sqrt(static_cast<double>(reduce_add(squares)));
  const double inflate = 1.0 + (static_cast<double>(d_in) / kLanes + 32.0) * 0x1p-24;
  return {1.0f, norm, static_cast<float>(error * inflate + 1e-19)};
}

struct TileProduct {
  using Element = int32_t;  // two columns of bfloat16
  using Sum = float;
  using Registers = Tiles;
  static constexpr int kGroup = 32;  // rows that are multiplied together
  static constexpr bool kScaled = false;

  static constexpr int64_t kStepElements = 16;                   // of a row
  static constexpr int64_t kGroupStep = kGroup * kStepElements;  // of a group
  static constexpr int64_t kTileElements = kTileRows * kStepElements;

  static int64_t steps(int64_t d_in) { return (d_in + 31) / 32 * kStepElements; }

  // Roundings of a sum. A k-step adds 16 products, exact in float32, to each of two chains that
  // start at zero (15 roundings), joins them (1), and adds them to the tile: 1 for every k-step.
  // The factor 1.01 covers the rounded rows' norms, which are up to 1/256 larger.
  static double roundings(int64_t d_in) {
    const int64_t k_steps = steps(d_in) / kStepElements;
    return 1.01 * (static_cast<double>(k_steps) + 16.0);
  }

  static RowStats round(const float* row, int64_t d_in, int32_t* pairs) {
    return round_row_to_pairs(row, d_in, steps(d_in), pairs);
  }

  static void place(const int32_t* row, int64_t steps, int64_t position, int32_t* groups) {
    int32_t* to = groups + position / kGroup * kGroup * steps +
                  position % kGroup / kTileRows * kTileElements +
                  position % kTileRows * kStepElements;
    for (int64_t step = 0; step < steps; step += kStepElements, to += kGroupStep) {
      std::memcpy(to, row + step, kTileRowBytes);
    }
  }

  static void place_latents(const int32_t* rows, int64_t, int64_t steps, int64_t first,
                            int32_t* panel) {
    int32_t* to =
        panel + first / kGroup * kGroup * steps + first % kGroup / kTileRows * kTileElements;
    for (int64_t step = 0; step < steps; step += kStepElements, to += kGroupStep) {
      write_columns(rows + step, steps, kStepElements, to, kStepElements);
    }
  }

  // Rows in a block: as many as stay in a 2 MB L2, since every block reads all latents from L3.
  static int64_t most_rows(int64_t d_in) { return d_in <= 512 ? 1024 : (d_in <= 1024 ? 512 : 256); }

  // Sums of a group and half a panel are four tiles: [group][half][row / 16][latent / 16][16][16].
  static constexpr int64_t kBlockSums = kGroup * kGroup;

  // Both ways to multiply: a panel's sums of all rows, or half of them and two blocks more.
  static int64_t most_sums(int64_t positions) {
    return (positions / kGroup * kHalves + 1) * kBlockSums;
  }

  static const float* sums_at(const float* sums, int64_t row, int64_t latent) {
    return sums + row / kGroup * (kPanel / kGroup) * kBlockSums + latent / kGroup * kBlockSums +
           row % kGroup / kTileRows * (2 * kTileElements) +
           latent % kGroup / kTileRows * kTileElements + row % kTileRows * kTileRows +
           latent % kTileRows;
  }

  // Rows of x, packed in groups, times one panel.
  static void multiply(Tiles& tiles, const int32_t* groups, int64_t rows, const int32_t* panel,
                       int64_t steps, float* sums) {
    for (int64_t half = 0; half < kHalves; ++half) {
      const auto block_of = [&](int64_t row) {
        return sums + (row / kGroup * kHalves + half) * kBlockSums;
      };
      multiply_half(
          tiles, groups, rows, panel + half * kGroup * steps, steps, block_of, block_of, [] {},
          [](int64_t, const float*) {});
    }
  }

  // Multiplies with all panels and passes every block of sums to the filter. `bias` [64 * panels]
  // holds the latents' biases; `sums` is scratch for most_sums(rows) floats.
  template <class Filter>
  static void multiply_and_filter(Tiles& tiles, const int32_t* groups, int64_t rows,
                                  const int32_t* packed, int64_t panels, int64_t steps,
                                  const float* bias, float* sums, Filter& filter) {
    const int64_t fewest_steps = steps / kStepElements / parts_of(steps);
    const auto rows_a_step = static_cast<int32_t>(
        fewest_steps > 0 ? (kGroup + fewest_steps - 1) / fewest_steps : kGroup);
    int64_t made = 0;  // blocks; two places, so that one is filtered while the next is made
    for (int64_t half = 0; half < panels * kHalves; ++half) {
      multiply_half(
          tiles, groups, rows, packed + half * kGroup * steps, steps,
          [&](int64_t row) { return sums + (2 + row / kGroup) * kBlockSums; },
          [&](int64_t) { return sums + made++ % 2 * kBlockSums; },
          [&] { filter.step(rows_a_step); },
          [&](int64_t row, const float* block) { filter.begin(block, row, bias + half * kGroup); });
    }
    filter.finish();
  }

 private:
  static constexpr int64_t kHalves = kPanel / kGroup;

  // A part of half a panel stays in L1 while all tokens pass.
  static int64_t parts_of(int64_t steps) {
    constexpr int64_t kMostPart = 16 * kStepElements;
    return steps > 0 ? (steps + kMostPart - 1) / kMostPart : 1;
  }

  // Groups of rows times 32 latents, part by part of the columns. partial(row) is where the sums of
  // a group wait for the next part, final(row) where the last part leaves them, work() is called
  // after every k-step and done(row, block) after every block.
  template <class Partial, class Final, class Work, class Done>
  static void multiply_half(Tiles& tiles, const int32_t* groups, int64_t rows,
                            const int32_t* latents, int64_t steps, Partial&& partial, Final&& final,
                            Work&& work, Done&& done) {
    constexpr int64_t kMostAhead = 32;  // of longer rows the line buffers are full as it is
    const int64_t k_steps = steps / kStepElements;
    const int64_t parts = parts_of(steps);
    const int64_t blocks = (rows + kGroup - 1) / kGroup * parts;
    const int64_t share = k_steps <= kMostAhead ? (kGroup * steps / blocks + 15) / 16 * 16 : 0;
    const int32_t* next = latents + kGroup * steps;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = k_steps * part / parts;
      const int64_t count = k_steps * (part + 1) / parts - begin;
      for (int64_t row = 0; row < rows; row += kGroup, next += share) {
        for (int64_t i = 0; i < share; i += 16) __builtin_prefetch(next + i, 0, 2);
        const bool is_last = part + 1 == parts;
        const float* from = part > 0 ? partial(row) : nullptr;
        float* to = is_last ? final(row) : partial(row);
        multiply_block(tiles, groups + row * steps + begin * kGroupStep,
                       latents + begin * kGroupStep, count, from, to, work);
        if (is_last) done(row, to);
      }
    }
  }

  // 32 rows by 32 latents: two tiles of each side feed four of sums, one load a multiplication.
  template <class Work>
  static void multiply_block(Tiles& tiles, const int32_t* rows, const int32_t* latents,
                             int64_t k_steps, const float* from, float* to, Work&& work) {
    if (from != nullptr) {
      tiles.load<0>(from);
      tiles.load<1>(from + kTileElements);
      tiles.load<2>(from + 2 * kTileElements);
      tiles.load<3>(from + 3 * kTileElements);
    } else {
      tiles.zero<0>();
      tiles.zero<1>();
      tiles.zero<2>();
      tiles.zero<3>();
    }
    for (int64_t step = 0; step < k_steps; ++step) {
      tiles.load<6>(latents);
      tiles.load_streamed<4>(rows);
      tiles.multiply_bfloat16<0, 4, 6>();
      tiles.load<7>(latents + kTileElements);
      tiles.multiply_bfloat16<1, 4, 7>();
      tiles.load_streamed<5>(rows + kTileElements);
      tiles.multiply_bfloat16<2, 5, 6>();
      tiles.multiply_bfloat16<3, 5, 7>();
      rows += kGroupStep;
      latents += kGroupStep;
      work();
    }
    tiles.store<0>(to);
    tiles.store<1>(to + kTileElements);
    tiles.store<2>(to + 2 * kTileElements);
    tiles.store<3>(to + 3 * kTileElements);
  }
};

}  // namespace sae_fast::SAE_FAST_ISA

#endif
