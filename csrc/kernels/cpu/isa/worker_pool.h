// Work on blocks of tokens: one worker a thread, which takes the next block as it gets free.
#pragma once

#include <new>

#include "kernels/cpu/isa/simd.h"
#include "kernels/cpu/isa/tasks.h"
#include "kernels/cpu/parallel.h"

namespace sae_fast::SAE_FAST_ISA {

// Calls step(worker, first token, tokens) for all blocks of `rows` tokens; a thread has one worker.
// Returns false, and leaves blocks out, if a step does.
template <class Worker, class Step>
bool run_blocks(Worker* workers, int64_t threads, int64_t tokens, int64_t rows,
                const cpu::Parallel& parallel, Step&& step) {
  SharedLoop blocks(tokens, rows);
  bool complete = true;
  parallel.for_each(threads, [&](int64_t thread) {
    for (int64_t first; blocks.take(first);) {
      if (!step(workers[thread], first, blocks.end(first) - first)) {
        __atomic_store_n(&complete, false, __ATOMIC_RELAXED);
        return;
      }
    }
  });
  return complete;
}

// One worker a thread, with the memory that it needs. No std::vector: its code would be shared
// between instruction sets.
template <class Worker>
class WorkerPool {
 public:
  template <class... Arguments>
  bool allocate(int64_t count, const Arguments&... arguments) {
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
  WorkerPool() = default;
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;
  ~WorkerPool() {
    for (int64_t i = 0; i < size_; ++i) begin()[i].~Worker();
  }
  Worker* begin() { return memory_.template as<Worker>(); }

 private:
  Scratch memory_;
  int64_t size_ = 0;
};

// A worker a thread, but no more than there are blocks of `rows` tokens.
inline int64_t pool_size(int64_t tokens, int64_t rows, const cpu::Parallel& parallel) {
  const int64_t blocks = (tokens + rows - 1) / rows;
  return blocks < parallel.threads() ? blocks : parallel.threads();
}

}  // namespace sae_fast::SAE_FAST_ISA
