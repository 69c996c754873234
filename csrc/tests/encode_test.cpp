// The encoder kernels: top-k with and without a dead mask, of a row and of a batch, and threshold
// codes.
#include <algorithm>
#include <numeric>

#include "tests/testing.h"

namespace sae_fast::testing {
namespace {

struct Shape {
  int64_t tokens, d_in, d_sae;
};

// A pre-activation, and how far a sum in float may be from it.
struct Score {
  double exact, tolerance;
};

// An encoder with its storage, packed by the kernel under test.
class Encoder {
 public:
  Encoder(Random& random, const Shape& shape, Numbers numbers, cpu::Screen screen, DType rows)
      : shape(shape),
        numbers(numbers),
        rows(rows),
        x(random.numbers(shape.tokens * shape.d_in, numbers)),
        W_enc(random.numbers(shape.d_sae * shape.d_in, numbers)),
        b_enc(random.numbers(shape.d_sae, numbers)),
        b_dec(random.numbers(shape.d_in, numbers)),
        packed_(static_cast<size_t>(cpu::packed_elements(screen, shape.d_in, shape.d_sae))),
        stats_(static_cast<size_t>(4 * cpu::panels(shape.d_sae) * cpu::kPanelLatents)),
        rounded_(rows == DType::kFloat32 ? 0 : W_enc.size()) {
    packed.screen = screen;
    packed.type = rows;
    packed.packed = packed_.data();
    packed.stats = stats_.data();
    packed.W_enc = W_enc.data();
    packed.rounded = rounded_.empty() ? nullptr : rounded_.data();
    packed.d_sae = shape.d_sae;
    packed.d_in = shape.d_in;
    check(cpu::kernels().pack_encoder(packed, four_threads()), "pack_encoder: out of memory");
    for (int64_t n = 0; n < shape.tokens; ++n) {
      for (int64_t j = 0; j < shape.d_sae; ++j) scores_.push_back(compute_score(n, j));
    }
  }

  const Score& score(int64_t token, int64_t latent) const {
    return scores_[static_cast<size_t>(token * shape.d_sae + latent)];
  }

  Shape shape;
  Numbers numbers;
  DType rows;
  std::vector<float> x, W_enc, b_enc, b_dec;
  cpu::PackedEncoder packed{};

 private:
  Score compute_score(int64_t token, int64_t latent) const {
    double sum = b_enc[latent];
    double size = std::fabs(sum);
    for (int64_t d = 0; d < shape.d_in; ++d) {
      const double a = rounded(x[token * shape.d_in + d] - b_dec[d], rows);
      const double w = rounded(W_enc[latent * shape.d_in + d], rows);
      sum += a * w;
      size += std::fabs(a * w);
    }
    return {sum, numbers == Numbers::kNormal ? 1e-6 * size : 0.0};
  }

