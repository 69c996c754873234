// Top-k of a block of tokens: guess a threshold, screen, verify, score exactly, rank. For the top-k
// of a whole batch the threshold is the batch's floor, and the latents that pass are collected, not
// ranked.
#pragma once

#include "kernels/cpu/isa/batch_topk.h"
#include "kernels/cpu/isa/token_block.h"

namespace sae_fast::SAE_FAST_ISA {

// Running mean and deviation of (k-th value) / |x|: a good guess at the next token's k-th value.
// It changes the time a token takes, never the result.
class ThresholdGuess {
 public:
  void add(double ratio) {
    ++count_;
    sum_ += ratio;
    squares_ += ratio * ratio;
  }
  static constexpr int64_t kFewest = 64;  // tokens before the first guess

  bool ready() const { return count_ >= kFewest; }

  // Per unit of |x|; minus infinity before there are enough tokens.
  float value() const {
    if (!ready()) return -INFINITY;
    const double mean = sum_ / static_cast<double>(count_);
    const double variance = squares_ / static_cast<double>(count_) - mean * mean;
    const double deviation = std::sqrt(variance > 0.0 ? variance : 0.0);
    return static_cast<float>(mean - 3.0 * deviation - 0.02 * std::fabs(mean));
  }

 private:
  int64_t count_ = 0;
  double sum_ = 0.0;
  double squares_ = 0.0;
};

// One thread's worker, which takes blocks of tokens one after another. With a floor it collects the
// candidates for the best of the batch; without, it writes the best of every token.
template <class Product, class T>
class TopKWorker {
 public:
  // Blocks of up to `rows` tokens, of which `positions` go through the product at once.
  TopKWorker(const cpu::TopKProblem& problem, const LatentBounds& bounds, int64_t rows,
             int64_t positions, BatchFloor* floor)
      : problem_(problem), bounds_(bounds), rows_(rows), positions_(positions), floor_(floor) {
    const int64_t d_sae = problem.encoder.d_sae;
    main_.k = floor == nullptr ? problem.k
                               : INT64_MAX;  // a token may have any number of the batch's best
    main_.capacity = main_capacity(problem, floor != nullptr) + bounds.outlier_count;
    main_.reserved = aux_.reserved = bounds.outlier_count;
    aux_.k = problem.k_aux < bounds.dead_count ? problem.k_aux : bounds.dead_count;
    aux_.capacity = CandidateRows::capacity_for(aux_.k, d_sae) + bounds.outlier_count;
  }

  static int64_t bytes_per_row(const cpu::TopKProblem& problem, const LatentBounds& bounds,
                               bool batch) {
    const int64_t d_sae = problem.encoder.d_sae;
    int64_t entries = main_capacity(problem, batch) + bounds.outlier_count;
    if (problem.k_aux > 0) {
      entries += CandidateRows::capacity_for(problem.k_aux, d_sae) + bounds.outlier_count;
    }
    return entries * (8 + 16);  // a candidate and a pair
  }

  bool allocate() {
    const int64_t d_sae = problem_.encoder.d_sae;
    const int64_t main_bytes = rows_ * CandidateRows::bytes_per_row(main_.capacity);
    const int64_t aux_bytes = wants_aux() ? rows_ * CandidateRows::bytes_per_row(aux_.capacity) : 0;
    const int64_t pairs = rows_ * (main_.capacity + (wants_aux() ? aux_.capacity : 0));
    int64_t widest = main_.capacity > aux_.capacity ? main_.capacity : aux_.capacity;
    widest = (widest > d_sae ? widest : d_sae) + 16;
    if (!block_.allocate(rows_, positions_, problem_.encoder.d_in) ||
        !main_memory_.reset(main_bytes) || !aux_memory_.reset(aux_bytes) ||
        !pairs_.allocate(rows_, problem_.encoder.d_in, d_sae, pairs) ||
        !active_memory_.reset(positions_ * 4) || !wide_memory_.reset(widest * 28) ||
        !allocate_log()) {
      return false;
    }
    main_.place(main_memory_.as<char>(), rows_);
    if (wants_aux()) aux_.place(aux_memory_.as<char>(), rows_);
    active_ = active_memory_.as<int32_t>();
    order_ = wide_memory_.as<uint64_t>();
    scores_ = wide_memory_.as<float>(widest * 16);
    keys_ = wide_memory_.as<int32_t>(widest * 20);
    all_ = wide_memory_.as<int32_t>(widest * 24);
    return floor_ == nullptr || found_.allocate(problem_.tokens * problem_.k, floor_);
  }

