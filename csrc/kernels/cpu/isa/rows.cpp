// Row kernels at one instruction set: the gradient of one weight row at a time, built from the
// factors in registers and used at once, so that no gradient of the size of the weights exists.
// A row belongs to one thread and its sums run in entry order: bits do not depend on the threads.
#include "kernels/cpu/isa/rows.h"

#include "kernels/cpu/isa/gather.h"
#include "kernels/cpu/isa/pack.h"

namespace sae_fast::SAE_FAST_ISA {
namespace {

constexpr int64_t kRowsPerTask = 16;  // what pack_sixteen takes

// Calls function(thread, first, end) for runs of 16 rows; threads take the next run as they get
// free, because lists of latents are heavy-tailed.
template <class Function>
void for_each_sixteen(int64_t rows, const cpu::Parallel& parallel, Function&& function) {
  int64_t next = 0;
  parallel.for_each(parallel.threads(), [&](int64_t thread) {
    for (;;) {
      const int64_t first = __atomic_fetch_add(&next, kRowsPerTask, __ATOMIC_RELAXED);
      if (first >= rows) return;
      const int64_t end = first + kRowsPerTask;
      function(thread, first, end < rows ? end : rows);
    }
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

// The gradient of row `latent`, before the clip.
void gradient_row(const cpu::GradientTerms& terms, int64_t latent, float* row) {
  const int64_t d_in = terms.factor.d_in;
  const cpu::LatentMajor& lists = terms.lists;
  const int64_t begin = lists.offsets[latent];
  with_element(terms.factor.type, [&](auto element) {
    gather_sum(static_cast<const decltype(element)*>(terms.factor.dense), d_in, lists.rows + begin,
               lists.coefficients + begin, lists.offsets[latent + 1] - begin, nullptr, row);
    return true;
  });
  if (terms.factor.shift != nullptr) {
    add_scaled(row, terms.factor.shift, -list_sum(lists, latent), d_in);
  }
  if (terms.extra_grad != nullptr) add_scaled(row, terms.extra_grad + latent * d_in, 1.0f, d_in);
  if (terms.project_onto != nullptr) {
    const float* direction = terms.project_onto + latent * d_in;
    add_scaled(row, direction, -dot(row, direction, d_in), d_in);
  }
}

bool has_gradient(const cpu::GradientTerms& terms, int64_t latent) {
  return terms.extra_grad != nullptr ||
         terms.lists.offsets[latent] != terms.lists.offsets[latent + 1];
}

// Divides a row by max(|row|, 1e-12).
void normalize_row(float* row, int64_t d_in) {
  const float norm = std::sqrt(dot(row, row, d_in));
  const float divisor = norm > 1e-12f ? norm : 1e-12f;
  const Vec divisors = broadcast(divisor);
  int64_t i = 0;
  for (; i + kLanes <= d_in; i += kLanes) store(row + i, load(row + i) / divisors);
  for (; i < d_in; ++i) row[i] /= divisor;
}

// Adam on a row; `grad` null stands for zeros.
void adam_row(const AdamStep& adam, const float* grad, float scale, int64_t d_in, float* weight,
              float* exp_avg, float* exp_avg_sq) {
  const Vec beta2 = broadcast(adam.beta2);
  const Vec rest1 = broadcast(adam.one_minus_beta1);
  const Vec rest2 = broadcast(adam.one_minus_beta2);
  const Vec step = broadcast(adam.step_size);
  const Vec correction = broadcast(1.0f / adam.sqrt_bias_correction2);
  const Vec eps = broadcast(adam.eps);
  const Vec decay = broadcast(adam.decay);
  int64_t i = 0;
  for (; i + kLanes <= d_in; i += kLanes) {
    const Vec g = grad != nullptr ? load(grad + i) * broadcast(scale) : Vec{};
    const Vec m = load(exp_avg + i) + rest1 * (g - load(exp_avg + i));
    const Vec v = beta2 * load(exp_avg_sq + i) + rest2 * (g * g);
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
    const Vec denominator = vec_sqrt(v) * correction + eps;
    store(weight + i, decay * load(weight + i) - step * (m / denominator));
  }
  for (; i < d_in; ++i) {
    const float g = grad != nullptr ? grad[i] * scale : 0.0f;
    weight[i] = adam_update(adam, weight[i], g, exp_avg[i], exp_avg_sq[i]);
  }
}

void update_row(const cpu::RowUpdate& update, int64_t latent, float* scratch) {
  const int64_t d_in = update.gradient.factor.d_in;
  const float* grad = nullptr;
  if (has_gradient(update.gradient, latent)) {
    const int32_t slot = update.cache.slots[latent];
    grad = slot >= 0 ? update.cache.rows + slot * d_in : scratch;
    if (slot < 0) gradient_row(update.gradient, latent, scratch);
  }
  float* weight = update.W + latent * d_in;
  adam_row(update.adam, grad, update.grad_scale, d_in, weight, update.exp_avg + latent * d_in,
           update.exp_avg_sq + latent * d_in);
  if (update.unit_norm) normalize_row(weight, d_in);
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
  const cpu::GradientTerms terms{lists, factor, nullptr, nullptr};
  for_each_sixteen(lists.d_sae, parallel, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t latent = first; latent < end; ++latent) {
      gradient_row(terms, latent, rows + latent * factor.d_in);
      sums[latent] = list_sum(lists, latent);
    }
  });
  return true;
}

bool gradient_norm(const cpu::GradientTerms& terms, const cpu::RowCache& cache, float* sums,
                   double* squared_norm, const cpu::Parallel& parallel) {
  const int64_t d_in = terms.factor.d_in;
  const int64_t d_sae = terms.lists.d_sae;
  Scratch rows(parallel.threads() * d_in * 4);
  Scratch norms(d_sae * 8);
  if (!rows || !norms) return false;
  auto* norm = norms.as<double>();
  for_each_sixteen(d_sae, parallel, [&](int64_t thread, int64_t first, int64_t end) {
    for (int64_t latent = first; latent < end; ++latent) {
      sums[latent] = list_sum(terms.lists, latent);
      norm[latent] = 0.0;
      if (!has_gradient(terms, latent)) continue;
      const int32_t slot = cache.slots[latent];
      float* row = slot >= 0 ? cache.rows + slot * d_in : rows.as<float>() + thread * d_in;
      gradient_row(terms, latent, row);
      norm[latent] = static_cast<double>(dot(row, row, d_in));
    }
  });
  *squared_norm = 0.0;
  for (int64_t latent = 0; latent < d_sae; ++latent) *squared_norm += norm[latent];
  return true;
}

bool fused_update(const cpu::RowUpdate& update, const cpu::Parallel& parallel) {
  const int64_t d_in = update.gradient.factor.d_in;
  const int64_t row_bytes = (d_in * 4 + 63) / 64 * 64;
  const int64_t pack_bytes = (pack_scratch_bytes(update.encoder) + 63) / 64 * 64;
  const int64_t bytes = row_bytes > pack_bytes ? row_bytes : pack_bytes;
  Scratch scratch(parallel.threads() * bytes);
  if (!scratch) return false;
  // In whole panels, so that the padding of the last one is written too.
  const int64_t rows = update.gradient.lists.d_sae;
  const int64_t padded = update.encoder.packed != nullptr ? cpu::panels(rows) * kPanel : rows;
  for_each_sixteen(padded, parallel, [&](int64_t thread, int64_t first, int64_t end) {
    auto* own = scratch.as<float>(thread * bytes);
    for (int64_t latent = first; latent < (end < rows ? end : rows); ++latent) {
      update_row(update, latent, own);
    }
    refresh_copies(update.encoder, first, end < rows ? end : rows, own);
  });
  return true;
}

bool normalize_rows(float* W, int64_t d_sae, int64_t d_in, const cpu::Parallel& parallel) {
  for_each_sixteen(d_sae, parallel, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) normalize_row(W + row * d_in, d_in);
  });
  return true;
}

}  // namespace sae_fast::SAE_FAST_ISA
