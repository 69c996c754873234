// The row kernels: latent-major lists, gradient rows and their norm, the optimiser's update,
// normalisation, decorrelation.
#include <algorithm>
#include <numeric>

#include "tests/testing.h"
#include "tests/update_formulas.h"

namespace sae_fast::testing {
namespace {

struct Shape {
  int64_t tokens, d_in, d_sae;
  int64_t most_entries;  // of a token
};

// Few entries a token, which are gathered row by row; many, in strips; and now and then so many
// tokens that strips of them are cut into ranges.
Shape any_shape(Random& random, uint64_t seed) {
  if (seed % 20 == 10) return {random.integer(8300, 8600), random.integer(1, 40), 30, 20};
  const int64_t most_entries = random.integer(0, 1) == 1 ? 8 : 40;
  return {random.integer(0, 60), random.integer(1, 150), random.integer(1, 150), most_entries};
}

// A code seen latent by latent, sorted by the function under test and checked.
struct Lists {
  Lists(const CodeProblem& problem, int64_t d_sae) : offsets(static_cast<size_t>(d_sae + 1)) {
    const cpu::Code code = problem.code();
    const auto active = static_cast<size_t>(cpu::count_active(code, problem.entries()));
    entries.resize(active);
    rows.resize(active);
    cpu::sort_by_latent(code, d_sae, offsets.data(), entries.data(), rows.data(), four_threads());
    for (const int32_t entry : entries) coefficients.push_back(problem.values[entry]);
    check_order(code, d_sae);
  }

  void check_order(const cpu::Code& code, int64_t d_sae) const {
    size_t at = 0;
    for (int64_t latent = 0; latent < d_sae; ++latent) {
      check(offsets[latent] == static_cast<int64_t>(at), "latent %ld begins at %ld, not %zu",
            latent, offsets[latent], at);
      for (int64_t token = 0; token < code.tokens; ++token) {
        for (int64_t entry = code.begin(token); entry < code.end(token); ++entry) {
          if (code.indices[entry] != latent || code.values[entry] == 0.0f) continue;
          const bool right = at < entries.size() && entries[at] == entry && rows[at] == token;
          check(right, "latent %ld: entry %ld is not in its place", latent, entry);
          ++at;
        }
      }
    }
    check(at == entries.size() && offsets.back() == static_cast<int64_t>(at), "entries left over");
  }

  cpu::LatentMajor view() const {
    return {offsets.data(), rows.data(), coefficients.data(),
            static_cast<int64_t>(offsets.size()) - 1};
  }

  std::vector<int64_t> offsets;
  std::vector<int32_t> entries, rows;
  std::vector<float> coefficients;
};

// Everything that a gradient is made of. Integers, and one-hot rows to project onto: exact sums.
struct Gradient {
  Gradient(Random& random, const Shape& shape, DType type)
      : shape(shape),
        problem(random, shape.tokens, random.integer(shape.most_entries / 2, shape.most_entries),
                shape.d_sae, random.integer(0, 1) == 1),
        lists(problem, shape.d_sae),
        dense(random.numbers(shape.tokens * shape.d_in, Numbers::kIntegers), type),
        shift(random.numbers(random.integer(0, 1) * shape.d_in, Numbers::kIntegers)),
        extra(random.numbers(random.integer(0, 1) * shape.d_sae * shape.d_in, Numbers::kIntegers)),
        directions(static_cast<size_t>(shape.d_sae * shape.d_in)),
        project(random.integer(0, 1) == 1) {
    for (int64_t j = 0; j < shape.d_sae; ++j) {
      directions[j * shape.d_in + random.integer(0, shape.d_in - 1)] = 1.0f;
    }
    terms.lists = lists.view();
    terms.factor = {type, dense.data(), shift.empty() ? nullptr : shift.data(), shape.tokens,
                    shape.d_in};
    terms.extra_grad = extra.empty() ? nullptr : extra.data();
    terms.project_onto = project ? directions.data() : nullptr;
    for (int64_t latent = 0; latent < shape.d_sae; ++latent) rows.push_back(sum_row(latent));
  }

  // Summed once, because several tests compare with the rows.
  const std::vector<double>& row(int64_t latent) const { return rows[latent]; }

  std::vector<double> sum_row(int64_t latent) const {
    std::vector<double> result(static_cast<size_t>(shape.d_in));
    for (int64_t d = 0; d < shape.d_in; ++d) {
      if (!extra.empty()) result[d] = extra[latent * shape.d_in + d];
      for (int64_t i = lists.offsets[latent]; i < lists.offsets[latent + 1]; ++i) {
        const double from = dense.values[lists.rows[i] * shape.d_in + d];
        result[d] += lists.coefficients[i] * (from - (shift.empty() ? 0.0f : shift[d]));
      }
      if (project && directions[latent * shape.d_in + d] == 1.0f) result[d] = 0.0;
    }
    return result;
  }

