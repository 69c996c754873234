// Encoder kernels at one instruction set: packing, top-k, threshold codes and the bare product.
#include "kernels/cpu/isa/encode.h"

#include "kernels/cpu/isa/batch.h"
#include "kernels/cpu/isa/pack.h"
#include "kernels/cpu/isa/topk.h"

namespace sae_fast::SAE_FAST_ISA {
namespace {

// Work that a class `Worker` does block by block, one worker a thread; threads take the next block
// as they get free, which changes nothing in the results.
template <class Worker, class Step>
bool run_blocks(Worker* workers, int64_t threads, int64_t tokens, int64_t rows,
                const cpu::Parallel& parallel, Step&& step) {
  int64_t next = 0;
  bool complete = true;
  parallel.for_each(threads, [&](int64_t thread) {
    for (;;) {
      const int64_t first = __atomic_fetch_add(&next, rows, __ATOMIC_RELAXED);
      if (first >= tokens) return;
      const int64_t count = tokens - first < rows ? tokens - first : rows;
      if (!step(workers[thread], first, count)) {
        __atomic_store_n(&complete, false, __ATOMIC_RELAXED);
        return;
      }
    }
  });
  return complete;
}

// Workers in one array without std::vector, whose code would be shared between levels.
template <class Worker>
class Team {
 public:
  template <class... Arguments>
  bool hire(int64_t count, const Arguments&... arguments) {
    if (!memory_.reset(count * static_cast<int64_t>(sizeof(Worker)))) return false;
    for (; size_ < count; ++size_) {
      new (begin() + size_) Worker(arguments...);
      if (!begin()[size_].allocate()) {
        ++size_;
        return false;
      }
    }
    return true;
  }
  Team() = default;
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() {
    for (int64_t i = 0; i < size_; ++i) begin()[i].~Worker();
  }
  Worker* begin() { return memory_.template as<Worker>(); }

 private:
  Scratch memory_;
  int64_t size_ = 0;
};

int64_t team_size(int64_t tokens, int64_t rows, const cpu::Parallel& parallel) {
  const int64_t blocks = (tokens + rows - 1) / rows;
  return blocks < parallel.threads() ? blocks : parallel.threads();
}

template <class Product, class T>
bool topk(const cpu::TopKProblem& problem, const cpu::Parallel& parallel, bool product_only) {
  using Worker = TopKWorker<Product, T>;
  if (problem.tokens == 0) return true;
  LatentBounds bounds;
  if (!bounds.prepare(problem.encoder, problem.b_enc, problem.dead_mask)) return false;
  const int64_t positions =
      product_rows<Product>(problem.tokens, problem.encoder.d_in, parallel.threads());
  const int64_t rows = block_rows(
      problem.tokens, positions, Worker::bytes_per_row(problem, bounds, false), parallel.threads());
  const int64_t threads = team_size(problem.tokens, rows, parallel);
  Team<Worker> team;
  if (!team.hire(threads, problem, bounds, rows, positions, nullptr)) return false;
  return run_blocks(team.begin(), threads, problem.tokens, rows, parallel,
                    [&](Worker& worker, int64_t first, int64_t count) {
                      if (product_only) {
                        worker.run_product(first, count);
                      } else {
                        worker.run(first, count);
                      }
                      return true;
                    });
}

// Calls function(candidates) for every worker's collection.
template <class Worker>
class Collections {
 public:
  Collections(Worker* workers, int64_t threads) : workers_(workers), threads_(threads) {}
  template <class Function>
  void operator()(Function&& function) const {
    for (int64_t thread = 0; thread < threads_; ++thread) function(workers_[thread].found());
  }
  int64_t count() const {
    int64_t total = 0;
    (*this)([&](const BatchCandidates& list) { total += list.count(); });
    return total;
  }

 private:
  Worker* workers_;
  int64_t threads_;
};

// Collects from all tokens, with a floor lowered until there are enough above it.
template <class Worker, class Sample>
bool collect_batch(const cpu::TopKProblem& problem, Sample& sample, BatchFloor& floor,
                   Worker* workers, int64_t threads, int64_t rows, const cpu::Parallel& parallel) {
  const Collections<Worker> collections(workers, threads);
  constexpr double kExcess[] = {1.25, 3.0, 12.0, 0.0};  // 0: everything positive
  for (const double excess : kExcess) {
    const float start = sample.floor(excess * static_cast<double>(problem.k));
    floor.set(start > 0.0f ? start : 0.0f);
    collections([](BatchCandidates& list) { list.clear(); });
    const bool complete = run_blocks(workers, threads, problem.tokens, rows, parallel,
                                     [](Worker& worker, int64_t first, int64_t count) {
                                       worker.run(first, count);
                                       return true;
                                     });
    if (!complete) return false;
    if (!(start > 0.0f) || collections.count() >= problem.tokens * problem.k) return true;
  }
  return true;
}

template <class Product, class T>
bool batch_topk(const cpu::TopKProblem& problem, int64_t* offsets, const cpu::Parallel& parallel) {
  using Worker = TopKWorker<Product, T>;
  offsets[0] = 0;
  if (problem.tokens == 0) return true;
  LatentBounds bounds;
  FloorSample<Product, T> sample;
  if (!bounds.prepare(problem.encoder, problem.b_enc, problem.dead_mask) ||
      !sample.allocate(problem, bounds)) {
    return false;
  }
  const int64_t positions =
      product_rows<Product>(problem.tokens, problem.encoder.d_in, parallel.threads());
  const int64_t rows = block_rows(problem.tokens, positions,
                                  Worker::bytes_per_row(problem, bounds, true), parallel.threads());
  const int64_t threads = team_size(problem.tokens, rows, parallel);
  BatchFloor floor;
  Team<Worker> team;
  if (!team.hire(threads, problem, bounds, rows, positions, &floor) ||
      !collect_batch(problem, sample, floor, team.begin(), threads, rows, parallel)) {
    return false;
  }
  const Collections<Worker> collections(team.begin(), threads);
  BatchRows best;
  if (!best.find(problem.tokens, problem.tokens * problem.k, collections.count(), collections)) {
    return false;
  }
  best.write_offsets(offsets, collections);
  parallel.for_each(threads, [&](int64_t thread) {
    best.write(team.begin()[thread].found(), offsets, problem.values, problem.indices);
  });
  best.pad(offsets, problem.values, problem.indices);
  return true;
}

// Threshold codes of a block of tokens.
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
      add_special(row);
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

