// pack_encoder and top-k, compiled for the host.
#include "kernels/cuda/encode/exact.cu"
#include "kernels/cuda/encode/finish.cu"
#include "kernels/cuda/encode/pack.cu"
#include "kernels/cuda/encode/state.cu"
#include "kernels/cuda/encode/topk.cu"

#include <algorithm>
#include <numeric>

#include "tests/cuda_encode_problem.h"
#include "tests/cuda_nodes.h"

namespace sae_fast::testing {
namespace {

void test_plan() {
  // Beyond 2^31 elements, and beyond 2^32 bytes.
  static_assert(flat_index(int64_t{1} << 20, 131072, 131071) == (int64_t{1} << 37) + 131071);
  static_assert(flat_index(1 << 20, 1 << 20, 5) == (int64_t{1} << 40) + 5);
  for (const int64_t tokens :
       {int64_t{0}, int64_t{1}, int64_t{64}, int64_t{4096}, int64_t{8193}, int64_t{1} << 33}) {
    for (const int64_t d_sae :
         {int64_t{1}, int64_t{70}, int64_t{24576}, int64_t{100006}, int64_t{1} << 31}) {
      for (const int64_t row_bytes : {int64_t{0}, int64_t{5632}, int64_t{1} << 31}) {
        const EncodePlan plan = plan_encode(tokens, d_sae, row_bytes);
        check(plan.rows >= 1 && plan.rows <= 8192, "plan: %ld rows", plan.rows);
        check(plan.columns == d_sae || plan.columns % kColumnUnit == 0, "plan: %ld columns",
              plan.columns);
        check(plan.product_elements() <= int64_t{48} << 20, "plan: a product of %ld x %ld",
              plan.rows, plan.columns);
        const int64_t blocks = (tokens + plan.rows - 1) / plan.rows;
        check(blocks * plan.rows < tokens + plan.rows, "plan: %ld blocks", blocks);
      }
    }
  }
  static_assert(kColumnUnit % kSegment == 0);
}

void test_pack(Random& random) {
  const int64_t d_sae = random.integer(0, 20);
  const int64_t d_in =
      random.integer(0, 1) == 0 ? random.integer(0, 40) : 4 * random.integer(1, 80);
  const DType type = random.integer(0, 1) == 0 ? DType::kBFloat16 : DType::kFloat16;
  const std::vector<float> W_enc = random.numbers(d_sae * d_in, Numbers::kNormal);
  auto rounded = stale(d_sae * d_in, uint16_t{0xfbfb});
  auto stats = stale(2 * d_sae, 777.0f);
  check_success(
      cuda::pack_encoder(W_enc.data(), d_sae, d_in, rounded.data(), type, stats.data(), nullptr),
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

// A code as top-k gives it, with room that is checked to be all filled.
struct TopKResult {
  TopKResult(int64_t tokens, int64_t k, int64_t k_aux)
      : values(stale(tokens * k, 777.0f)),
        indices(stale(tokens * k, int32_t{-7})),
        aux_values(stale(tokens * k_aux, 777.0f)),
        aux_indices(stale(tokens * k_aux, int32_t{-7})) {}
  std::vector<float> values;
  std::vector<int32_t> indices;
  std::vector<float> aux_values;
  std::vector<int32_t> aux_indices;
};

void check_row(const float* scores, std::vector<int32_t> candidates, const float* values,
               const int32_t* indices, int64_t k, const char* path) {
  std::sort(candidates.begin(), candidates.end(),
            [&](int32_t a, int32_t b) { return better(scores[a], a, scores[b], b); });
  for (int64_t i = 0; i < k; ++i) {
    float value = 0.0f;
    int32_t latent = 0;
    if (i < static_cast<int64_t>(candidates.size())) {
      latent = candidates[static_cast<size_t>(i)];
      const float score = scores[latent];
      value = score > 0.0f || std::isnan(score) ? score : 0.0f;
    }
    check(indices[i] == latent && same(values[i], value) &&
              (value != 0.0f || !std::signbit(values[i])),
          "%s: choice %ld is %.9g of %d, not %.9g of %d", path, i, values[i], indices[i], value,
          latent);
  }
}

struct TopKCase {
  int64_t k, k_aux;
  std::vector<uint8_t> dead;
};

void check_result(const EncodeProblem& problem, const TopKCase& wanted, const TopKResult& result,
                  const std::vector<float>& scores, const char* path) {
  std::vector<int32_t> all(static_cast<size_t>(problem.shape.d_sae));
  std::iota(all.begin(), all.end(), 0);
  std::vector<int32_t> dead;
  std::copy_if(all.begin(), all.end(), std::back_inserter(dead),
               [&](int32_t latent) { return wanted.dead[static_cast<size_t>(latent)] != 0; });
  for (int64_t n = 0; n < problem.shape.tokens; ++n) {
    const float* const row = scores.data() + n * problem.shape.d_sae;
    check_row(row, all, result.values.data() + n * wanted.k, result.indices.data() + n * wanted.k,
              wanted.k, path);
    check_row(row, dead, result.aux_values.data() + n * wanted.k_aux,
              result.aux_indices.data() + n * wanted.k_aux, wanted.k_aux, path);
  }
}

cuda::TopK topk_of(const TopKCase& wanted, TopKResult& result) {
  return {reinterpret_cast<const bool*>(wanted.dead.data()),
          wanted.k,
          wanted.k_aux,
          result.values.data(),
          result.indices.data(),
          result.aux_values.data(),
          result.aux_indices.data()};
}

void test_topk(Random& random, EncodeProblem& problem, const TopKCase& wanted) {
  const int64_t tokens = problem.shape.tokens;
  const int64_t d_sae = problem.shape.d_sae;
  const cuda::Encoder encoder = problem.encoder();
  TestScratch memory(
      static_cast<size_t>(cuda::exact_bytes(d_sae, wanted.k, wanted.k_aux) * random.integer(1, 3)));
  const cuda::Memory slots{memory.data(), static_cast<int64_t>(memory.bytes())};

  bool streams = false;
  check_success(cuda::topk_streams(wanted.k, wanted.k_aux, &streams), "topk_streams");
  if (streams) {
    TopKResult result(tokens, wanted.k, wanted.k_aux);
    const cuda::TopK topk = topk_of(wanted, result);
    TestScratch scratch(cuda::topk_scratch_bytes(tokens, d_sae, wanted.k, wanted.k_aux));
    check_nodes(wanted.k_aux > 0 ? "begin_topk_with_aux" : "begin_topk", [&] {
      return cuda::begin_topk(encoder, problem.tokens(), topk, scratch.data(), nullptr);
    });
    problem.check_rounded_tokens();
    problem.for_each_chunk(kSegment * random.integer(1, 3), [&](const cuda::Product& product) {
      check_nodes(wanted.k_aux > 0 ? "select_topk_with_aux" : "select_topk", [&] {
        return cuda::select_topk(encoder, problem.tokens(), topk, product, scratch.data(), nullptr);
      });
    });
    check_nodes(wanted.k_aux > 0 ? "finish_topk_with_aux" : "finish_topk", [&] {
      return cuda::finish_topk(encoder, problem.tokens(), topk, slots, scratch.data(), nullptr);
    });
    check_result(problem, wanted, result, problem.scores(), "streaming");
  }
  if (streams && random.integer(0, 3) != 0) return;
  TopKResult result(tokens, wanted.k, wanted.k_aux);
  check_success(
      cuda::exact_topk(encoder, problem.tokens(), topk_of(wanted, result), slots, nullptr),
      "exact_topk");
  check_result(problem, wanted, result, problem.full_scores(), "in full");
}

TopKCase any_case(Random& random, int64_t d_sae) {
  TopKCase wanted{random.integer(1, std::min<int64_t>(d_sae, random.integer(1, 60))), 0, {}};
  if (random.integer(0, 7) == 0) wanted.k = d_sae;
  if (random.integer(0, 1) == 0) wanted.k_aux = random.integer(1, std::min<int64_t>(d_sae, 40));
  if (wanted.k_aux > 0 && random.integer(0, 3) == 0) wanted.k = 0;  // as encode_batch_topk calls
  const int64_t one_in =
      std::vector<int64_t>{1, 2, 30, 10000}[static_cast<size_t>(random.integer(0, 3))];
  for (int64_t j = 0; j < d_sae; ++j) {
    wanted.dead.push_back(random.integer(1, one_in) == 1 ? 1 : 0);
  }
  return wanted;
}

void test_random_topk(Random& random, uint64_t seed) {
  const Numbers kinds[] = {Numbers::kIntegers, Numbers::kIntegersAndSpecials, Numbers::kNormal};
  const Numbers numbers = kinds[seed % 3];
  const Precision precision = any_precision(random);
  EncodeProblem problem(random, any_shape(random), numbers, precision);
  const TopKCase wanted = any_case(random, problem.shape.d_sae);
  if (numbers == Numbers::kNormal && precision == Precision::kExact) {
    problem.scale(std::vector<float>{1e-40f, 1e-20f, 1.0f, 1e15f}[seed / 3 % 4]);
  }
  problem.pack(random);
  test_topk(random, problem, wanted);
}

// More candidates than a list holds, whatever is compacted: nearly equal or quite equal scores.
void test_overflow(Random& random, uint64_t seed) {
  const Precision precision = seed % 2 == 0 ? Precision::kExact : Precision::kBFloat16;
  EncodeProblem problem(random, {2, 8, random.integer(700, 1600)}, Numbers::kIntegers, precision);
  for (size_t i = 8; i < problem.W_enc.size(); ++i) {
    problem.W_enc[i] = problem.W_enc[i % 8];
    if (precision == Precision::kExact) {
      problem.W_enc[i] += 1e-6f * static_cast<float>(random.integer(0, 9));
    }
  }
  std::fill(problem.b_enc.begin(), problem.b_enc.end(), 1.0f);
  problem.pack(random);
  TopKCase wanted = any_case(random, problem.shape.d_sae);
  wanted.k = random.integer(1, 20);
  test_topk(random, problem, wanted);
}

}  // namespace

void test_cuda_encode(uint64_t seed) {
  Random random(seed);
  const FewBlocks few_blocks;
  test_plan();
  test_pack(random);
  test_random_topk(random, seed);
  if (seed % 4 == 0) test_overflow(random, seed / 4);
}

}  // namespace sae_fast::testing
