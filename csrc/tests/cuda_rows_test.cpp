// normalize_rows, latent_major and the sums over it, compiled for the host.
#include "kernels/cuda/latent_major.cu"
#include "kernels/cuda/latent_sum.cu"
#include "kernels/cuda/rows.cu"

#include "tests/cuda_nodes.h"

namespace sae_fast::testing {
namespace {

void test_normalize(Random& random) {
  const int64_t rows = random.integer(0, 4);
  const int64_t d_in =
      random.integer(0, 1) == 0 ? random.integer(1, 40) : 4 * random.integer(1, 300);
  std::vector<float> W = random.numbers(rows * d_in, Numbers::kNormal);
  if (rows > 0) std::fill_n(W.begin(), d_in, 0.0f);
  const std::vector<float> before = W;
  check_success(cuda::normalize_rows(W.data(), rows, d_in, nullptr), "normalize_rows");
  for (int64_t row = 0; row < rows; ++row) {
    double square = 0.0;
    for (int64_t i = row * d_in; i < (row + 1) * d_in; ++i) {
      square += std::pow(before[static_cast<size_t>(i)], 2);
    }
    const double norm = std::max(std::sqrt(square), 1e-12);
    for (int64_t i = row * d_in; i < (row + 1) * d_in; ++i) {
      check_near("normalize_rows", W[static_cast<size_t>(i)], before[static_cast<size_t>(i)] / norm,
                 1e-6);
    }
  }
}

// The expected results of latent_major and accumulate_rows.
struct Expected {
  Expected(const CodeProblem& code, int64_t d_sae, const Matrix& dense, int64_t d_in)
      : latent_offsets(1, 0),
        sums(static_cast<size_t>(d_sae)),
        rows(static_cast<size_t>(d_sae * d_in)) {
    const std::vector<int64_t> tokens = tokens_of(code);
    for (int64_t latent = 0; latent < d_sae; ++latent) {
      for (size_t entry = 0; entry < code.values.size(); ++entry) {
        if (code.indices[entry] != latent || code.values[entry] == 0.0f) continue;
        entries.push_back(static_cast<int64_t>(entry));
        sums[static_cast<size_t>(latent)] += code.values[entry];
        for (int64_t column = 0; column < d_in; ++column) {
          rows[static_cast<size_t>(latent * d_in + column)] +=
              code.values[entry] * dense.values[static_cast<size_t>(tokens[entry] * d_in + column)];
        }
      }
      latent_offsets.push_back(static_cast<int64_t>(entries.size()));
    }
    for (size_t entry = 0; entry < code.values.size(); ++entry) {
      if (code.values[entry] == 0.0f) entries.push_back(static_cast<int64_t>(entry));
    }
    for (const int64_t entry : entries) entry_tokens.push_back(tokens[static_cast<size_t>(entry)]);
  }

