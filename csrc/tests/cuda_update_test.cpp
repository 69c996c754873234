// The optimiser's kernels, compiled for the host (the row sums they build on come with
// cuda_rows_test.cpp).
#include "kernels/cuda/scalars.cu"
#include "kernels/cuda/update/gradient_norm.cu"
#include "kernels/cuda/update/step.cu"
#include "kernels/cuda/update/step_adam_bfloat16.cu"
#include "kernels/cuda/update/step_adam_float32.cu"
#include "kernels/cuda/update/step_adam_uint8.cu"
#include "kernels/cuda/update/step_schedule_free_bfloat16.cu"
#include "kernels/cuda/update/step_schedule_free_float32.cu"
#include "kernels/cuda/update/step_schedule_free_uint8.cu"
#include "kernels/cuda/update/step_sgd_bfloat16.cu"
#include "kernels/cuda/update/step_sgd_float32.cu"
#include "kernels/cuda/update/step_sgd_uint8.cu"
#include "kernels/cuda/update/step_signum_bfloat16.cu"
#include "kernels/cuda/update/step_signum_float32.cu"
#include "kernels/cuda/update/step_signum_uint8.cu"
#include "tests/cuda_nodes.h"
#include "tests/moment_codes.h"
#include "tests/update_formulas.h"

namespace sae_fast::testing {
namespace {

constexpr double kLr = 1e-3;
constexpr int64_t kStep = 7;
constexpr UpdateScalars kNoStep = {NAN, {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN}};

UpdateScalars some_step(UpdateRule rule) {
  return {0.37f, some_update_step(some_settings(rule), kLr, kStep)};
}

struct UpdateProblem {
  explicit UpdateProblem(Random& random)
      : UpdateProblem(random, random.integer(0, 1) == 0 ? random.integer(1, 9)
                                                        : 4 * random.integer(1, 280)) {}

  UpdateProblem(Random& random, int64_t width)
      : d_in(width),
        d_sae(random.integer(1, 9)),
        tokens(random.integer(1, 40)),
        room(random.integer(0, 2) * 350),
        dense(random.numbers(tokens * d_in, Numbers::kNormal), any_type(random)),
        shift(random.numbers(d_in, Numbers::kNormal)),
        extra_grad(random.numbers(d_sae * d_in, Numbers::kNormal)),
        W(random.numbers(d_sae * d_in, Numbers::kNormal)),
        exp_avg(random.numbers(d_sae * d_in, Numbers::kNormal)),
        exp_avg_sq(random.numbers(d_sae * d_in, Numbers::kNormal)),
        coefficients(random.numbers(room, Numbers::kNormal)),
        project(random.integer(0, 1) == 1),
        unit_norm(random.integer(0, 1) == 1),
        with_shift(random.integer(0, 1) == 1),
        with_extra(random.integer(0, 1) == 1),
        with_stats(random.integer(0, 1) == 1),
        rule(any_rule(random)),
        copy(any_type(random)) {
    for (float& square : exp_avg_sq) square = std::fabs(square);
    for (int64_t j = 0; j < d_sae; ++j) make_unit(j);
    // Not all of the room is in use, one latent has half of it, and some have none.
    for (int64_t j = 0; j < d_sae; ++j) {
      const int64_t most = j == 1 ? room / 2 : random.integer(0, 1) * 2 * room / d_sae;
      const int64_t left = room - latent_offsets.back();
      latent_offsets.push_back(latent_offsets.back() + std::min(random.integer(0, most), left));
    }
    for (int64_t p = 0; p < room; ++p) {
      rows.push_back(static_cast<int32_t>(random.integer(0, tokens - 1)));
    }
    cache = plan_row_cache(room, tokens);
  }

  void make_unit(int64_t j) {
    double square = 0.0;
    for (int64_t i = j * d_in; i < (j + 1) * d_in; ++i) square += std::pow(at(W, i), 2);
    for (int64_t i = j * d_in; i < (j + 1) * d_in; ++i) {
      W[static_cast<size_t>(i)] = static_cast<float>(at(W, i) / std::sqrt(square));
    }
  }

