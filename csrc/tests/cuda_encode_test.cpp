// pack_encoder, compiled for the host.
#include "kernels/cuda/encode_pack.cu"

#include "tests/cuda_testing.h"

namespace sae_fast::testing {
namespace {

void test_pack(Random& random) {
  const int64_t d_sae = random.integer(0, 20);
  const int64_t d_in =
      random.integer(0, 1) == 0 ? random.integer(0, 40) : 4 * random.integer(1, 80);
  const cpu::Rows type = random.integer(0, 1) == 0 ? cpu::Rows::kBFloat16 : cpu::Rows::kFloat16;
  const std::vector<float> W_enc = random.numbers(d_sae * d_in, Numbers::kNormal);
  auto rounded = stale(d_sae * d_in, uint16_t{0xfbfb});
  auto stats = stale(2 * d_sae, 777.0f);
  check_success(cuda::pack_encoder(W_enc.data(), d_sae, d_in, rounded.data(), data_type(type),
                                   stats.data(), nullptr),
                "pack_encoder");
  for (int64_t j = 0; j < d_sae; ++j) {
    double square = 0.0;
    double residual = 0.0;
    for (int64_t i = j * d_in; i < (j + 1) * d_in; ++i) {
      const float weight = W_enc[static_cast<size_t>(i)];
      const float kept = from_bits(rounded[static_cast<size_t>(i)], type);
      check(kept == testing::rounded(weight, type), "pack_encoder: %g for %g", kept, weight);
      square += std::pow(static_cast<double>(weight), 2);
      residual += std::pow(static_cast<double>(weight) - kept, 2);
    }
    for (const auto& [bound, length] : {std::pair{stats[j], std::sqrt(square)},
                                        std::pair{stats[d_sae + j], std::sqrt(residual)}}) {
      check(bound >= length && bound <= length * 1.0001 + 1e-20, "pack_encoder: %g bounds %g",
            bound, length);
    }
  }
}

}  // namespace

void test_cuda_encode(uint64_t seed) {
  Random random(seed);
  test_pack(random);
}

}  // namespace sae_fast::testing
