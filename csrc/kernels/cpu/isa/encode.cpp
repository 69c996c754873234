// Encoder kernels at one instruction set: packing, top-k, threshold codes and the bare product.
#include "kernels/cpu/isa/batch_topk.h"
#include "kernels/cpu/isa/kernels.h"
#include "kernels/cpu/isa/pack.h"
#include "kernels/cpu/isa/threshold.h"
#include "kernels/cpu/isa/topk.h"
#include "kernels/cpu/isa/worker_pool.h"

namespace sae_fast::SAE_FAST_ISA {
namespace {

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
  const int64_t threads = pool_size(problem.tokens, rows, parallel);
  WorkerPool<Worker> pool;
  if (!pool.allocate(threads, problem, bounds, rows, positions, nullptr)) return false;
  return run_blocks(pool.begin(), threads, problem.tokens, rows, parallel,
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
  const int64_t threads = pool_size(problem.tokens, rows, parallel);
  BatchFloor floor;
  WorkerPool<Worker> pool;
  if (!pool.allocate(threads, problem, bounds, rows, positions, &floor) ||
      !collect_batch(problem, sample, floor, pool.begin(), threads, rows, parallel)) {
    return false;
  }
  const Collections<Worker> collections(pool.begin(), threads);
  BatchRows best;
  if (!best.find(problem.tokens, problem.tokens * problem.k, collections.count(), collections)) {
    return false;
  }
  best.write_offsets(offsets, collections);
  parallel.for_each(threads, [&](int64_t thread) {
    best.write(pool.begin()[thread].found(), offsets, problem.values, problem.indices);
  });
  best.pad(offsets, problem.values, problem.indices);
  return true;
}

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
  const int64_t threads = pool_size(problem.tokens, rows, parallel);
  WorkerPool<Worker> pool;
  if (!pool.allocate(threads, problem, bounds, limit, rows, positions)) return false;
  return run_blocks(
      pool.begin(), threads, problem.tokens, rows, parallel,
      [&](Worker& worker, int64_t first, int64_t count) { return worker.run(first, count, sink); });
}

// Calls function.template operator()<Product, T>() for the encoder's product and scoring rows.
template <class Function>
bool dispatch(const cpu::PackedEncoder& encoder, Function&& function) {
  const bool narrow = encoder.screen == cpu::Screen::kNarrow;
  switch (encoder.type) {
    case DType::kBFloat16:
      return function(NarrowProduct{}, BFloat16{});
    case DType::kFloat16:
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
