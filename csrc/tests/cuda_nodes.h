// The nodes of a CUDA graph that each launcher makes at most. Tests hold the emulated launchers to
// it, and benchmarks/step_nodes.py reads it to count the nodes of a step.
#pragma once

#include <cstring>

#include "tests/cuda_testing.h"

namespace sae_fast::testing {

struct NodeLimit {
  const char* launcher;
  int kernels, fills;
};
constexpr NodeLimit kNodeLimits[] = {
    {"begin_topk", 1, 0},     {"begin_topk_with_aux", 1, 1},
    {"select_topk", 1, 0},    {"select_topk_with_aux", 2, 0},
    {"finish_topk", 3, 0},    {"finish_topk_with_aux", 6, 0},
    {"decode", 1, 0},         {"reconstruct", 1, 0},
    {"latent_major", 3, 1},   {"gather_entries", 1, 0},
    {"latent_sums", 1, 0},    {"row_gradient_norm", 3, 0},
    {"update_scalars", 1, 0}, {"fused_update_", 1, 0},
    {"update_vector_", 1, 0}, {"batch_statistics", 2, 0},
    {"code_gradients", 1, 0}, {"weighted_row_sum", 2, 0},
    {"add_squares_", 1, 0},   {"finish_step_", 1, 0},
};

// Checks that a launcher succeeds, and that it makes no more nodes than its limit.
template <typename Start>
void check_nodes(const char* launcher, Start&& start) {
  const emulated_cuda::Nodes before = emulated_cuda::nodes;
  check_success(start(), launcher);
  const emulated_cuda::Nodes& after = emulated_cuda::nodes;
  bool found = false;
  for (const NodeLimit& limit : kNodeLimits) {
    if (std::strcmp(limit.launcher, launcher) != 0) continue;
    found = true;
    check(after.kernels - before.kernels <= limit.kernels &&
              after.fills - before.fills <= limit.fills,
          "%s: %d kernels, %d fills", launcher, after.kernels - before.kernels,
          after.fills - before.fills);
  }
  check(found, "%s: no limit of its nodes", launcher);
}

}  // namespace sae_fast::testing