  // The candidates that this worker has collected.
  BatchCandidates& found() { return found_; }

  // Tokens [first, first + count) of the problem, count <= rows.
  void run(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    for (int64_t begin = 0, end = 0; begin < count; begin = end) {
      // Without a guess everything is a candidate: only as many tokens as the first guess needs.
      const bool guessing =
          (floor_ != nullptr || guess_.ready()) && (!selects_among_dead() || aux_guess_.ready());
      const int64_t most = guessing ? positions_ : ThresholdGuess::kFewest;
      const int64_t rows = most < positions_ ? most : positions_;
      end = count - begin < rows ? count : begin + rows;
      find_candidates(begin, end);
    }
    score_pairs();
    for (int64_t row = 0; row < count; ++row) finish(row);
  }

  // The product alone, for benchmarks.
  void run_product(int64_t first, int64_t count) {
    for (int64_t begin = 0; begin < count; begin += positions_) {
      const int64_t rows = count - begin < positions_ ? count - begin : positions_;
      for (int64_t row = begin; row < begin + rows; ++row) {
        block_.set(row, problem_.x + (first + row) * problem_.encoder.d_in, problem_.b_dec);
        block_.pack(row, row - begin, bounds_);
      }
      typename Product::Registers registers;
      for (int64_t panel = 0; panel < cpu::panels(problem_.encoder.d_sae); ++panel) {
        const auto* sums = block_.multiply(registers, rows, problem_.encoder, panel);
        asm volatile("" : : "r"(sums) : "memory");  // keeps a product that is not read
      }
    }
  }

 private:
  // For the batch: all latents of a token with more candidates than this are scored.
  static int64_t main_capacity(const cpu::TopKProblem& problem, bool batch) {
    constexpr int64_t kUsualInBatch = 4096;
    if (!batch) return CandidateRows::capacity_for(problem.k, problem.encoder.d_sae);
    const int64_t most = 6 * problem.k > kUsualInBatch ? 6 * problem.k : kUsualInBatch;
    return CandidateRows::capacity_for(most / 3, problem.encoder.d_sae);
  }

  bool wants_aux() const { return aux_.k > 0; }

  // Returns true if more latents are dead than a list of the dead takes.
  bool selects_among_dead() const { return wants_aux() && aux_.k < bounds_.dead_count; }

  // Room for the usual numbers of candidates; with more the log is emptied more often.
  bool allocate_log() {
    if constexpr (kFiltersSums<Product>) {
      const int64_t usual = positions_ * (4 * problem_.k + 128);
      const int64_t entries = CandidateLog::kBlockPlaces + (usual < (1 << 20) ? usual : 1 << 20);
      const int64_t padded = entries + CandidateLog::kPad;
      const int64_t blocks = cpu::panels(problem_.encoder.d_sae) * (kPanel / Product::kGroup) *
                             (positions_ / Product::kGroup);
      if (!log_memory_.reset(padded * 6 + (blocks + 1) * 4 + positions_ * 4 + 192)) return false;
      log_.capacity = static_cast<int32_t>(entries);
      log_.values = log_memory_.as<float>();
      log_.ends = reinterpret_cast<int32_t*>(log_.values + padded);
      bounds_of_positions_ = reinterpret_cast<float*>(log_.ends + blocks + 1);
      log_.places = reinterpret_cast<uint16_t*>(bounds_of_positions_ + positions_);
    }
    return true;
  }

  // Finds the candidates for the best of rows [begin, end), at most `positions_` rows.
  void find_candidates(int64_t begin, int64_t end) {
    const float guess = guess_.value();
    const float dead_guess = aux_guess_.value();
    for (int64_t row = begin; row < end; ++row) {
      block_.set(row, problem_.x + (first_ + row) * problem_.encoder.d_in, problem_.b_dec);
      block_.pack(row, row - begin, bounds_);
      active_[row - begin] = static_cast<int32_t>(row);
      const float error = block_.error(row);
      const float wanted =
          floor_ == nullptr ? guess * block_.norm(row) - 2.0f * error : floor_->value() - error;
      // A row whose scores could overflow is not screened.
      const bool exact = !(error < INFINITY);
      start(main_, row, wanted, exact);
      if (wants_aux()) start(aux_, row, dead_guess * block_.norm(row) - 2.0f * error, exact);
    }
    screen(end - begin);
    screen_again(begin, end);
    for (int64_t row = begin; row < end; ++row) settle(row);
  }

