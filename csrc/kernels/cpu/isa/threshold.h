// Threshold codes of a block of tokens: screened by a cheap product, scored exactly, then filtered.
#pragma once

#include "kernels/cpu/isa/token_block.h"

namespace sae_fast::SAE_FAST_ISA {

template <class Product, class T>
class ThresholdWorker {
 public:
  // Blocks of up to `rows` tokens, of which `positions` go through the product at once.
  ThresholdWorker(const cpu::ThresholdProblem& problem, const LatentBounds& bounds,
                  const float* thresholds, int64_t rows, int64_t positions)
      : problem_(problem),
        bounds_(bounds),
        thresholds_(thresholds),
        rows_(rows),
        positions_(positions) {}

  static int64_t capacity(const cpu::ThresholdProblem& problem) {
    return cpu::panels(problem.encoder.d_sae) * kPanel + 64;
  }

  bool allocate() {
    const int64_t d_in = problem_.encoder.d_in;
    const int64_t entries = rows_ * capacity(problem_);
    most_pairs_ = entries < kUsualPairs ? entries : kUsualPairs;
    if (most_pairs_ < capacity(problem_)) most_pairs_ = capacity(problem_);
    return block_.allocate(rows_, positions_, d_in) && value_memory_.reset(entries * 4) &&
           index_memory_.reset(entries * 4) && count_memory_.reset(rows_ * 4) &&
           pairs_.allocate(rows_, d_in, problem_.encoder.d_sae, most_pairs_);
  }

  bool run(int64_t first, int64_t count, cpu::ThresholdSink& sink) {
    for (int64_t begin = 0; begin < count; begin += positions_) {
      const int64_t end = count - begin < positions_ ? count : begin + positions_;
      for (int64_t row = begin; row < end; ++row) {
        block_.set(row, problem_.x + (first + row) * problem_.encoder.d_in, problem_.b_dec);
        block_.pack(row, row - begin, bounds_);
        count_of(row) = 0;
      }
      screen(begin, end);
    }
    for (int64_t row = 0; row < count; ++row) {
      if (!(block_.error(row) < INFINITY)) list_all(row);
      add_outliers(row);
    }
    for (int64_t begin = 0, end = 0; begin < count; begin = end) {
      int64_t pairs = 0;
      for (; end < count && pairs + count_of(end) <= most_pairs_; ++end) pairs += count_of(end);
      score(begin, end, count);
    }
    for (int64_t row = 0; row < count; ++row) {
      if (!sink.row(first + row, values(row), indices(row), keep(row))) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kUsualPairs = int64_t{1} << 20;  // that are scored together

  float* values(int64_t row) const { return value_memory_.as<float>() + row * capacity(problem_); }
  int32_t* indices(int64_t row) const {
    return index_memory_.as<int32_t>() + row * capacity(problem_);
  }
  int32_t& count_of(int64_t row) const { return count_memory_.as<int32_t>()[row]; }

  void screen(int64_t begin, int64_t end) {
    typename Product::Registers registers;
    for (int64_t panel = 0; panel < cpu::panels(problem_.encoder.d_sae); ++panel) {
      const auto* sums = block_.multiply(registers, end - begin, problem_.encoder, panel);
      const auto first = static_cast<int32_t>(panel * kPanel);
      for (int64_t row = begin; row < end; ++row) {
        if (!(block_.error(row) < INFINITY)) continue;
        const PanelScores scores =
            panel_scores<Product>(sums, row - begin, problem_.encoder.stats + first,
                                  block_.scale(row), bounds_.bias + first);
        const uint64_t bits = at_least(scores, thresholds_ + first, block_.error(row));
        if (bits == 0) continue;
        count_of(row) = append(scores, bits, first, values(row), indices(row), count_of(row));
      }
    }
  }

  void list_all(int64_t row) {
    count_of(row) = 0;
    for (int32_t j = 0; j < problem_.encoder.d_sae; ++j) {
      if (!std::isnan(bounds_.bias[j])) indices(row)[count_of(row)++] = j;
    }
  }

  void add_outliers(int64_t row) {
    for (int64_t i = 0; i < bounds_.outlier_count; ++i) {
      const int32_t latent = bounds_.outliers[i];
      int32_t at = count_of(row)++;
      for (; at > 0 && indices(row)[at - 1] > latent; --at) {
        indices(row)[at] = indices(row)[at - 1];
        values(row)[at] = values(row)[at - 1];
      }
      indices(row)[at] = latent;
    }
  }

  // Exact scores of rows [begin, end) of `count`.
  void score(int64_t begin, int64_t end, int64_t count) {
    pairs_.start();
    each_entry(begin, end, [this](int32_t latent, int32_t, int32_t) { pairs_.count(latent); });
    pairs_.begin_adding();
    each_entry(begin, end, [this](int32_t latent, int32_t row, int32_t place) {
      pairs_.add(latent, row, place);
    });
    pairs_.score(block_.rows(), count, scoring_rows<T>(problem_.encoder), problem_.b_enc,
                 [this](int32_t place, float score) { value_memory_.as<float>()[place] = score; });
  }

  // Calls function(latent, row, place) for every entry that is still to be scored.
  template <class Function>
  void each_entry(int64_t begin, int64_t end, Function&& function) const {
    for (int64_t row = begin; row < end; ++row) {
      const auto first = static_cast<int32_t>(row * capacity(problem_));
      for (int32_t i = 0; i < count_memory_.as<int32_t>()[row]; ++i) {
        const int32_t latent = indices(row)[i];
        if (!block_.is_approximate(row, bounds_.bias[latent])) continue;
        function(latent, static_cast<int32_t>(row), first + i);
      }
    }
  }

  // Keeps the entries above the threshold and above zero, and every NaN.
  int64_t keep(int64_t row) {
    const int32_t* latents = indices(row);
    int64_t kept = 0;
    for (int32_t i = 0; i < count_of(row); ++i) {
      const int32_t latent = latents[i];
      const float value = values(row)[i];
      const bool fires = value > problem_.threshold[latent] && value > 0.0f;
      if (!fires && !std::isnan(value)) continue;
      values(row)[kept] = value;
      indices(row)[kept++] = latent;
    }
    return kept;
  }

  const cpu::ThresholdProblem& problem_;
  const LatentBounds& bounds_;
  const float* thresholds_;  // [padded] lower limits of what screening must keep
  int64_t rows_, positions_, most_pairs_ = 0;
  TokenBlock<Product, T> block_;
  PairScores<T> pairs_;
  Scratch value_memory_, index_memory_, count_memory_;
};

}  // namespace sae_fast::SAE_FAST_ISA