  template <class T>
  static double at(const std::vector<T>& numbers, int64_t i) {
    return static_cast<double>(numbers[static_cast<size_t>(i)]);
  }

  int64_t count(int64_t j) const {
    return latent_offsets[static_cast<size_t>(j) + 1] - latent_offsets[static_cast<size_t>(j)];
  }

  cuda::GradientFactors factors() const {
    return {{latent_offsets.data(), rows.data(), coefficients.data(), d_sae, room},
            typed(dense),
            with_shift ? shift.data() : nullptr,
            with_extra ? extra_grad.data() : nullptr,
            d_in};
  }

  // Row j of the gradient in double.
  std::vector<double> gradient(int64_t j) const {
    std::vector<double> row(static_cast<size_t>(d_in));
    double along = 0.0;
    for (int64_t column = 0; column < d_in; ++column) {
      double sum = with_extra ? at(extra_grad, j * d_in + column) : 0.0;
      for (int64_t p = latent_offsets[static_cast<size_t>(j)];
           p < latent_offsets[static_cast<size_t>(j) + 1]; ++p) {
        const int64_t n = rows[static_cast<size_t>(p)];
        sum += at(coefficients, p) *
               (at(dense.values, n * d_in + column) - (with_shift ? at(shift, column) : 0.0));
      }
      row[static_cast<size_t>(column)] = sum;
      along += sum * at(W, j * d_in + column);
    }
    for (int64_t column = 0; project && column < d_in; ++column) {
      row[static_cast<size_t>(column)] -= along * at(W, j * d_in + column);
    }
    return row;
  }

  int64_t d_in, d_sae, tokens, room;
  Matrix dense;
  std::vector<float> shift, extra_grad, W, exp_avg, exp_avg_sq, coefficients;
  bool project, unit_norm, with_shift, with_extra, with_stats;
  UpdateRule rule;
  DType copy;  // the rounded copy's type; kFloat: none
  std::vector<int64_t> latent_offsets = {0};
  std::vector<int32_t> rows;
  RowCache cache{};
};

struct NormResult {
  explicit NormResult(const UpdateProblem& problem)
      : sums(stale(problem.d_sae, 777.0f)),
        cached(stale(problem.cache.rows * problem.d_in, 777.0f)),
        slots(stale(problem.d_sae, int32_t{-9})) {}

  double squared_norm = -1.0;
  std::vector<float> sums, cached;
  std::vector<int32_t> slots;
};

NormResult test_norm(const UpdateProblem& problem) {
  NormResult result(problem);
  size_t bytes = 0;
  check_success(
      cuda::row_gradient_norm_scratch_bytes(problem.room, problem.d_sae, problem.d_in, &bytes),
      "row_gradient_norm");
  TestScratch scratch(bytes);
  check_nodes("row_gradient_norm", [&] {
    return cuda::row_gradient_norm(problem.factors(), problem.cache,
                                   problem.project ? problem.W.data() : nullptr,
                                   &result.squared_norm, result.sums.data(), result.cached.data(),
                                   result.slots.data(), scratch.data(), nullptr);
  });
  double squared_norm = 0.0;
  int32_t next_slot = 0;
  for (int64_t j = 0; j < problem.d_sae; ++j) {
    for (const double g : problem.gradient(j)) squared_norm += g * g;
    double sum = 0.0;
    for (int64_t p = problem.latent_offsets[static_cast<size_t>(j)];
         p < problem.latent_offsets[static_cast<size_t>(j) + 1]; ++p) {
      sum += UpdateProblem::at(problem.coefficients, p);
    }
    check_near("row_gradient_norm: sums", result.sums[static_cast<size_t>(j)], sum, 1e-5);
    const int32_t slot = problem.count(j) > problem.cache.above ? next_slot++ : -1;
    check_near("row_gradient_norm: slot", result.slots[static_cast<size_t>(j)], slot, 0.0);
  }
  check_near("row_gradient_norm: squared_norm", result.squared_norm, squared_norm, 1e-5);
  return result;
}

// The arrays that fused_update changes.
struct UpdateResult {
  explicit UpdateResult(const UpdateProblem& problem)
      : W(problem.W),
        m(problem.exp_avg),
        v(problem.exp_avg_sq),
        copy(stale(problem.d_sae * problem.d_in, uint16_t{0x7777})),
        stats(stale(2 * problem.d_sae, 777.0f)) {}

