// Rows gathered into batches.
#include "tests/gather_problem.h"

namespace sae_fast::testing {

void test_gather_rows(uint64_t seed) {
  Random random(seed);
  for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const GatherProblem problem(random, type);
    for (const cpu::Parallel& parallel : {one_thread(), four_threads()}) {
      std::vector<float> out = problem.untouched();
      cpu::kernels().gather_rows(
          {type, problem.source.data(), problem.rows.data(), problem.places_or_null(),
           problem.mean_or_null(), problem.scale, out.data(), problem.count, problem.d_in},
          parallel);
      problem.check_result(out);
    }
  }
}

}  // namespace sae_fast::testing