  std::vector<Score> scores_;
  std::vector<int32_t> packed_;
  std::vector<float> stats_;
  std::vector<uint16_t> rounded_;
};

float relu(float value) { return std::isnan(value) || value > 0.0f ? value : 0.0f; }

// Checks the code of one token, selected among `candidates`, against all their scores.
void check_selection(const Encoder& encoder, int64_t token, std::vector<int32_t> candidates,
                     const float* values, const int32_t* indices, int64_t k) {
  const auto score = [&](int32_t latent) -> const Score& { return encoder.score(token, latent); };
  const auto before = [&](int32_t a, int32_t b) {
    const double left = score(a).exact;
    const double right = score(b).exact;
    if (std::isnan(left) != std::isnan(right)) return std::isnan(left);
    return left > right || (!(left < right) && a < b);
  };
  const auto found = std::min<int64_t>(k, static_cast<int64_t>(candidates.size()));
  std::partial_sort(candidates.begin(), candidates.begin() + found, candidates.end(), before);
  for (int64_t i = 0; i < k; ++i) {
    if (i >= found) {
      check(values[i] == 0.0f && indices[i] == 0, "token %ld: choice %ld is not empty", token, i);
      continue;
    }
    const int32_t latent = indices[i];
    const bool in_range = latent >= 0 && latent < encoder.shape.d_sae;
    check(in_range, "token %ld: index %d is out of range", token, latent);
    if (!in_range) return;
    const auto [exact, tolerance] = score(latent);
    const auto [wanted, other_tolerance] = score(candidates[i]);
    const float value = relu(static_cast<float>(exact));
    if (encoder.numbers != Numbers::kNormal) {
      check(latent == candidates[i] && same(values[i], value),
            "token %ld: choice %ld is %g of latent %d, not %g of %d", token, i, values[i], latent,
            wanted, candidates[i]);
      continue;
    }
    check(std::fabs(values[i] - value) <= tolerance, "token %ld: value %g of latent %d, not %g",
          token, values[i], latent, exact);
    check(std::fabs(exact - wanted) <= tolerance + other_tolerance,
          "token %ld: choice %ld scores %g, the best one left %g", token, i, exact, wanted);
    check(std::count(indices, indices + i, latent) == 0, "token %ld: latent %d twice", token,
          latent);
  }
}

void test_topk(Random& random, const Encoder& encoder) {
  const Shape& shape = encoder.shape;
  const int64_t k = random.integer(1, std::min<int64_t>(shape.d_sae, random.integer(1, 80)));
  const int64_t k_aux = random.integer(0, 2) == 0 ? random.integer(1, shape.d_sae) : 0;
  // Not std::vector<bool>, which is no array.
  std::vector<uint8_t> dead(static_cast<size_t>(shape.d_sae));
  for (uint8_t& flag : dead) flag = random.integer(0, 2) == 0 ? 1 : 0;
  struct Result {
    std::vector<float> values, aux_values;
    std::vector<int32_t> indices, aux_indices;
  };
  const auto run = [&](const cpu::Parallel& parallel) {
    Result result{std::vector<float>(shape.tokens * k), std::vector<float>(shape.tokens * k_aux),
                  std::vector<int32_t>(shape.tokens * k),
                  std::vector<int32_t>(shape.tokens * k_aux)};
    cpu::TopKProblem problem{encoder.packed,
                             encoder.x.data(),
                             encoder.b_enc.data(),
                             encoder.b_dec.data(),
                             nullptr,
                             shape.tokens,
                             k,
                             k_aux,
                             result.values.data(),
                             result.indices.data(),
                             result.aux_values.data(),
                             result.aux_indices.data()};
    if (k_aux > 0) problem.dead_mask = reinterpret_cast<const bool*>(dead.data());
    check(cpu::kernels().encode_topk(problem, parallel), "encode_topk: out of memory");
    return result;
  };
  const Result one = run(one_thread());
  const Result four = run(four_threads());
  check(same_bits(one.values, four.values) && same_bits(one.indices, four.indices) &&
            same_bits(one.aux_values, four.aux_values) &&
            same_bits(one.aux_indices, four.aux_indices),
        "encode_topk depends on the number of threads");
  std::vector<int32_t> all(static_cast<size_t>(shape.d_sae));
  std::iota(all.begin(), all.end(), 0);
  std::vector<int32_t> dead_ones;
  std::copy_if(all.begin(), all.end(), std::back_inserter(dead_ones),
               [&](int32_t latent) { return dead[latent] != 0; });
  for (int64_t n = 0; n < shape.tokens; ++n) {
    check_selection(encoder, n, all, one.values.data() + n * k, one.indices.data() + n * k, k);
    check_selection(encoder, n, dead_ones, one.aux_values.data() + n * k_aux,
                    one.aux_indices.data() + n * k_aux, k_aux);
  }
}

// The best of the whole batch, checked against all scores: exactly for integers, otherwise that no
// score left out is above one taken.
void check_batch(const Encoder& encoder, int64_t k, const std::vector<float>& values,
                 const std::vector<int32_t>& indices, const std::vector<int64_t>& offsets) {
  struct Place {
    double score;
    int64_t token;
    int32_t latent;
  };
  const auto before = [](const Place& a, const Place& b) {
    if (std::isnan(a.score) != std::isnan(b.score)) return std::isnan(a.score);
    if (a.score > b.score || a.score < b.score) return a.score > b.score;
    return std::pair(a.token, a.latent) < std::pair(b.token, b.latent);
  };
  std::vector<Place> wanted;
  double slack = 0.0;
  for (int64_t n = 0; n < encoder.shape.tokens; ++n) {
    for (int32_t j = 0; j < encoder.shape.d_sae; ++j) {
      const auto [exact, tolerance] = encoder.score(n, j);
      slack = std::max(slack, tolerance);
      if (std::isnan(exact) || exact > 0.0) wanted.push_back({exact, n, j});
    }
  }
  std::sort(wanted.begin(), wanted.end(), before);
  const int64_t budget = encoder.shape.tokens * k;
  if (static_cast<int64_t>(wanted.size()) > budget) wanted.resize(static_cast<size_t>(budget));
  const double least = wanted.empty() ? 0.0 : wanted.back().score;
  std::sort(wanted.begin(), wanted.end(), [](const Place& a, const Place& b) {
    return std::pair(a.token, a.latent) < std::pair(b.token, b.latent);
  });
  check(offsets.back() == budget, "batch: %ld entries, not %ld", offsets.back(), budget);
  for (int64_t n = 0; n < encoder.shape.tokens; ++n) {
    for (int64_t i = offsets[n]; i < offsets[n + 1]; ++i) {
      if (static_cast<size_t>(i) >= wanted.size() && values[i] == 0.0f) continue;
      const auto [exact, tolerance] = encoder.score(n, indices[i]);
      if (encoder.numbers == Numbers::kNormal) {
        check(std::fabs(values[i] - exact) <= tolerance && exact >= least - 2.0 * slack,
              "batch: token %ld: value %g of latent %d, which scores %g; the least is %g", n,
              values[i], indices[i], exact, least);
        continue;
      }
      check(n == wanted[i].token && indices[i] == wanted[i].latent &&
                same(values[i], static_cast<float>(exact)),
            "batch: entry %ld is %g of token %ld, latent %d, not of %ld, %d", i, values[i], n,
            indices[i], wanted[i].token, wanted[i].latent);
    }
  }
}

void test_batch_topk(Random& random, const Encoder& encoder) {
  const Shape& shape = encoder.shape;
  const int64_t k = random.integer(1, std::min<int64_t>(shape.d_sae, random.integer(1, 80)));
  struct Result {
    std::vector<float> values;
    std::vector<int32_t> indices;
    std::vector<int64_t> offsets;
  };
  const auto run = [&](const cpu::Parallel& parallel) {
    Result result{std::vector<float>(shape.tokens * k), std::vector<int32_t>(shape.tokens * k),
                  std::vector<int64_t>(shape.tokens + 1)};
    cpu::TopKProblem problem{};
    problem.encoder = encoder.packed;
    problem.x = encoder.x.data();
    problem.b_enc = encoder.b_enc.data();
    problem.b_dec = encoder.b_dec.data();
    problem.tokens = shape.tokens;
    problem.k = k;
    problem.values = result.values.data();
    problem.indices = result.indices.data();
    check(cpu::kernels().encode_batch_topk(problem, result.offsets.data(), parallel),
          "encode_batch_topk: out of memory");
    return result;
  };
  const Result one = run(one_thread());
  const Result four = run(four_threads());
  check(same_bits(one.values, four.values) && same_bits(one.indices, four.indices) &&
            same_bits(one.offsets, four.offsets),
        "encode_batch_topk depends on the number of threads");
  check_batch(encoder, k, one.values, one.indices, one.offsets);
}

class Sink : public cpu::ThresholdSink {
 public:
  explicit Sink(int64_t tokens) : values(tokens), indices(tokens) {}
  bool row(int64_t token, const float* row_values, const int32_t* row_indices,
           int64_t count) override {
    values[token].assign(row_values, row_values + count);
    indices[token].assign(row_indices, row_indices + count);
    return true;
  }
  std::vector<std::vector<float>> values;
  std::vector<std::vector<int32_t>> indices;
};

void check_threshold_row(const Encoder& encoder, int64_t token, const std::vector<float>& threshold,
                         const std::vector<float>& values, const std::vector<int32_t>& indices) {
  size_t next = 0;
  for (int32_t latent = 0; latent < encoder.shape.d_sae; ++latent) {
    const auto [exact, tolerance] = encoder.score(token, latent);
    const double limit = std::max(threshold[latent], 0.0f);
    const bool listed = next < indices.size() && indices[next] == latent;
    const bool near = std::fabs(exact - limit) <= tolerance && tolerance > 0.0;
    check(near || listed == (std::isnan(exact) || exact > limit),
          "token %ld: latent %d scores %g at threshold %g and is %s", token, latent, exact, limit,
          listed ? "listed" : "missing");
    if (!listed) continue;
    check(std::isnan(exact) ? std::isnan(values[next])
                            : same(values[next], static_cast<float>(exact)) ||
                                  std::fabs(values[next] - exact) <= tolerance,
          "token %ld: value %g of latent %d, not %g", token, values[next], latent, exact);
    ++next;
  }
  check(next == indices.size(), "token %ld: indices do not ascend", token);
}

void test_threshold(Random& random, const Encoder& encoder) {
  const Shape& shape = encoder.shape;
  std::vector<float> threshold(static_cast<size_t>(shape.d_sae));
  for (float& value : threshold) {
    value = static_cast<float>(random.integer(-2, 12)) * 0.5f;
    if (random.integer(0, 50) == 0) value = INFINITY;
  }
  const cpu::ThresholdProblem problem{encoder.packed,       encoder.x.data(), encoder.b_enc.data(),
                                      encoder.b_dec.data(), threshold.data(), shape.tokens};
  Sink one(shape.tokens);
  Sink four(shape.tokens);
  check(cpu::kernels().encode_threshold(problem, one, one_thread()) &&
            cpu::kernels().encode_threshold(problem, four, four_threads()),
        "encode_threshold: out of memory");
  for (int64_t n = 0; n < shape.tokens; ++n) {
    check(same_bits_or_nan(one.values[n], four.values[n]) &&
              same_bits(one.indices[n], four.indices[n]),
          "encode_threshold depends on the number of threads");
    check_threshold_row(encoder, n, threshold, one.values[n], one.indices[n]);
  }
}

}  // namespace

void test_encode(uint64_t seed) {
  Random random(seed);
  // Some with several groups of tokens, strips of columns and panels of latents.
  const bool large = seed % 10 == 4;
  const Shape shape{random.integer(0, large ? 150 : 40), random.integer(1, large ? 300 : 70),
                    random.integer(1, large ? 500 : 300)};
  const Numbers kinds[] = {Numbers::kIntegers, Numbers::kIntegersAndSpecials, Numbers::kNormal};
  const auto numbers = kinds[seed % 3];
  for (const auto& [screen, rows] : {std::pair{cpu::Screen::kFloat, DType::kFloat32},
                                     std::pair{cpu::Screen::kNarrow, DType::kFloat32},
                                     std::pair{cpu::Screen::kNarrow, DType::kBFloat16},
                                     std::pair{cpu::Screen::kNarrow, DType::kFloat16}}) {
    const Encoder encoder(random, shape, numbers, screen, rows);
    test_topk(random, encoder);
    test_batch_topk(random, encoder);
    test_threshold(random, encoder);
  }
}

}  // namespace sae_fast::testing
