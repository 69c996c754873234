// Tests of the CUDA kernels on the host (tests/cuda_emulation): small random problems against naive
// sums in double. An argument sets how many problems of each kind are tried, of the encoder's kinds
// a quarter.
#include <cstdlib>

#include "tests/cuda_testing.h"

int main(int argc, char** argv) {
  using namespace sae_fast::testing;
  const long problems = argc > 1 ? std::atol(argv[1]) : 24;
  for (long seed = 0; seed < problems; ++seed) {
    Random random(static_cast<uint64_t>(seed));
    emulated_cuda::device = {};
    // Fewer blocks than rows, so that blocks take several; little shared memory, so that it is
    // full.
    if (random.integer(0, 1) == 0) emulated_cuda::device.max_blocks = 1;
    if (random.integer(0, 2) == 0) {
      emulated_cuda::device.shared_per_block = 20 * 1024;
      emulated_cuda::device.shared_per_multiprocessor = 40 * 1024;
    }
    test_cuda_bookkeeping(static_cast<uint64_t>(seed));
    test_cuda_correlation(static_cast<uint64_t>(seed));
    test_cuda_decode(static_cast<uint64_t>(seed));
    test_cuda_decorrelation(static_cast<uint64_t>(seed));
    test_cuda_gather_rows(static_cast<uint64_t>(seed));
    test_cuda_rows(static_cast<uint64_t>(seed));
    test_cuda_update(static_cast<uint64_t>(seed));
    if (seed % 4 != 0) continue;  // a problem of these takes seconds
    test_cuda_batch(static_cast<uint64_t>(seed / 4));
    test_cuda_encode(static_cast<uint64_t>(seed / 4));
    test_cuda_threshold(static_cast<uint64_t>(seed / 4));
  }
  std::printf("cuda: %ld problems, %d checks failed\n", problems, failures);
  return failures == 0 ? 0 : 1;
}