  static void start(const CandidateRows& rows, int64_t row, float threshold, bool exact) {
    rows.start(row, exact ? INFINITY : (std::isnan(threshold) ? -INFINITY : threshold));
    rows.failed[row] = exact ? 1 : 0;
  }

  // Multiplies the `live` active rows with every panel and keeps scores that pass their thresholds.
  void screen(int64_t live) {
    if constexpr (kFiltersSums<Product>) {
      if (!wants_aux()) return screen_in_filter(live);
    }
    const int64_t d_sae = problem_.encoder.d_sae;
    const float* scales = problem_.encoder.stats;
    typename Product::Registers registers;
    for (int64_t panel = 0; panel < cpu::panels(d_sae); ++panel) {
      const auto* sums = block_.multiply(registers, live, problem_.encoder, panel);
      const uint64_t dead = wants_aux() ? bounds_.dead[panel] : 0;
      const auto first = static_cast<int32_t>(panel * kPanel);
      for (int64_t position = 0; position < live; ++position) {
        const int64_t row = active_[position];
        const PanelScores scores = panel_scores<Product>(sums, position, scales + first,
                                                         block_.scale(row), bounds_.bias + first);
        keep(main_, row, scores, at_least(scores, main_.thresholds[row]), first);
        if (dead != 0) {
          keep(aux_, row, scores, at_least(scores, aux_.thresholds[row]) & dead, first);
        }
      }
    }
  }

  void screen_in_filter(int64_t live) {
    refresh_bounds(live);
    log_.first_block = log_.blocks = 0;
    log_.clear();
    const auto flush = [this, live] {
      sort_log(live);
      refresh_bounds(live);
    };
    TileFilter<decltype(flush)> filter(bounds_of_positions_, log_, flush);
    typename Product::Registers registers;
    block_.multiply_and_filter(registers, live, problem_.encoder, bounds_.bias, filter);
    sort_log(live);
  }

  void refresh_bounds(int64_t live) {
    for (int64_t position = 0; position < positions_; ++position) {
      bounds_of_positions_[position] =
          position < live ? main_.thresholds[active_[position]] : INFINITY;
    }
  }

  // Moves the log to the lists of its rows, group of rows by group, by ascending latent in each.
  void sort_log(int64_t live) {
    constexpr int64_t kSide = Product::kGroup;
    const int64_t groups = (live + kSide - 1) / kSide;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = (group - log_.first_block % groups + groups) % groups;
      for (int64_t block = begin; block < log_.blocks; block += groups) {
        const int64_t half = (log_.first_block + block) / groups;
        for (int32_t i = log_.ends[block]; i < log_.ends[block + 1]; ++i) {
          const int64_t row = active_[group * kSide + log_.places[i] / kSide];
          const int32_t at = main_.counts[row]++;
          main_.row_values(row)[at] = log_.values[i];
          main_.row_indices(row)[at] = static_cast<int32_t>(half * kSide + log_.places[i] % kSide);
          main_.shrink_if_full(row, 2.0f * block_.error(row), keys_);
        }
      }
    }
    log_.clear();
  }

  void keep(const CandidateRows& to, int64_t row, const PanelScores& scores, uint64_t bits,
            int32_t first) {
    if (bits == 0) return;
    to.counts[row] =
        append(scores, bits, first, to.row_values(row), to.row_indices(row), to.counts[row]);
    to.shrink_if_full(row, 2.0f * block_.error(row), keys_);
  }

  // Returns true if nothing that was filtered out can be among the k best.
  bool verified(const CandidateRows& rows, int64_t row) {
    if (rows.failed[row] != 0 || rows.thresholds[row] == -INFINITY) return true;
    if (rows.counts[row] < rows.k) return false;
    rows.kth[row] = rows.kth_value(row, keys_);
    return rows.kth[row] - 2.0f * block_.error(row) >= rows.thresholds[row];
  }

  // Multiplies rows whose guess was too high once more, without a guess.
  void screen_again(int64_t begin, int64_t end) {
    int64_t live = 0;
    for (int64_t row = begin; row < end; ++row) {
      // The floor is verified for the whole batch.
      const bool is_right = floor_ != nullptr || verified(main_, row);
      const bool is_aux_right = !wants_aux() || verified(aux_, row);
      if (is_right && is_aux_right) continue;
      restart(main_, row, is_right);
      if (wants_aux()) restart(aux_, row, is_aux_right);
      block_.pack(row, live, bounds_);
      active_[live++] = static_cast<int32_t>(row);
    }
    if (live > 0) screen(live);
  }

