// Top-k of a whole batch, compiled for the host.
#include "kernels/cuda/encode/batch_collect.cu"
#include "kernels/cuda/encode/batch_finish.cu"
#include "kernels/cuda/encode/batch_score.cu"

#include <algorithm>

#include "tests/cuda_encode_problem.h"

namespace sae_fast::testing {
namespace {

struct BatchCase {
  int64_t k;
  int64_t block_rows;
  bool tightens;  // false: the limit never moves before a chunk is listed
};

struct BatchResult {
  explicit BatchResult(const cuda::BatchSize& size)
      : values(stale(size.wanted(), 777.0f)),
        indices(stale(size.wanted(), int32_t{-7})),
        offsets(stale(size.tokens + 1, int64_t{-7})) {}
  std::vector<float> values;
  std::vector<int32_t> indices;
  std::vector<int64_t> offsets;
  bool in_full = false;  // whether the lists were given up
};

// Calls call(product) for the chunks of some rows of the problem.
template <typename Call>
void for_each_chunk_of_rows(const EncodeProblem& problem, int64_t first, int64_t rows,
                            int64_t columns, Call&& call) {
  problem.for_each_chunk(columns, [&](const cuda::Product& product) {
    call(cuda::Product{product.values + first * product.columns, product.first_latent,
                       product.columns},
         rows);
  });
}

int64_t full_batches() {
  int64_t count = -1;
  check_success(cuda::read_full_batches(&count, nullptr), "read_full_batches");
  return count;
}

BatchResult run(Random& random, EncodeProblem& problem, const BatchCase& wanted) {
  const auto [count, d_in, d_sae] = problem.shape;
  const cuda::BatchSize size{count, d_sae, wanted.k};
  const cuda::Encoder encoder = problem.encoder();
  BatchResult result(size);
  const int64_t full_before = full_batches();
  size_t bytes = 0;
  check_success(cuda::batch_scratch_bytes(size, &bytes), "batch_scratch_bytes");
  TestScratch scratch(bytes);
  TestScratch pieces(cuda::topk_scratch_bytes(wanted.block_rows, d_sae, 0, 0));
  check_success(cuda::begin_batch(size, scratch.data(), nullptr), "begin_batch");
  const cuda::TopK nothing{};
  cuda::Tightening tightening;
  for (int64_t first = 0; first < count; first += wanted.block_rows) {
    cuda::Tokens tokens = problem.tokens();
    tokens.x += first * d_in;
    tokens.rounded_x = static_cast<uint16_t*>(tokens.rounded_x) + first * d_in;
    tokens.rows = std::min(wanted.block_rows, count - first);
    const cuda::BlockScratch block{pieces.data(), 0, first};
    check_success(cuda::begin_topk(encoder, tokens, nothing, pieces.data(), nullptr), "begin_topk");
    check_success(cuda::add_block(encoder, tokens, size, block, scratch.data(), nullptr),
                  "add_block");
    for_each_chunk_of_rows(problem, first, tokens.rows, kSegment * random.integer(1, 3),
                           [&](const cuda::Product& product, int64_t rows) {
                             const bool due =
                                 tightening.due(rows * product.columns) && wanted.tightens;
                             check_success(cuda::select_batch(encoder, tokens, size, product, due,
                                                              block, scratch.data(), nullptr),
                                           "select_batch");
                           });
  }
  if (count > 0) problem.check_rounded_tokens();
  check_success(
      cuda::finish_batch(encoder, problem.tokens().x, size,
                         {result.values.data(), result.indices.data(), result.offsets.data()},
                         scratch.data(), nullptr),
      "finish_batch");
  cuda::Scratch taken(scratch.data());
  result.in_full = cuda::BatchState(taken, size).numbers->everything != 0;
  check(full_batches() - full_before == (result.in_full ? 1 : 0), "batch: full ones are counted");
  return result;
}

// The contract by brute force.
BatchResult best_of(const std::vector<float>& scores, const cuda::BatchSize& size) {
  BatchResult best(size);
  std::vector<size_t> places;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] > 0.0f || std::isnan(scores[i])) places.push_back(i);
  }
  std::stable_sort(places.begin(), places.end(), [&](size_t a, size_t b) {
    return ordered_key(scores[a]) > ordered_key(scores[b]);
  });
  if (static_cast<int64_t>(places.size()) > size.wanted()) {
    places.resize(static_cast<size_t>(size.wanted()));
  }
  std::sort(places.begin(), places.end());
  std::fill(best.values.begin(), best.values.end(), 0.0f);
  std::fill(best.indices.begin(), best.indices.end(), 0);
  std::fill(best.offsets.begin(), best.offsets.end(), 0);
  for (size_t i = 0; i < places.size(); ++i) {
    const auto place = static_cast<int64_t>(places[i]);
    best.values[i] = scores[places[i]];
    best.indices[i] = static_cast<int32_t>(place % size.d_sae);
    ++best.offsets[static_cast<size_t>(place / size.d_sae) + 1];
  }
  for (size_t n = 1; n < best.offsets.size(); ++n) best.offsets[n] += best.offsets[n - 1];
  best.offsets.back() = size.wanted();
  return best;
}