  Shape shape;
  CodeProblem problem;
  Lists lists;
  Matrix dense;
  std::vector<float> shift, extra, directions;
  bool project;
  cpu::GradientTerms terms{};
  std::vector<std::vector<double>> rows;  // of the gradient, in double
};

void test_entries(const Gradient& gradient) {
  const Lists& lists = gradient.lists;
  const auto count = static_cast<int64_t>(lists.entries.size());
  const auto numbers = static_cast<int64_t>(gradient.problem.values.size());
  std::vector<float> ordered(lists.entries.size());
  cpu::gather_entries(gradient.problem.values.data(), lists.entries.data(), count, ordered.data(),
                      four_threads());
  check(same_bits(ordered, lists.coefficients), "gather_entries: another order");
  check(cpu::in_range(lists.entries.data(), count, numbers, four_threads()),
        "in_range: an entry that is");
  for (const int64_t wrong : {int64_t{-1}, numbers}) {
    std::vector<int32_t> entries(20000, 0);
    entries[19000] = static_cast<int32_t>(wrong);
    check(!cpu::in_range(entries.data(), 20000, numbers, four_threads()),
          "in_range: an entry that is not");
  }
  std::vector<float> sums(static_cast<size_t>(gradient.shape.d_sae));
  cpu::latent_sums(lists.offsets.data(), gradient.shape.d_sae, lists.entries.data(),
                   gradient.problem.values.data(), sums.data(), four_threads());
  for (int64_t j = 0; j < gradient.shape.d_sae; ++j) {
    const float* coefficients = lists.coefficients.data();
    const float wanted =
        std::accumulate(coefficients + lists.offsets[j], coefficients + lists.offsets[j + 1], 0.0f);
    check(sums[j] == wanted, "latent_sums: latent %ld: %g, not %g", j, sums[j], wanted);
  }
}

void test_accumulate(const Gradient& gradient) {
  const Shape& shape = gradient.shape;
  const auto run = [&](const cpu::Parallel& parallel) {
    std::vector<float> rows(static_cast<size_t>(shape.d_sae * (shape.d_in + 1)));
    float* sums = rows.data() + shape.d_sae * shape.d_in;
    check(cpu::kernels().accumulate_rows(gradient.terms.lists, gradient.terms.factor, rows.data(),
                                         sums, parallel),
          "accumulate_rows: out of memory");
    return rows;
  };
  const auto one = run(one_thread());
  check(same_bits(one, run(four_threads())), "accumulate_rows depends on the number of threads");
  Gradient plain = gradient;
  plain.extra.clear();
  plain.project = false;
  for (int64_t j = 0; j < shape.d_sae; ++j) {
    const std::vector<double> wanted = plain.sum_row(j);
    for (int64_t d = 0; d < shape.d_in; ++d) {
      check(one[j * shape.d_in + d] == wanted[d], "latent %ld: row %g, not %g", j,
            one[j * shape.d_in + d], wanted[d]);
    }
  }
}

struct Cache {
  Cache(const Gradient& gradient, int64_t budget) : slots(gradient.shape.d_sae) {
    const int64_t kept =
        cpu::plan_cache(gradient.lists.offsets.data(), gradient.shape.d_sae, budget, slots.data());
    check(kept <= budget, "%ld rows kept of %ld", kept, budget);
    rows.resize(static_cast<size_t>(kept * gradient.shape.d_in));
  }
  cpu::RowCache view() { return {rows.data(), slots.data()}; }
  std::vector<float> rows;
  std::vector<int32_t> slots;
};

double test_norm(const Gradient& gradient, Cache& cache) {
  double wanted = 0.0;
  for (int64_t j = 0; j < gradient.shape.d_sae; ++j) {
    for (const double value : gradient.row(j)) wanted += value * value;
  }
  double norms[2];
  for (const bool four : {false, true}) {
    std::vector<float> sums(static_cast<size_t>(gradient.shape.d_sae));
    double& squared_norm = norms[four ? 1 : 0];
    check(cpu::kernels().gradient_norm(gradient.terms, cache.view(), sums.data(), &squared_norm,
                                       four ? four_threads() : one_thread()),
          "gradient_norm: out of memory");
    // Squares of long sums are integers that float cannot hold.
    const double tolerance = gradient.shape.tokens > 100 ? 1e-6 * wanted : 0.0;
    check(std::fabs(squared_norm - wanted) <= tolerance, "squared norm %g, not %g", squared_norm,
          wanted);
  }
  check(norms[0] == norms[1], "the norm depends on the number of threads");
  return norms[0];
}

// Weights, moments and the packed copy, all of which one update changes.
struct State {
  State(Random& random, const Gradient& gradient, cpu::Screen screen, DType rows)
      : W(gradient.project
              ? gradient.directions
              : random.numbers(gradient.shape.d_sae * gradient.shape.d_in, Numbers::kNormal)),
        exp_avg(random.numbers(static_cast<int64_t>(W.size()), Numbers::kNormal)),
        exp_avg_sq(W.size(), 0.25f),
        packed(static_cast<size_t>(
            cpu::packed_elements(screen, gradient.shape.d_in, gradient.shape.d_sae))),
        stats(static_cast<size_t>(4 * cpu::panels(gradient.shape.d_sae) * cpu::kPanelLatents)),
        rounded(rows == DType::kFloat32 ? 0 : W.size()),
        encoder{screen,
                rows,
                nullptr,
                nullptr,
                nullptr,
                nullptr,
                gradient.shape.d_sae,
                gradient.shape.d_in} {}

