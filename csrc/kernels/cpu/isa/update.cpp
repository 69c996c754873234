// The optimizer's kernels at one instruction set: gradients of weight rows are built from their
// factors and used at once, so that no gradient of the size of the weights exists. Sums run in the
// order of the entries, in strips as in whole rows, and sums over rows in the order of the rows:
// the bits do not depend on the threads.
#include "kernels/cpu/isa/gather.h"
#include "kernels/cpu/isa/kernels.h"
#include "kernels/cpu/isa/latent_strips.h"
#include "kernels/cpu/isa/pack.h"
#include "kernels/cpu/isa/tasks.h"
#include "kernels/cpu/isa/update_rule.h"

namespace sae_fast::SAE_FAST_ISA {
namespace {

constexpr int64_t kRowsPerTask = 16;  // as many as pack_sixteen packs

// Calls function(thread, first, end) for runs of 16 rows; threads take the next run as they get
// free, because lists of latents are heavy-tailed.
template <class Function>
void for_each_sixteen(int64_t rows, const cpu::Parallel& parallel, Function&& function) {
  SharedLoop loop(rows, kRowsPerTask);
  parallel.for_each(parallel.threads(), [&](int64_t thread) {
    for (int64_t first; loop.take(first);) function(thread, first, loop.end(first));
  });
}

float list_sum(const cpu::LatentMajor& lists, int64_t latent) {
  float sum = 0.0f;
  for (int64_t i = lists.offsets[latent]; i < lists.offsets[latent + 1]; ++i) {
    sum += lists.coefficients[i];
  }
  return sum;
}

// to += scale * from.
void add_scaled(float* to, const float* from, float scale, int64_t size) {
  const Vec factor = broadcast(scale);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load(to + i) + factor * load(from + i));
  for (; i < size; ++i) to[i] += scale * from[i];
}

// row = the sum over entries [begin, end) of the lists.
void add_entries(const cpu::GradientTerms& terms, int64_t begin, int64_t end, float* row) {
  const cpu::LatentMajor& lists = terms.lists;
  with_element(terms.factor.type, [&](auto element) {
    gather_sum(static_cast<const decltype(element)*>(terms.factor.dense), terms.factor.d_in,
               lists.rows + begin, lists.coefficients + begin, end - begin, nullptr, row);
    return true;
  });
}

// Adds the parts of a row's gradient beside the sum over its entries and the projection.
void finish_gradient(const cpu::GradientTerms& terms, int64_t latent, float* row) {
  const int64_t d_in = terms.factor.d_in;
  const cpu::LatentMajor& lists = terms.lists;
  if (terms.factor.shift != nullptr) {
    const float sum = list_sum(lists, latent);
    add_scaled(row, terms.factor.shift, -sum, d_in);
    if (std::isfinite(sum)) {
      for (int64_t i = 0; i < terms.still_count; ++i) row[terms.still_columns[i]] = 0.0f;
    }
  }
  if (terms.extra_grad != nullptr) add_scaled(row, terms.extra_grad + latent * d_in, 1.0f, d_in);
}

// Removes the part of a row's gradient along the direction of the row, where there is one.
void project(const cpu::GradientTerms& terms, int64_t latent, float* row) {
  if (terms.project_onto == nullptr) return;
  const int64_t d_in = terms.factor.d_in;
  const float* direction = terms.project_onto + latent * d_in;
  add_scaled(row, direction, -dot(row, direction, d_in), d_in);
}

// Finds the columns where no token differs from the shift; one look at a token is nearly always
// enough to see that there are none. Returns false if `memory` could not be allocated.
bool find_still_columns(cpu::GradientTerms& terms, Scratch& memory) {
  const float* const shift = terms.factor.shift;
  const int64_t d_in = terms.factor.d_in;
  if (shift == nullptr || terms.factor.tokens == 0) return true;
  if (!memory.reset(d_in * 4)) return false;
  auto* const columns = memory.as<int32_t>();
  int64_t count = 0;
  for (int64_t i = 0; i < d_in; ++i) {
    columns[count] = static_cast<int32_t>(i);
    count += std::isfinite(shift[i]) ? 1 : 0;
  }
  with_element(terms.factor.type, [&](auto element) {
    const auto* row = static_cast<const decltype(element)*>(terms.factor.dense);
    for (int64_t token = 0; token < terms.factor.tokens && count > 0; ++token, row += d_in) {
      int64_t kept = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int32_t column = columns[i];
        columns[kept] = column;
        kept += to_float(row[column]) == shift[column] ? 1 : 0;
      }
      count = kept;
    }
    return true;
  });
  terms.still_columns = columns;
  terms.still_count = count;
  return true;
}