  // Empties a list that is filled again; one that goes to the exact path stays as it is.
  static void restart(const CandidateRows& rows, int64_t row, bool is_right) {
    if (rows.failed[row] == 0) rows.start(row, is_right ? rows.thresholds[row] : -INFINITY);
  }

  // Keeps the candidates that can be among the best, in ascending order of latents.
  void settle(int64_t row) {
    if (main_.failed[row] == 0) settle(main_, guess_, row);
    if (wants_aux() && aux_.failed[row] == 0) settle(aux_, aux_guess_, row);
  }

  void settle(const CandidateRows& from, ThresholdGuess& guess, int64_t row) {
    if (from.counts[row] > from.k) {
      const bool known = !std::isnan(from.kth[row]);
      const float kth = known ? from.kth[row] : from.kth_value(row, keys_);
      guess.add(static_cast<double>(kth) / (block_.norm(row) + 1e-30));
      from.counts[row] =
          static_cast<int32_t>(keep_at_least(from.row_values(row), from.row_indices(row),
                                             from.counts[row], kth - 2.0f * block_.error(row)));
    }
    for (int64_t i = 0; i < bounds_.outlier_count; ++i) {
      const int32_t latent = bounds_.outliers[i];
      if (&from == &main_ || is_dead(latent)) insert(from, row, latent);
    }
  }

  bool is_dead(int32_t latent) const {
    return (bounds_.dead[latent / kPanel] >> (latent % kPanel) & 1) != 0;
  }

  // Adds a latent without its value, which is scored later.
  static void insert(const CandidateRows& to, int64_t row, int32_t latent) {
    int32_t* indices = to.row_indices(row);
    float* values = to.row_values(row);
    int32_t at = to.counts[row]++;
    for (; at > 0 && indices[at - 1] > latent; --at) {
      indices[at] = indices[at - 1];
      values[at] = values[at - 1];
    }
    indices[at] = latent;
  }

  // Exact scores of the candidates of the block.
  void score_pairs() {
    pairs_.start();
    each_candidate([this](int32_t latent, int32_t, int32_t) { pairs_.count(latent); });
    pairs_.begin_adding();
    each_candidate(
        [this](int32_t latent, int32_t row, int32_t offset) { pairs_.add(latent, row, offset); });
    pairs_.score(block_.rows(), count_, scoring_rows<T>(problem_.encoder), problem_.b_enc,
                 [this](int32_t offset, float score) {
                   (offset >= 0 ? main_.values[offset] : aux_.values[~offset]) = score;
                 });
  }

  // Calls function(latent, row, offset) for every candidate of the block that still needs a score.
  // The score goes to main_.values[offset], or to aux_.values[~offset] if offset is negative.
  template <class Function>
  void each_candidate(Function&& function) {
    for (int64_t row = 0; row < count_; ++row) {
      each_candidate(main_, row, [&](int32_t latent, int32_t offset) {
        function(latent, static_cast<int32_t>(row), offset);
      });
      if (!wants_aux()) continue;
      Listed is_scored(main_, row);
      each_candidate(aux_, row, [&](int32_t latent, int32_t offset) {
        if (is_scored.find(latent) < 0) function(latent, static_cast<int32_t>(row), ~offset);
      });
    }
  }

  // Finds ascending latents in a row's list, unless that goes to the exact path.
  class Listed {
   public:
    Listed(const CandidateRows& rows, int64_t row)
        : indices_(rows.row_indices(row)), count_(rows.failed[row] == 0 ? rows.counts[row] : 0) {}

    // The place of a latent, not below the one before; negative where it is not listed.
    int32_t find(int32_t latent) {
      while (at_ < count_ && indices_[at_] < latent) ++at_;
      return at_ < count_ && indices_[at_] == latent ? at_ : -1;
    }

   private:
    const int32_t* indices_;
    int32_t count_;
    int32_t at_ = 0;
  };

  // Copies the scores of the dead latents that are among the token's best too.
  void copy_scores(int64_t row) {
    Listed scored(main_, row);
    float* values = aux_.row_values(row);
    for (int32_t i = 0; i < aux_.counts[row]; ++i) {
      const int32_t at = scored.find(aux_.row_indices(row)[i]);
      if (at >= 0) values[i] = main_.row_values(row)[at];
    }
  }