  std::vector<float> W, m, v;
  std::vector<uint16_t> copy;
  std::vector<float> stats;
};

// The moments are `codes` where these are given.
UpdateResult updated(const UpdateProblem& problem, const NormResult& norm,
                     const UpdateScalars& scalars, MomentCodes* codes = nullptr) {
  UpdateResult result(problem);
  const bool rounds = problem.copy != DType::kFloat32;
  cuda::RowState state{};
  state.W = result.W.data();
  state.moments.exp_avg = result.m.data();  // kFloat32
  if (has_exp_avg_sq(problem.rule)) state.moments.exp_avg_sq = result.v.data();
  if (codes != nullptr) state.moments = codes->view();
  if (rounds) state.rounded = result.copy.data();
  state.rounded_type = problem.copy;
  if (rounds && problem.with_stats) state.stats = result.stats.data();
  check_nodes("fused_update_", [&] {
    return cuda::fused_update(problem.factors(), state, norm.cached.data(), norm.slots.data(),
                              problem.rule, &scalars, problem.project, problem.unit_norm, nullptr);
  });
  return result;
}

// The rounded copy has the weights, and its stats bound the rows' lengths closely.
void check_copy(const UpdateProblem& problem, const UpdateResult& result) {
  if (problem.copy == DType::kFloat32) return;
  for (int64_t j = 0; j < problem.d_sae; ++j) {
    double square = 0.0, lost = 0.0;
    for (int64_t i = j * problem.d_in; i < (j + 1) * problem.d_in; ++i) {
      const float w = result.W[static_cast<size_t>(i)];
      const uint16_t bits = rounded_bits(w, problem.copy);
      check(result.copy[static_cast<size_t>(i)] == bits, "fused_update: rounded copy of %g",
            static_cast<double>(w));
      const float copy =
          problem.copy == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
      square += std::pow(static_cast<double>(w), 2);
      lost += std::pow(static_cast<double>(w) - static_cast<double>(copy), 2);
    }
    if (!problem.with_stats) continue;
    const double lengths[] = {std::sqrt(square), std::sqrt(lost)};
    for (int64_t row = 0; row < 2; ++row) {
      const double bound = UpdateProblem::at(result.stats, row * problem.d_sae + j);
      // It allows for the roundings of a sum of d_in squares.
      const double share = 1.0002 + static_cast<double>(problem.d_in) * 0x1p-24;
      check(bound >= lengths[row] && bound <= share * lengths[row] + 1e-20,
            "fused_update: bound %.9g of length %.9g", bound, lengths[row]);
    }
  }
}

void test_no_update(const UpdateProblem& problem, const NormResult& norm) {
  const UpdateResult before(problem);
  const UpdateResult after = updated(problem, norm, kNoStep);
  check(same_bits(before.W, after.W) && same_bits(before.m, after.m) &&
            same_bits(before.v, after.v) && same_bits(before.copy, after.copy) &&
            same_bits(before.stats, after.stats),
        "fused_update: a step without a scale changed something");
}

void test_update(const UpdateProblem& problem, const NormResult& norm) {
  const UpdateScalars scalars = some_step(problem.rule);
  const UpdateResult result = updated(problem, norm, scalars);
  const auto& [W, m, v, copy, stats] = result;
  for (int64_t j = 0; j < problem.d_sae; ++j) {
    const std::vector<double> gradient = problem.gradient(j);
    if (!has_clear_signs(problem.rule, gradient)) continue;
    std::vector<double> row, means;
    double square = 0.0;
    for (int64_t column = 0; column < problem.d_in; ++column) {
      const int64_t i = j * problem.d_in + column;
      const double g = gradient[static_cast<size_t>(column)] * scalars.grad_scale;
      const DoubleWeight wanted =
          step_in_double(some_settings(problem.rule), kLr, kStep, g,
                         {UpdateProblem::at(problem.W, i), UpdateProblem::at(problem.exp_avg, i),
                          UpdateProblem::at(problem.exp_avg_sq, i)});
      means.push_back(wanted.exp_avg);
      check_near("fused_update: exp_avg_sq", v[static_cast<size_t>(i)], wanted.exp_avg_sq, 1e-5);
      row.push_back(wanted.weight);
      square += row.back() * row.back();
    }
    const double length = problem.unit_norm ? std::max(std::sqrt(square), 1e-12) : 1.0;
    const double mean_length = scales_with_weights(problem.rule) ? length : 1.0;
    for (int64_t column = 0; column < problem.d_in; ++column) {
      const auto at = static_cast<size_t>(j * problem.d_in + column);
      check_near("fused_update: exp_avg", m[at], means[static_cast<size_t>(column)] / mean_length,
                 1e-5);
      check_near("fused_update: W", W[at], row[static_cast<size_t>(column)] / length, 1e-5);
    }
  }
  check_copy(problem, result);
}

// With moments in 16 and 8 bits: the same update of the floats that they stand for, whose moments
// are then rounded as the host rounds them.
void test_codes(UpdateProblem problem, const NormResult& norm) {
  for (const DType type : {DType::kBFloat16, DType::kUInt8}) {
    MomentCodes codes(problem.rule, type, problem.d_sae, problem.d_in);
    codes.encode(problem.exp_avg, problem.exp_avg_sq, kStep - 1);
    codes.decode(problem.exp_avg, problem.exp_avg_sq);
    for (const UpdateScalars& scalars : {kNoStep, some_step(problem.rule)}) {
      MomentCodes wanted = codes;
      const UpdateResult floats = updated(problem, norm, scalars);
      if (std::isfinite(scalars.grad_scale)) wanted.encode(floats.m, floats.v, kStep);
      MomentCodes result = codes;
      result.step = kStep;
      const UpdateResult rounded = updated(problem, norm, scalars, &result);
      check(same_bits(rounded.W, floats.W) && same_bits(rounded.copy, floats.copy) &&
                same_bits(rounded.stats, floats.stats),
            "fused_update: the weights depend on how the moments are kept");
      check(result.same_as(wanted), "fused_update: codes of moments");
    }
  }
}

// Both kernels of scalars.cu against the same functions on the host.
void test_scalars(Random& random) {
  UpdateSettings settings = some_settings(any_rule(random));
  settings.grad_clip = random.integer(0, 1) * 0.5;
  settings.skip_overflow = random.integer(0, 1) == 1;
  const double norms[] = {0.0, 0.04, 9.0, 1e90, HUGE_VAL, std::nan("")};
  UpdateInputs inputs{norms[random.integer(0, 5)], kLr, random.integer(0, 1) ? 1.0f : 4.0f};
  const float scale = inputs.loss_scale, fault = 0.0f;
  const std::vector<float> losses = {random.integer(0, 2) == 0 ? NAN : 3.0f, HUGE_VALF};
  const bool has_fault = random.integer(0, 1) == 1, has_losses = random.integer(0, 1) == 1;
  if (has_losses) inputs.loss_scale += 0.0f * losses[0];
  int64_t step_count = random.integer(0, 9), halted = random.integer(0, 3) == 0 ? 2 : -1;
  int64_t wanted_count = step_count, wanted_halted = halted;
  double lr_squares = 3e-6, wanted_squares = lr_squares;
  const bool averages = settings.rule == UpdateRule::kScheduleFreeSignum;
  float norm = -1.0f;
  UpdateScalars scalars{}, wanted{};
  check_nodes("update_scalars", [&] {
    return cuda::compute_update_scalars(
        settings,
        {&inputs.squared_norm, &inputs.lr, &scale, has_fault ? &fault : nullptr,
         has_losses ? losses.data() : nullptr, &step_count, &halted,
         averages ? &lr_squares : nullptr, &norm, &scalars},
        nullptr);
  });
  const float wanted_norm = update_scalars(settings, inputs, wanted_count, wanted_halted,
                                           averages ? &wanted_squares : nullptr, wanted);
  check(same(norm, wanted_norm) && step_count == wanted_count && halted == wanted_halted &&
            lr_squares == wanted_squares && std::memcmp(&scalars, &wanted, sizeof wanted) == 0,
        "update_scalars: norm %g, step %ld", static_cast<double>(norm),
        static_cast<long>(step_count));
}

// Widths at which the rows of a block are just below what it gets without asking for more.
void test_wide(uint64_t seed) {
  Random random(seed);
  emulated_cuda::device = {};
  for (const int64_t width : {3072, 4096, 6144, 12288}) {
    for (const UpdateRule rule : kRules) {
      UpdateProblem problem(random, width);
      problem.rule = rule;
      problem.project = true;
      emulated_cuda::allowed_shared_bytes().clear();
      const NormResult norm = test_norm(problem);
      test_update(problem, norm);
      test_codes(problem, norm);
    }
  }
}

void test_vector(Random& random) {
  const int64_t first = random.integer(0, 700), size = first + random.integer(0, 2) * 40;
  const auto grad = random.numbers(random.integer(0, 1) * size, Numbers::kNormal);
  const auto w = random.numbers(size, Numbers::kNormal), m = random.numbers(size, Numbers::kNormal);
  const std::vector<float> v(static_cast<size_t>(size), 0.25f);
  const UpdateRule rule = any_rule(random);
  for (const UpdateScalars& scalars : {some_step(rule), kNoStep}) {
    auto new_w = w, new_m = m, new_v = v;
    check_nodes("update_vector_", [&] {
      const auto part = [&](int64_t begin, int64_t end) {
        return cuda::VectorState{grad.empty() ? nullptr : grad.data() + begin, new_w.data() + begin,
                                 new_m.data() + begin,
                                 has_exp_avg_sq(rule) ? new_v.data() + begin : nullptr,
                                 end - begin};
      };
      return cuda::update_vectors(rule, &scalars, part(0, first), part(first, size), nullptr);
    });
    for (size_t i = 0; i < w.size(); ++i) {
      DoubleWeight wanted{w[i], m[i], v[i]};
      if (std::isfinite(scalars.grad_scale)) {
        const double g = grad.empty() ? 0.0 : static_cast<double>(grad[i]) * scalars.grad_scale;
        wanted = step_in_double(some_settings(rule), kLr, kStep, g, wanted);
      }
      check_near("update_vector: w", new_w[i], wanted.weight, 1e-6);
      check_near("update_vector: exp_avg", new_m[i], wanted.exp_avg, 1e-6);
      check_near("update_vector: exp_avg_sq", new_v[i], wanted.exp_avg_sq, 1e-6);
    }
  }
}

}  // namespace

void test_cuda_update(uint64_t seed) {
  Random random(seed);
  const UpdateProblem problem(random);
  const NormResult norm = test_norm(problem);
  test_update(problem, norm);
  test_no_update(problem, norm);
  test_codes(problem, norm);
  test_scalars(random);
  test_vector(random);
  if (seed == 0) test_wide(seed);
}

}  // namespace sae_fast::testing