// The gradient of row `latent`, before the clip.
void gradient_row(const cpu::GradientTerms& terms, int64_t latent, float* row) {
  const int64_t begin = terms.lists.offsets[latent];
  add_entries(terms, begin, terms.lists.offsets[latent + 1], row);
  finish_gradient(terms, latent, row);
  project(terms, latent, row);
}

bool has_gradient(const cpu::GradientTerms& terms, int64_t latent) {
  return terms.extra_grad != nullptr ||
         terms.lists.offsets[latent] != terms.lists.offsets[latent + 1];
}

// Divides a row by max(|row|, 1e-12), which it returns.
float normalize_row(float* row, int64_t d_in) {
  const float norm = std::sqrt(dot(row, row, d_in));
  const float divisor = norm > 1e-12f ? norm : 1e-12f;
  divide_row(row, divisor, d_in);
  return divisor;
}

template <UpdateRule kRule>
void update_row(const cpu::RowUpdate& update, int64_t latent, float* scratch, float* held) {
  const int64_t d_in = update.gradient.factor.d_in;
  const float* grad = nullptr;
  if (has_gradient(update.gradient, latent)) {
    const int32_t slot = update.cache.slots[latent];
    grad = slot >= 0 ? update.cache.rows + slot * d_in : scratch;
    if (slot < 0) gradient_row(update.gradient, latent, scratch);
  }
  float* weight = update.W + latent * d_in;
  if constexpr (scales_with_weights(kRule)) {
    update_scaled_weights<kRule>(update.scalars, grad, d_in, latent, update.moments, weight, held,
                                 [&](float* moments, int64_t size) {
                                   if (!update.unit_norm) return;
                                   divide_row(moments, normalize_row(weight, d_in), size);
                                 });
  } else {
    update_weights<kRule>(update.scalars, grad, d_in, latent, update.moments, weight);
    if (update.unit_norm) normalize_row(weight, d_in);
  }
}

// Refreshes the copies of rows [first, end) while the rows are in the cache.
void refresh_copies(const cpu::PackedEncoder& encoder, int64_t first, int64_t end, float* scratch) {
  if (encoder.packed != nullptr) {
    pack_sixteen(encoder, first, reinterpret_cast<int32_t*>(scratch));
  } else if (encoder.rounded != nullptr) {
    for (int64_t latent = first; latent < end; ++latent) round_row(encoder, latent, scratch);
  }
}

}  // namespace

bool accumulate_rows(const cpu::LatentMajor& lists, const cpu::DenseFactor& factor, float* rows,
                     float* sums, const cpu::Parallel& parallel) {
  cpu::GradientTerms terms{};
  terms.lists = lists;
  terms.factor = factor;
  const bool in_strips = strips_pay(terms);
  for_each_sixteen(lists.d_sae, parallel, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t latent = first; latent < end; ++latent) {
      if (!in_strips) gradient_row(terms, latent, rows + latent * factor.d_in);
      sums[latent] = list_sum(lists, latent);
    }
  });
  if (!in_strips) return true;
  const StripPlan plan(factor.tokens, factor.d_in);
  return gradients_in_strips(terms, plan, sums, {rows, nullptr}, nullptr, false, parallel);
}