  void add_special(int64_t row) {
    for (int64_t i = 0; i < bounds_.special_count; ++i) {
      const int32_t latent = bounds_.special[i];
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

template <class Product, class T>
bool threshold(const cpu::ThresholdProblem& problem, cpu::ThresholdSink& sink,
               const cpu::Parallel& parallel) {
  using Worker = ThresholdWorker<Product, T>;
  if (problem.tokens == 0) return true;
  LatentBounds bounds;
  if (!bounds.prepare(problem.encoder, problem.b_enc, nullptr)) return false;
  const int64_t padded = cpu::panels(problem.encoder.d_sae) * kPanel;
  Scratch limits(padded * 4);
  if (!limits) return false;
  auto* limit = limits.as<float>();
  for (int64_t j = 0; j < padded; ++j) {
    const float wanted = j < problem.encoder.d_sae ? problem.threshold[j] : 0.0f;
    limit[j] = wanted > 0.0f ? wanted : 0.0f;
  }
  const int64_t positions =
      product_rows<Product>(problem.tokens, problem.encoder.d_in, parallel.threads());
  const int64_t rows =
      block_rows(problem.tokens, positions, 8 * Worker::capacity(problem), parallel.threads());
  const int64_t threads = team_size(problem.tokens, rows, parallel);
  Team<Worker> team;
  if (!team.hire(threads, problem, bounds, limit, rows, positions)) return false;
  return run_blocks(
      team.begin(), threads, problem.tokens, rows, parallel,
      [&](Worker& worker, int64_t first, int64_t count) { return worker.run(first, count, sink); });
}

// Calls function.template operator()<Product, T>() for the encoder's product and scoring rows.
template <class Function>
bool dispatch(const cpu::PackedEncoder& encoder, Function&& function) {
  const bool narrow = encoder.screen == cpu::Screen::kNarrow;
  switch (encoder.rows) {
    case cpu::Rows::kBFloat16:
      return function(NarrowProduct{}, BFloat16{});
    case cpu::Rows::kFloat16:
      return function(NarrowProduct{}, Float16{});
    default:
      break;
  }
  return narrow ? function(NarrowProduct{}, 0.0f) : function(FloatProduct{}, 0.0f);
}

}  // namespace

bool pack_encoder(const cpu::PackedEncoder& encoder, const cpu::Parallel& parallel) {
  const int64_t sixteens = cpu::panels(encoder.d_sae) * (kPanel / 16);
  const int64_t threads = sixteens < parallel.threads() ? sixteens : parallel.threads();
  const int64_t bytes = (pack_scratch_bytes(encoder) + 63) / 64 * 64;
  Scratch scratch(threads * bytes);
  if (!scratch) return false;
  parallel.for_each(threads, [&](int64_t thread) {
    for (int64_t i = sixteens * thread / threads; i < sixteens * (thread + 1) / threads; ++i) {
      pack_sixteen(encoder, i * 16, scratch.as<int32_t>(thread * bytes));
    }
  });
  return true;
}

bool encode_topk(const cpu::TopKProblem& problem, const cpu::Parallel& parallel) {
  return dispatch(problem.encoder, [&](auto product, auto row) {
    return topk<decltype(product), decltype(row)>(problem, parallel, false);
  });
}

bool encode_batch_topk(const cpu::TopKProblem& problem, int64_t* offsets,
                       const cpu::Parallel& parallel) {
  return dispatch(problem.encoder, [&](auto product, auto row) {
    return batch_topk<decltype(product), decltype(row)>(problem, offsets, parallel);
  });
}

bool encoder_product(const cpu::TopKProblem& problem, const cpu::Parallel& parallel) {
  return dispatch(problem.encoder, [&](auto product, auto row) {
    return topk<decltype(product), decltype(row)>(problem, parallel, true);
  });
}

bool encode_threshold(const cpu::ThresholdProblem& problem, cpu::ThresholdSink& sink,
                      const cpu::Parallel& parallel) {
  return dispatch(problem.encoder, [&](auto product, auto row) {
    return threshold<decltype(product), decltype(row)>(problem, sink, parallel);
  });
}

}  // namespace sae_fast::SAE_FAST_ISA
