// Tests of the CPU kernels without Python: many small random problems, each against a naive
// computation and on one and on four threads. Run under the sanitizers, once per instruction set
// (SAE_FAST_ISA); an argument sets how many problems of each kind are tried.
#include <cstdlib>
#include <exception>

#include "tests/testing.h"

int main(int argc, char** argv) {
  constexpr int kNotAvailable = 77;  // what ctest counts as skipped
  try {
    std::printf("instruction set: %s\n", sae_fast::cpu::instruction_set_name().c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return kNotAvailable;
  }
  const long problems = argc > 1 ? std::atol(argv[1]) : 60;
  for (long seed = 0; seed < problems; ++seed) {
    sae_fast::testing::test_encode(static_cast<uint64_t>(seed));
#if defined(SAE_FAST_WITH_AMX_EMULATED)
    sae_fast::testing::test_tiles(static_cast<uint64_t>(seed));
#endif
    sae_fast::testing::test_decode(static_cast<uint64_t>(seed));
    sae_fast::testing::test_dense_product(static_cast<uint64_t>(seed));
    sae_fast::testing::test_gather_rows(static_cast<uint64_t>(seed));
    sae_fast::testing::test_moments(static_cast<uint64_t>(seed));
    sae_fast::testing::test_rows(static_cast<uint64_t>(seed));
    sae_fast::testing::test_correlation(static_cast<uint64_t>(seed));
  }
  std::printf("%ld problems of each kind, %d checks failed\n", problems,
              sae_fast::testing::failures);
  return sae_fast::testing::failures == 0 ? 0 : 1;
}
