// Row kernels at one instruction set: the gradient of one weight row at a time, built from the
// factors in registers and used at once, so that no gradient of the size of the weights exists.
// A row belongs to one thread and its sums run in entry order: bits do not depend on the threads.
#include "kernels/cpu/isa/rows.h"

#include "kernels/cpu/isa/gather.h"
#include "kernels/cpu/isa/pack.h"
#include "kernels/cpu/isa/update_rule.h"

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

// row = start + the sum over entries [begin, end) of the lists; `start` may be null: zeros.
void add_entries(const cpu::GradientTerms& terms, int64_t begin, int64_t end, const float* start,
                 float* row) {
  const cpu::LatentMajor& lists = terms.lists;
  with_element(terms.factor.type, [&](auto element) {
    gather_sum(static_cast<const decltype(element)*>(terms.factor.dense), terms.factor.d_in,
               lists.rows + begin, lists.coefficients + begin, end - begin, start, row);
    return true;
  });
}

// What belongs to a row's gradient beside the sum over its entries.
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
  if (terms.project_onto != nullptr) {
    const float* direction = terms.project_onto + latent * d_in;
    add_scaled(row, direction, -dot(row, direction, d_in), d_in);
  }
}

// Finds the columns where no token differs from the shift; one look at a token is nearly always
// enough to see that there are none. False where `memory` could not be had.
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
  add_entries(terms, begin, terms.lists.offsets[latent + 1], nullptr, row);
  finish_gradient(terms, latent, row);
}

bool has_gradient(const cpu::GradientTerms& terms, int64_t latent) {
  return terms.extra_grad != nullptr ||
         terms.lists.offsets[latent] != terms.lists.offsets[latent + 1];
}

// Consecutive latents whose gradients are summed together: with their rows in L2, the dense side is
// read through once, token block by token block, where one latent after the other would fetch a
// distant row for every entry. Every row's sum still runs in entry order.
class LatentGroups {
 public:
  LatentGroups(const cpu::GradientTerms& terms, int threads) : terms_(terms) {
    const bool floats = terms.factor.type == cpu::Rows::kFloat;
    const int64_t row_bytes = terms.factor.d_in * 4 + 1;
    // Of 16-bit rows half as much would be fetched, while as many sums are read back and stored.
    most_latents_ = floats && row_bytes < kRowBytes ? kRowBytes / row_bytes : 1;
    most_entries_ = terms.lists.offsets[terms.lists.d_sae] / (4 * int64_t{threads}) + 1;
    block_ = kBlockBytes / row_bytes + 1;
  }

  int64_t most_latents() const { return most_latents_; }

  // The end of the group that starts at `first`.
  int64_t end(int64_t first) const {
    const int64_t* offsets = terms_.lists.offsets;
    int64_t last = first + 1;
    while (last < terms_.lists.d_sae && last - first < most_latents_ &&
           offsets[last + 1] - offsets[first] <= most_entries_) {
      ++last;
    }
    return last;
  }

  // rows[i] [d_in]: the gradient of latent first + i, before the clip, where it has one. `next` is
  // scratch for last - first numbers.
  void gradients(int64_t first, int64_t last, float* const* rows, int64_t* next) const {
    const int64_t* offsets = terms_.lists.offsets;
    // Reading all tokens for the group is to cost less than fetching a row for every entry.
    const int64_t worthwhile = 2 * terms_.factor.tokens;
    const bool together = last - first > 1 && offsets[last] - offsets[first] > worthwhile;
    if (together) sum(first, last, rows, next);
    for (int64_t latent = first; latent < last; ++latent) {
      if (!has_gradient(terms_, latent)) continue;
      if (together && offsets[latent] != offsets[latent + 1]) {
        finish_gradient(terms_, latent, rows[latent - first]);
      } else {
        gradient_row(terms_, latent, rows[latent - first]);
      }
    }
  }

 private:
  static constexpr int64_t kRowBytes = 384 << 10;    // of a group's gradients
  static constexpr int64_t kBlockBytes = 192 << 10;  // of a block of tokens

  // The sums over the entries of latents that have any.
  void sum(int64_t first, int64_t last, float* const* rows, int64_t* next) const {
    const cpu::LatentMajor& lists = terms_.lists;
    for (int64_t i = 0; i < last - first; ++i) next[i] = lists.offsets[first + i];
    for (int64_t token = 0; token < terms_.factor.tokens; token += block_) {
      for (int64_t i = 0; i < last - first; ++i) {
        const int64_t begin = next[i];
        const int64_t stop = lists.offsets[first + i + 1];
        int64_t end = begin;
        while (end < stop && lists.rows[end] < token + block_) ++end;
        const bool fresh = begin == lists.offsets[first + i];
        if (end > begin) add_entries(terms_, begin, end, fresh ? nullptr : rows[i], rows[i]);
        next[i] = end;
      }
    }
  }

  const cpu::GradientTerms& terms_;
  int64_t most_latents_, most_entries_, block_;
};

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
  for_each_sixteen(lists.d_sae, parallel, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t latent = first; latent < end; ++latent) {
      gradient_row(terms, latent, rows + latent * factor.d_in);
      sums[latent] = list_sum(lists, latent);
    }
  });
  return true;
}

bool gradient_norm(const cpu::GradientTerms& given, const cpu::RowCache& cache, float* sums,
                   double* squared_norm, const cpu::Parallel& parallel) {
  cpu::GradientTerms terms = given;
  Scratch columns;
  if (!find_still_columns(terms, columns)) return false;
  const int64_t d_in = terms.factor.d_in;
  const int64_t d_sae = terms.lists.d_sae;
  const LatentGroups groups(terms, parallel.threads());
  const int64_t most = groups.most_latents();
  Scratch rows(parallel.threads() * most * d_in * 4);
  Scratch lists(parallel.threads() * most * 16);  // a pointer and a number for each row
  Scratch norms(d_sae * 8);
  Scratch starts((d_sae + 1) * 8);
  if (!rows || !lists || !norms || !starts) return false;
  auto* const norm = norms.as<double>();
  auto* const start = starts.as<int64_t>();
  int64_t count = 0;
  for (int64_t first = 0; first < d_sae; first = groups.end(first)) start[count++] = first;
  start[count] = d_sae;
  int64_t next = 0;
  parallel.for_each(parallel.threads(), [&](int64_t thread) {
    float* const spare = rows.as<float>() + thread * most * d_in;
    auto** const places = lists.as<float*>(thread * most * 16);
    auto* const cursors = lists.as<int64_t>(thread * most * 16 + most * 8);
    for (;;) {
      const int64_t group = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (group >= count) return;
      const int64_t first = start[group];
      const int64_t last = start[group + 1];
      for (int64_t latent = first; latent < last; ++latent) {
        const int32_t slot = cache.slots[latent];
        const int64_t place = latent - first;
        places[place] = slot >= 0 ? cache.rows + slot * d_in : spare + place * d_in;
      }
      groups.gradients(first, last, places, cursors);
      for (int64_t latent = first; latent < last; ++latent) {
        const float* const row = places[latent - first];
        sums[latent] = list_sum(terms.lists, latent);
        norm[latent] = has_gradient(terms, latent) ? static_cast<double>(dot(row, row, d_in)) : 0.0;
      }
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