  cpu::PackedEncoder view() {
    cpu::PackedEncoder result = encoder;
    result.packed = packed.data();
    result.stats = stats.data();
    result.W_enc = W.data();
    result.rounded = rounded.empty() ? nullptr : rounded.data();
    return result;
  }

  std::vector<float> W, exp_avg, exp_avg_sq;
  std::vector<int32_t> packed;
  std::vector<float> stats;
  std::vector<uint16_t> rounded;
  cpu::PackedEncoder encoder;
};

constexpr double kLr = 1e-2;
constexpr int64_t kStep = 3;

UpdateScalars some_step(UpdateRule rule) {
  return {0.37f, some_update_step(some_settings(rule), kLr, kStep)};
}

State updated(State state, UpdateRule rule, const Gradient& gradient, Cache& cache,
              const cpu::Parallel& parallel) {
  cpu::RowUpdate update{};
  update.gradient = gradient.terms;
  update.gradient.project_onto = gradient.project ? state.W.data() : nullptr;
  update.cache = cache.view();
  update.rule = rule;
  update.scalars = some_step(rule);
  update.unit_norm = true;
  update.W = state.W.data();
  update.moments.exp_avg = state.exp_avg.data();  // kFloat32
  if (has_exp_avg_sq(rule)) update.moments.exp_avg_sq = state.exp_avg_sq.data();
  update.encoder = state.view();
  check(cpu::kernels().fused_update(update, parallel), "fused_update: out of memory");
  return state;
}

bool same_states(const State& a, const State& b) {
  return same_bits(a.W, b.W) && same_bits(a.exp_avg, b.exp_avg) &&
         same_bits(a.exp_avg_sq, b.exp_avg_sq) && same_bits(a.packed, b.packed) &&
         same_bits(a.rounded, b.rounded) &&
         std::equal(a.stats.begin(), a.stats.begin() + 3 * (a.stats.size() / 4), b.stats.begin());
}

void check_step(UpdateRule rule, const Gradient& gradient, const State& before,
                const State& after) {
  const int64_t d_in = gradient.shape.d_in;
  std::vector<double> weights(static_cast<size_t>(d_in)), means(weights.size());
  for (int64_t j = 0; j < gradient.shape.d_sae; ++j) {
    const std::vector<double> grad = gradient.row(j);
    if (!has_clear_signs(rule, grad)) continue;
    double norm = 0.0;
    for (int64_t d = 0; d < d_in; ++d) {
      const int64_t at = j * d_in + d;
      const DoubleWeight wanted =
          step_in_double(some_settings(rule), kLr, kStep, grad[d] * some_step(rule).grad_scale,
                         {before.W[at], before.exp_avg[at], before.exp_avg_sq[at]});
      weights[d] = wanted.weight;
      means[d] = wanted.exp_avg;
      norm += weights[d] * weights[d];
    }
    const double length = std::sqrt(norm);
    for (int64_t d = 0; d < d_in; ++d) {
      const int64_t at = j * d_in + d;
      const double wanted = weights[d] / length;
      const double mean = means[d] / (scales_with_weights(rule) ? length : 1.0);
      check(std::fabs(after.exp_avg[at] - mean) < 2e-5 * (1.0 + std::fabs(mean)),
            "latent %ld: exp_avg %g, not %g", j, after.exp_avg[at], mean);
      check(std::fabs(after.W[at] - wanted) < 2e-6, "latent %ld: weight %g, not %g", j, after.W[at],
            wanted);
    }
  }
}

void test_update(Random& random, const Gradient& gradient, Cache& cache, Cache& no_cache) {
  const std::pair<cpu::Screen, DType> kinds[] = {{cpu::Screen::kFloat, DType::kFloat32},
                                                 {cpu::Screen::kNarrow, DType::kFloat32},
                                                 {cpu::Screen::kNarrow, DType::kBFloat16},
                                                 {cpu::Screen::kNarrow, DType::kFloat16}};
  const auto [screen, rows] = kinds[random.integer(0, 3)];
  const UpdateRule rule = any_rule(random);
  const State before(random, gradient, screen, rows);
  const State after = updated(before, rule, gradient, no_cache, one_thread());
  check(same_states(after, updated(before, rule, gradient, no_cache, four_threads())),
        "fused_update depends on the number of threads");
  check(same_states(after, updated(before, rule, gradient, cache, four_threads())),
        "fused_update depends on the rows kept");
  State repacked = after;
  check(cpu::kernels().pack_encoder(repacked.view(), one_thread()), "pack_encoder: out of memory");
  check(same_states(after, repacked), "fused_update leaves an old packed copy");
  check_step(rule, gradient, before, after);
}

// Rows of unit length in double, and their lengths.
struct UnitRows {
  UnitRows(const std::vector<float>& W, const Shape& shape)
      : shape(shape), rows(W.begin(), W.end()), norms(static_cast<size_t>(shape.d_sae)) {
    for (int64_t j = 0; j < shape.d_sae; ++j) {
      norms[j] = std::sqrt(dot(j, j));
      for (int64_t d = 0; d < shape.d_in; ++d) rows[j * shape.d_in + d] /= norms[j];
    }
  }
  double dot(int64_t i, int64_t j) const {
    const double* row = rows.data();
    return std::inner_product(row + i * shape.d_in, row + (i + 1) * shape.d_in,
                              row + j * shape.d_in, 0.0);
  }
  Shape shape;
  std::vector<double> rows, norms;
};

void test_normalize(const std::vector<float>& W, const UnitRows& unit) {
  const Shape& shape = unit.shape;
  std::vector<float> rows = W;
  check(cpu::kernels().normalize_rows(rows.data(), shape.d_sae, shape.d_in, four_threads()),
        "normalize_rows: out of memory");
  for (size_t i = 0; i < rows.size(); ++i) {
    check(std::fabs(rows[i] - unit.rows[i]) < 1e-6, "element %zu of unit rows is %g, not %g", i,
          rows[i], unit.rows[i]);
  }
}

void test_decorrelation(const std::vector<float>& W, const UnitRows& unit) {
  const Shape& shape = unit.shape;
  const auto run = [&](const cpu::Parallel& parallel) {
    std::vector<float> grad(W.size());
    double loss = -1.0;
    check(cpu::kernels().decorrelation(W.data(), shape.d_sae, shape.d_in, &loss, grad.data(),
                                       parallel),
          "decorrelation: out of memory");
    return std::pair{loss, grad};
  };
  const auto [loss, grad] = run(one_thread());
  const auto [other_loss, other_grad] = run(four_threads());
  check(loss == other_loss && same_bits(grad, other_grad),
        "decorrelation depends on the number of threads");
  double wanted = 0.0;
  for (int64_t j = 0; j < shape.d_sae; ++j) {
    // The gradient before its part along the row is taken off: 4 / |w| times the sum of cos * row.
    std::vector<double> row(static_cast<size_t>(shape.d_in));
    double along = 0.0;
    for (int64_t i = 0; i < shape.d_sae; ++i) {
      const double cosine = i == j ? 0.0 : unit.dot(i, j);
      along += cosine * cosine;
      for (int64_t d = 0; d < shape.d_in; ++d) row[d] += cosine * unit.rows[i * shape.d_in + d];
    }
    wanted += along;
    const double scale = 4.0 / unit.norms[j];
    for (int64_t d = 0; d < shape.d_in; ++d) {
      const int64_t at = j * shape.d_in + d;
      const double exact = scale * (row[d] - along * unit.rows[at]);
      check(std::fabs(grad[at] - exact) < 2e-6 * scale * (along + 1.0),
            "latent %ld: gradient %g of decorrelation, not %g", j, grad[at], exact);
    }
  }
  const double all_pairs = wanted + static_cast<double>(shape.d_sae);
  check(std::fabs(loss - wanted) < 1e-5 * all_pairs, "decorrelation %g, not %g", loss, wanted);
}

}  // namespace

void test_rows(uint64_t seed) {
  Random random(seed);
  const Shape shape = any_shape(random, seed);
  for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const Gradient gradient(random, shape, type);
    test_entries(gradient);
    test_accumulate(gradient);
    Cache cache(gradient, random.integer(0, shape.d_sae));
    Cache no_cache(gradient, 0);
    const double norm = test_norm(gradient, no_cache);
    check(std::fabs(test_norm(gradient, cache) - norm) <= 1e-6 * norm,
          "the norm depends on the rows kept");
    test_update(random, gradient, cache, no_cache);
  }
  const std::vector<float> W = random.numbers(shape.d_sae * shape.d_in, Numbers::kNormal);
  const UnitRows unit(W, shape);
  test_normalize(W, unit);
  test_decorrelation(W, unit);
}

}  // namespace sae_fast::testing
