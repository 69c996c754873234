// The one way a CPU kernel uses several threads: the caller hands in a parallel-for, so kernels
// know neither torch's thread pool nor OpenMP, and a test can pass std::thread.
#pragma once

#include <cstdint>

namespace sae_fast::cpu {

class Parallel {
 public:
  // Calls body(context, begin, end) on disjoint ranges that cover [0, tasks).
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  using Run = void (*)(int64_t tasks, void* context, Body body);

  Parallel(Run run, int threads) : run_(run), threads_(threads > 0 ? threads : 1) {}

  int threads() const { return threads_; }

  // Calls function(task) once for each task in [0, tasks). Nothing may throw inside.
  template <class Function>
  void for_each(int64_t tasks, Function&& function) const {
    if (tasks <= 0) return;
    const auto body = [](void* context, int64_t begin, int64_t end) {
      auto& call = *static_cast<Function*>(context);
      for (int64_t task = begin; task < end; ++task) call(task);
    };
    run_(tasks, &function, body);
  }

 private:
  Run run_;
  int threads_;
};

}  // namespace sae_fast::cpu
