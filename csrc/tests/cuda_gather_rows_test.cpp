// gather_rows, compiled for the host.
#include "kernels/cuda/gather_rows.cu"

#include "tests/cuda_testing.h"
#include "tests/gather_problem.h"

namespace sae_fast::testing {

void test_cuda_gather_rows(uint64_t seed) {
  Random random(seed);
  const GatherProblem problem(random, any_type(random));
  std::vector<float> out = problem.untouched();
  check_success(cuda::gather_rows(typed(problem.source), problem.rows.data(),
                                  problem.places_or_null(), problem.mean_or_null(), problem.scale,
                                  out.data(), problem.count, problem.d_in, nullptr),
                "gather_rows");
  problem.check_result(out);
}

}  // namespace sae_fast::testing
