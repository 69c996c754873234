// Threshold codes, compiled for the host.
#include "kernels/cuda/encode/threshold.cu"

#include <algorithm>

#include "tests/cuda_encode_problem.h"

namespace sae_fast::testing {
namespace {

// One run over the product: counts of candidates, then what passes. Returns the largest count that
// found no room.
int64_t collect(Random& random, EncodeProblem& problem, const std::vector<float>& threshold,
                const cuda::CandidateRows& rows, std::vector<int64_t>& kept) {
  const cuda::Encoder encoder = problem.encoder();
  TestScratch scratch(cuda::threshold_scratch_bytes(problem.shape.tokens, problem.shape.d_sae));
  check_success(cuda::begin_threshold(encoder, problem.tokens(), rows, scratch.data(), nullptr),
                "begin_threshold");
  problem.for_each_chunk(kSegment * random.integer(1, 3), [&](const cuda::Product& product) {
    check_success(cuda::select_threshold(encoder, problem.tokens(), threshold.data(), product, rows,
                                         scratch.data(), nullptr),
                  "select_threshold");
  });
  int64_t most = -7;
  check_success(cuda::finish_threshold(encoder, problem.tokens(), threshold.data(), rows,
                                       kept.data(), &most, nullptr),
                "finish_threshold");
  return most;
}

std::vector<int64_t> sums_before(const std::vector<int64_t>& counts, int64_t rows) {
  auto offsets = stale(rows + 1, int64_t{-7});
  check_success(cuda::count_offsets(counts.data(), rows, offsets.data(), nullptr), "count_offsets");
  return offsets;
}

void check_code(const EncodeProblem& problem, const std::vector<float>& threshold,
                const std::vector<int64_t>& offsets, const std::vector<float>& values,
                const std::vector<int32_t>& indices) {
  size_t next = 0;
  for (int64_t n = 0; n < problem.shape.tokens; ++n) {
    check(offsets[static_cast<size_t>(n)] == static_cast<int64_t>(next), "threshold: offset %ld",
          n);
    for (int64_t j = 0; j < problem.shape.d_sae; ++j) {
      const float score = problem.scores()[static_cast<size_t>(n * problem.shape.d_sae + j)];
      const bool fires = score > threshold[static_cast<size_t>(j)] && score > 0.0f;
      if (!fires && !std::isnan(score)) continue;
      const bool there = next < values.size() && indices[next] == j && same(values[next], score);
      check(there, "threshold: token %ld, latent %ld with %.9g is missing", n, j, score);
      if (!there) return;
      ++next;
    }
  }
  check(next == values.size(), "threshold: %zu entries, not %zu", values.size(), next);
}

void test_threshold(Random& random, EncodeProblem& problem) {
  const auto [tokens, d_in, d_sae] = problem.shape;
  auto threshold = stale(d_sae, 0.0f);
  const int64_t base = random.integer(-2, 3);
  for (float& limit : threshold) {
    limit = static_cast<float>(base) + static_cast<float>(random.integer(-2, 12)) * 0.5f;
    if (random.integer(0, 50) == 0) limit = random.integer(0, 1) == 0 ? INFINITY : NAN;
  }
  const int64_t room = random.integer(0, d_sae);
  auto kept = stale(tokens + 1, int64_t{-7});
  auto counts = stale(tokens + 1, int64_t{-7});
  auto values = stale(tokens * room, 777.0f);
  auto indices = stale(tokens * room, int32_t{-7});
  cuda::CandidateRows rows{values.data(), indices.data(), nullptr, room, counts.data()};
  const int64_t most = collect(random, problem, threshold, rows, kept);
  std::vector<int64_t> rooms;
  if (most > 0) {
    check(most > room && *std::max_element(counts.begin(), counts.end()) == most,
          "threshold: %ld candidates with room for %ld", most, room);
    rooms = sums_before(counts, tokens);
    values = stale(rooms.back(), 777.0f);
    indices = stale(rooms.back(), int32_t{-7});
    rows = {values.data(), indices.data(), rooms.data(), 0, counts.data()};
    check(collect(random, problem, threshold, rows, kept) == 0, "threshold: no room twice");
  }
  const std::vector<int64_t> offsets = sums_before(kept, tokens);
  auto code_values = stale(offsets.back(), 777.0f);
  auto code_indices = stale(offsets.back(), int32_t{-7});
  check_success(cuda::gather_code(rows, tokens, offsets.data(), code_values.data(),
                                  code_indices.data(), nullptr),
                "gather_code");
  check_code(problem, threshold, offsets, code_values, code_indices);
}

}  // namespace

void test_cuda_threshold(uint64_t seed) {
  Random random(seed);
  const FewBlocks few_blocks;
  const Numbers kinds[] = {Numbers::kIntegers, Numbers::kIntegersAndSpecials, Numbers::kNormal};
  EncodeProblem problem(random, any_shape(random), kinds[seed % 3], any_precision(random));
  problem.pack(random);
  test_threshold(random, problem);
}

}  // namespace sae_fast::testing