  template <class Function>
  void each_candidate(const CandidateRows& from, int64_t row, Function&& function) {
    if (from.failed[row] != 0) return;
    if (bounds_.outlier_count == 0 && kSumsAreScores<Product, T>) return;
    const auto first = static_cast<int32_t>(row * from.capacity);  // block_rows keeps it in int32
    for (int32_t i = 0; i < from.counts[row]; ++i) {
      const int32_t latent = from.row_indices(row)[i];
      if (block_.is_approximate(row, bounds_.bias[latent])) function(latent, first + i);
    }
  }

  void finish(int64_t row) {
    const int64_t token = first_ + row;
    float* values = problem_.values + token * problem_.k;
    int32_t* indices = problem_.indices + token * problem_.k;
    if (floor_ != nullptr) {
      collect(row, token);
    } else if (main_.failed[row] != 0) {
      select_exactly(row, main_.k, false, values, indices);
    } else {
      select_best(main_.row_values(row), main_.row_indices(row), main_.counts[row], main_.k, keys_,
                  order_, values, indices);
    }
    if (problem_.k_aux > 0) finish_aux(row, token);
  }

  void collect(int64_t row, int64_t token) {
    if (main_.failed[row] == 0) {
      found_.add(token, main_.row_values(row), main_.row_indices(row), main_.counts[row]);
    } else {
      found_.add(token, scores_, all_, score_all(row, false));
    }
  }

  void finish_aux(int64_t row, int64_t token) {
    float* values = problem_.aux_values + token * problem_.k_aux;
    int32_t* indices = problem_.aux_indices + token * problem_.k_aux;
    for (int64_t i = aux_.k; i < problem_.k_aux; ++i) {
      values[i] = 0.0f;
      indices[i] = 0;
    }
    if (!wants_aux()) return;
    if (aux_.failed[row] != 0) {
      select_exactly(row, aux_.k, true, values, indices);
    } else {
      copy_scores(row);
      select_best(aux_.row_values(row), aux_.row_indices(row), aux_.counts[row], aux_.k, keys_,
                  order_, values, indices);
    }
  }

  // Scores every latent of a token, if nothing else settles it.
  void select_exactly(int64_t row, int64_t k, bool dead_only, float* values, int32_t* indices) {
    const int64_t count = score_all(row, dead_only);
    select_best(scores_, all_, count, k, keys_, order_, values, indices);
  }

  int64_t score_all(int64_t row, bool dead_only) {
    const T* rows = scoring_rows<T>(problem_.encoder);
    typename Product::Registers registers;
    if (kSumsAreScores<Product, T>) block_.pack(row, 0, bounds_);
    const typename Product::Sum* sums = nullptr;
    int64_t count = 0;
    for (int32_t j = 0; j < problem_.encoder.d_sae; ++j) {
      if (kSumsAreScores<Product, T> && j % kPanel == 0) {
        sums = block_.multiply(registers, 1, problem_.encoder, j / kPanel);
      }
      if (dead_only && !is_dead(j)) continue;
      all_[count] = j;
      scores_[count++] =
          block_.is_approximate(row, bounds_.bias[j])
              ? block_.score(row, rows + j * problem_.encoder.d_in, problem_.b_enc[j])
              : static_cast<float>(*Product::sums_at(sums, 0, j % kPanel)) + problem_.b_enc[j];
    }
    return count;
  }

  const cpu::TopKProblem& problem_;
  const LatentBounds& bounds_;
  int64_t rows_, positions_, first_ = 0, count_ = 0;
  BatchFloor* floor_;
  BatchCandidates found_;
  ThresholdGuess guess_, aux_guess_;
  TokenBlock<Product, T> block_;
  CandidateRows main_, aux_;
  PairScores<T> pairs_;
  int32_t* active_ = nullptr;  // [positions] block row of each row of the product
  uint64_t* order_ = nullptr;  // scratch of select_best
  float* scores_ = nullptr;    // [d_sae] of the exact path
  int32_t* keys_ = nullptr;    // scratch of selections
  int32_t* all_ = nullptr;     // [d_sae] of the exact path
  CandidateLog log_;
  float* bounds_of_positions_ = nullptr;  // [positions] thresholds, infinity where there is no row
  Scratch main_memory_, aux_memory_, active_memory_, wide_memory_, log_memory_;
};

}  // namespace sae_fast::SAE_FAST_ISA