  std::vector<int64_t> latent_offsets, entries, entry_tokens;
  std::vector<double> sums, rows;
};

void test_latent_major(const CodeProblem& code, int64_t d_sae, const Expected& expected) {
  auto latent_offsets = stale(d_sae + 1, int64_t{-7});
  auto entries = stale(code.entries(), int32_t{-7});
  auto rows = stale(code.entries(), int32_t{-7});
  size_t bytes = 0;
  check_success(cuda::latent_major_scratch_bytes(code.entries(), d_sae, &bytes), "latent_major");
  TestScratch scratch(bytes);
  check_nodes("latent_major", [&] {
    return cuda::latent_major(code.values.data(), code.indices.data(), rows_of(code),
                              latent_offsets.data(), entries.data(), rows.data(), d_sae,
                              scratch.data(), nullptr);
  });
  check(latent_offsets == expected.latent_offsets, "latent_major: offsets");
  for (size_t p = 0; p < entries.size(); ++p) {
    check_near("latent_major: entry", entries[p], static_cast<double>(expected.entries[p]), 0.0);
    check_near("latent_major: row", rows[p], static_cast<double>(expected.entry_tokens[p]), 0.0);
  }
}

// With the list's unused rest, as the device has it.
void test_sums(const CodeProblem& code, int64_t d_sae, const Expected& expected) {
  const std::vector<int32_t> entries(expected.entries.begin(), expected.entries.end());
  auto ordered = stale(code.entries(), 777.0f);
  check_nodes("gather_entries", [&] {
    return cuda::gather_entries(code.values.data(), entries.data(), code.entries(), ordered.data(),
                                nullptr);
  });
  for (size_t p = 0; p < entries.size(); ++p) {
    const float value = code.values[static_cast<size_t>(entries[p])];
    check(same(ordered[p], value), "gather_entries: %g", static_cast<double>(ordered[p]));
  }
  auto sums = stale(d_sae, 777.0f);
  check_nodes("latent_sums", [&] {
    return cuda::latent_sums(expected.latent_offsets.data(), entries.data(), code.values.data(),
                             d_sae, sums.data(), nullptr);
  });
  for (size_t j = 0; j < sums.size(); ++j) {
    check_near("latent_sums", sums[j], expected.sums[j], 0.0);
  }
}

void test_accumulate(const CodeProblem& code, int64_t d_sae, const Matrix& dense, int64_t d_in,
                     const Expected& expected) {
  auto rows = stale(d_sae * d_in, 777.0f);
  auto sums = stale(d_sae, 777.0f);
  size_t bytes = 0;
  check_success(cuda::accumulate_rows_scratch_bytes(code.entries(), d_sae, d_in, &bytes),
                "accumulate_rows");
  TestScratch scratch(bytes);
  check_success(
      cuda::accumulate_rows(code.values.data(), code.indices.data(), rows_of(code), typed(dense),
                            rows.data(), sums.data(), d_sae, d_in, scratch.data(), nullptr),
      "accumulate_rows");
  for (size_t i = 0; i < rows.size(); ++i) {
    check_near("accumulate_rows: rows", rows[i], expected.rows[i], 0.0);
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    check_near("accumulate_rows: sums", sums[i], expected.sums[i], 0.0);
  }
}

// Several tiles of entries, and lists that one pass over their positions cannot order.
void test_long_lists(Random& random) {
  const int64_t d_sae = 9, d_in = 1, k = 8;
  CodeProblem code(random, (cuda::kMaskPositions + 3 * cuda::kTileEntries) / k, k, d_sae, false);
  for (size_t entry = 0; entry < code.values.size(); ++entry) {
    code.values[entry] = random.integer(0, 3) == 0 ? 0.0f : 1.0f;
    const bool rare = random.integer(0, 999) == 0;
    code.indices[entry] = static_cast<int32_t>(rare ? random.integer(0, 6) : 7);
  }
  const Matrix dense(random.numbers(code.tokens * d_in, Numbers::kIntegers), DType::kFloat32);
  test_latent_major(code, d_sae, Expected(code, d_sae, dense, d_in));
}

}  // namespace

void test_cuda_rows(uint64_t seed) {
  Random random(seed);
  test_normalize(random);
  if (seed == 0) test_long_lists(random);
  const int64_t d_in = random.integer(0, 1) == 0 ? random.integer(1, 9) : 4 * random.integer(1, 70);
  const int64_t d_sae = random.integer(1, 40);
  // Half of the problems have latents with hundreds of entries, which are summed in chunks.
  const bool busy = random.integer(0, 1) == 1;
  CodeProblem code(random, random.integer(0, busy ? 60 : 5), random.integer(0, busy ? 20 : 6),
                   d_sae, random.integer(0, 1) == 1);
  for (int32_t& index : code.indices) {
    if (busy && random.integer(0, 1) == 1) index = static_cast<int32_t>(d_sae / 2);
  }
  const Matrix dense(random.numbers(code.tokens * d_in, Numbers::kIntegers), any_type(random));
  const Expected expected(code, d_sae, dense, d_in);
  test_latent_major(code, d_sae, expected);
  test_sums(code, d_sae, expected);
  test_accumulate(code, d_sae, dense, d_in, expected);
}

}  // namespace sae_fast::testing
