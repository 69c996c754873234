// Moments of a weight matrix as codes, rounded one by one on the host: what kernels must agree
// with.
#pragma once

#include <cstring>
#include <vector>

#include "kernels/common/moments.h"
#include "kernels/common/update_rule.h"
#include "tests/testing.h"

namespace sae_fast::testing {

struct MomentCodes {
  MomentCodes(UpdateRule rule, DType type, int64_t d_sae, int64_t d_in)
      : rule(rule),
        type(type),
        d_sae(d_sae),
        d_in(d_in),
        exp_avg(static_cast<size_t>(d_sae * d_in)),
        exp_avg_sq(exp_avg.size()),
        short_exp_avg(exp_avg.size()),
        short_exp_avg_sq(exp_avg.size()),
        exp_avg_scale(static_cast<size_t>(d_sae * moment_blocks(d_in))),
        exp_avg_sq_scale(exp_avg_scale.size()) {}

  Moments view() {
    Moments moments{};
    moments.type = type;
    const bool in_blocks = type == DType::kUInt8;
    moments.exp_avg = in_blocks ? static_cast<void*>(exp_avg.data()) : short_exp_avg.data();
    if (in_blocks) moments.exp_avg_scale = exp_avg_scale.data();
    if (has_exp_avg_sq(rule)) {
      void* const codes = exp_avg_sq.data();
      moments.exp_avg_sq = in_blocks ? codes : short_exp_avg_sq.data();
      if (in_blocks) moments.exp_avg_sq_scale = exp_avg_sq_scale.data();
    }
    moments.step = &step;
    return moments;
  }

  // v only where the rule has it.
  void encode(const std::vector<float>& m, const std::vector<float>& v, int64_t step_number) {
    step = step_number;
    for (int64_t j = 0; j < d_sae; ++j) {
      encode_row<ExpAvg>(m, j, short_exp_avg, exp_avg, exp_avg_scale);
      if (!has_exp_avg_sq(rule)) continue;
      encode_row<ExpAvgSq>(v, j, short_exp_avg_sq, exp_avg_sq, exp_avg_sq_scale);
    }
  }

  void decode(std::vector<float>& m, std::vector<float>& v) const {
    m.resize(exp_avg.size());
    v.resize(exp_avg.size());
    for (size_t i = 0; i < exp_avg.size(); ++i) {
      if (type == DType::kBFloat16) {
        m[i] = to_float(BFloat16{short_exp_avg[i]});
        v[i] = to_float(BFloat16{short_exp_avg_sq[i]});
        continue;
      }
      const size_t block = block_of(static_cast<int64_t>(i));
      m[i] = decode_moment<ExpAvg>(exp_avg[i], exp_avg_scale[block]);
      v[i] = decode_moment<ExpAvgSq>(exp_avg_sq[i], exp_avg_sq_scale[block]);
    }
  }

  bool same_as(const MomentCodes& other) const {
    return same_bits(exp_avg, other.exp_avg) && same_bits(exp_avg_sq, other.exp_avg_sq) &&
           same_bits(short_exp_avg, other.short_exp_avg) &&
           same_bits(short_exp_avg_sq, other.short_exp_avg_sq) &&
           same_bits(exp_avg_scale, other.exp_avg_scale) &&
           same_bits(exp_avg_sq_scale, other.exp_avg_sq_scale);
  }

  UpdateRule rule;
  DType type;
  int64_t d_sae, d_in;
  int64_t step = 0;

 private:
  size_t block_of(int64_t i) const {
    return static_cast<size_t>(i / d_in * moment_blocks(d_in) + i % d_in / kMomentBlock);
  }

  template <class Moment>
  void encode_row(const std::vector<float>& values, int64_t j, std::vector<uint16_t>& shorts,
                  std::vector<uint8_t>& codes, std::vector<float>& scales) {
    const uint32_t seed = moment_seed(step, j);
    std::vector<uint32_t> largest(scales.size());
    for (int64_t i = j * d_in; i < (j + 1) * d_in; ++i) {
      uint32_t& most = largest[block_of(i)];
      most = std::max(most, float_bits(values[static_cast<size_t>(i)]) & kMagnitude);
    }
    for (int64_t i = j * d_in; i < (j + 1) * d_in; ++i) {
      const auto at = static_cast<size_t>(i);
      const uint32_t random = moment_random(seed, static_cast<uint32_t>(i - j * d_in));
      if (type == DType::kBFloat16) {
        shorts[at] =
            static_cast<uint16_t>(round_moment_to_16<Moment>(float_bits(values[at]), random));
        continue;
      }
      const size_t block = block_of(i);
      scales[block] = float_from_bits(block_scale_bits<Moment>(largest[block]));
      codes[at] = encode_moment<Moment>(values[at], scales[block], random);
    }
  }

  std::vector<uint8_t> exp_avg, exp_avg_sq;               // kBlocks
  std::vector<uint16_t> short_exp_avg, short_exp_avg_sq;  // kBFloat16
  std::vector<float> exp_avg_scale, exp_avg_sq_scale;     // kBlocks
};

}  // namespace sae_fast::testing