// Returns whether the lists were given up.
bool test_batch(Random& random, EncodeProblem& problem, const BatchCase& wanted, const char* name) {
  const BatchResult result = run(random, problem, wanted);
  const cuda::BatchSize size{problem.shape.tokens, problem.shape.d_sae, wanted.k};
  const BatchResult best = best_of(result.in_full ? problem.full_scores() : problem.scores(), size);
  for (size_t n = 0; n < best.offsets.size(); ++n) {
    check(result.offsets[n] == best.offsets[n], "batch, %s: offset %zu is %ld, not %ld", name, n,
          result.offsets[n], best.offsets[n]);
  }
  for (size_t i = 0; i < best.values.size(); ++i) {
    check(result.indices[i] == best.indices[i] && same(result.values[i], best.values[i]),
          "batch, %s: entry %zu is %.9g of %d, not %.9g of %d", name, i, result.values[i],
          result.indices[i], best.values[i], best.indices[i]);
  }
  return result.in_full;
}

BatchCase any_case(Random& random, const Shape& shape) {
  BatchCase wanted{random.integer(1, std::min<int64_t>(shape.d_sae, random.integer(1, 60))),
                   random.integer(1, std::max<int64_t>(shape.tokens, 1)),
                   random.integer(0, 3) != 0};
  if (random.integer(0, 7) == 0) wanted.k = shape.d_sae;
  if (random.integer(0, 7) == 0) wanted.k = 1;
  return wanted;
}

Shape any_batch(Random& random) {
  Shape shape = any_shape(random);
  if (shape.d_in < 100) shape.tokens = random.integer(0, 12);
  return shape;
}

void test_random_batch(Random& random, uint64_t seed) {
  const Numbers kinds[] = {Numbers::kIntegers, Numbers::kIntegersAndSpecials, Numbers::kNormal};
  for (const Precision precision : {Precision::kExact, Precision::kBFloat16, Precision::kFloat16}) {
    const Numbers numbers = kinds[seed % 3];
    EncodeProblem problem(random, any_batch(random), numbers, precision);
    if (numbers == Numbers::kNormal && precision == Precision::kExact) {
      problem.scale(std::vector<float>{1e-40f, 1e-20f, 1.0f, 1e15f}[seed / 3 % 4]);
    }
    if (random.integer(0, 3) == 0) {  // fewer positive entries than are wanted
      for (float& bias : problem.b_enc) bias -= static_cast<float>(random.integer(5, 1000));
    }
    problem.pack(random);
    const BatchCase wanted = any_case(random, problem.shape);
    test_batch(random, problem, wanted, "random");
  }
}

// A few tokens take most of the budget, or tokens and latents are out of every bound.
void test_loud_tokens(Random& random, uint64_t seed) {
  const bool unbounded = seed % 2 == 0;
  EncodeProblem problem(random, {9, 8, 400}, Numbers::kNormal, Precision::kExact);
  for (const int64_t token : {random.integer(0, 8), random.integer(0, 8)}) {
    for (int64_t d = 0; d < 8; ++d) {
      problem.x[static_cast<size_t>(token * 8 + d)] *= unbounded ? 1e25f : 1e4f;
    }
  }
  if (unbounded) {
    problem.b_enc[static_cast<size_t>(random.integer(0, 399))] = 1e32f;
    problem.W_enc[static_cast<size_t>(random.integer(0, 3199))] =
        random.integer(0, 1) ? NAN : 1e30f;
  }
  problem.pack(random);
  const BatchCase wanted{random.integer(1, 80), random.integer(1, 9), true};
  check(!test_batch(random, problem, wanted, "loud"), "batch, loud: was computed in full");
}

// More candidates than the list holds, at any limit: 4096 and 6 times what is wanted.
void test_overflow(Random& random, uint64_t seed) {
  const Precision precision = seed % 2 == 0 ? Precision::kExact : Precision::kBFloat16;
  EncodeProblem problem(random, {9, 1, 600}, Numbers::kIntegers, precision);
  std::fill(problem.W_enc.begin(), problem.W_enc.end(), 0.0f);
  std::fill(problem.b_enc.begin(), problem.b_enc.end(), 1.0f);
  const float ahead = precision == Precision::kExact ? 1.001f : 2.0f;
  for (int64_t i = 0; i < 3; ++i) {  // some are better than the rest, fewer than are wanted
    problem.b_enc[static_cast<size_t>(random.integer(0, 599))] = ahead;
  }
  problem.pack(random);
  const BatchCase wanted{random.integer(4, 9), random.integer(3, 9), random.integer(0, 1) != 0};
  check(test_batch(random, problem, wanted, "overflow"), "batch, overflow: the list had room");
}

// A product that is off by more than its bound: what was scored tells.
void test_wrong_bounds(Random& random) {
  EncodeProblem problem(random, {5, 8, 300}, Numbers::kNormal, Precision::kExact);
  problem.pack(random);
  problem.spoil_products(random, 1e-2f);
  const BatchCase wanted{random.integer(5, 60), 5, true};
  check(test_batch(random, problem, wanted, "wrong"), "batch, wrong bounds: went unnoticed");
}

}  // namespace

void test_cuda_batch(uint64_t seed) {
  Random random(seed);
  const FewBlocks few_blocks;
  test_random_batch(random, seed);
  if (seed % 2 == 0) test_loud_tokens(random, seed / 2);
  if (seed % 8 == 0) test_overflow(random, seed / 8);
  if (seed % 8 == 1) test_wrong_bounds(random);
}

}  // namespace sae_fast::testing