bool gradient_norm(const cpu::GradientTerms& given, const cpu::RowCache& cache, float* sums,
                   double* squared_norm, const cpu::Parallel& parallel) {
  cpu::GradientTerms terms = given;
  Scratch columns;
  if (!find_still_columns(terms, columns)) return false;
  const int64_t d_in = terms.factor.d_in;
  const int64_t d_sae = terms.lists.d_sae;
  const StripPlan plan(terms.factor.tokens, d_in);
  const bool in_strips = strips_pay(terms);
  Scratch spare(parallel.threads() * d_in * 4);
  Scratch norms(d_sae * 8);
  Scratch squares(in_strips ? plan.strips * d_sae * 4 : 0);
  if (!spare || !norms || !squares) return false;
  for_each_sixteen(d_sae, parallel, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t latent = first; latent < end; ++latent) {
      sums[latent] = list_sum(terms.lists, latent);
    }
  });
  const GradientRows kept{cache.rows, cache.slots};
  const bool projects = terms.project_onto != nullptr;
  if (in_strips &&
      !gradients_in_strips(terms, plan, sums, kept, squares.as<float>(), projects, parallel)) {
    return false;
  }
  auto* const norm = norms.as<double>();
  for_each_sixteen(d_sae, parallel, [&](int64_t thread, int64_t first, int64_t end) {
    for (int64_t latent = first; latent < end; ++latent) {
      norm[latent] = 0.0;
      if (!has_gradient(terms, latent)) continue;
      if (in_strips && !projects) {
        for (int64_t strip = 0; strip < plan.strips; ++strip) {
          norm[latent] += squares.as<float>()[strip * d_sae + latent];
        }
        continue;
      }
      float* row = kept.at(latent, d_in);
      if (in_strips && row != nullptr) {
        project(terms, latent, row);
      } else {
        if (row == nullptr) row = spare.as<float>() + thread * d_in;
        gradient_row(terms, latent, row);
      }
      norm[latent] = static_cast<double>(dot(row, row, d_in));
    }
  });
  *squared_norm = 0.0;
  for (int64_t latent = 0; latent < d_sae; ++latent) *squared_norm += norm[latent];
  return true;
}

bool fused_update(const cpu::RowUpdate& given, const cpu::Parallel& parallel) {
  cpu::RowUpdate update = given;
  Scratch columns;
  if (!find_still_columns(update.gradient, columns)) return false;
  const int64_t d_in = update.gradient.factor.d_in;
  const int64_t row_bytes = (d_in * 4 + 63) / 64 * 64;
  const int64_t pack_bytes = (pack_scratch_bytes(update.encoder) + 63) / 64 * 64;
  const int64_t shared_bytes = row_bytes > pack_bytes ? row_bytes : pack_bytes;
  const int64_t bytes = shared_bytes + 4 * held_floats(update.rule, update.moments.type, d_in);
  Scratch scratch(parallel.threads() * bytes);
  if (!scratch) return false;
  // In whole panels, so that the padding of the last one is written too.
  const int64_t rows = update.gradient.lists.d_sae;
  const int64_t padded = update.encoder.packed != nullptr ? cpu::panels(rows) * kPanel : rows;
  with_rule(update.rule, [&](auto rule) {
    for_each_sixteen(padded, parallel, [&](int64_t thread, int64_t first, int64_t end) {
      auto* own = scratch.as<float>(thread * bytes);
      for (int64_t latent = first; latent < (end < rows ? end : rows); ++latent) {
        update_row<decltype(rule)::value>(update, latent, own, own + shared_bytes / 4);
      }
      refresh_copies(update.encoder, first, end < rows ? end : rows, own);
    });
  });
  return true;
}

void update_vector(const cpu::VectorUpdate& update, const cpu::Parallel& parallel) {
  constexpr int64_t kPart = 4096;
  with_rule(update.rule, [&](auto rule) {
    parallel.for_each((update.size + kPart - 1) / kPart, [&](int64_t part) {
      const int64_t first = part * kPart;
      const int64_t rest = update.size - first;
      update_floats<decltype(rule)::value>(
          *update.scalars, update.grad != nullptr ? update.grad + first : nullptr,
          rest < kPart ? rest : kPart, update.w + first, update.exp_avg + first,
          update.exp_avg_sq != nullptr ? update.exp_avg_sq + first : nullptr);
    });
  });
}

bool normalize_rows(float* W, int64_t d_sae, int64_t d_in, const cpu::Parallel& parallel) {
  for_each_sixteen(d_sae, parallel, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) normalize_row(W + row * d_in, d_in);
  });
  return true;
}

}  // namespace sae_fast::SAE_FAST_ISA
