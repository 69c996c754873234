// The gradient of weight rows in strips of the dense factor.
#pragma once

#include "kernels/cpu/isa/strips.h"
#include "kernels/cpu/update.h"

namespace sae_fast::SAE_FAST_ISA {

// Returns true if strips beat whole rows, from shapes alone: a token needs enough entries to
// pay for copying, a latent enough to pay for a visit in each strip. Rows of 16 bits gain less, and
// a projection needs one more pass over the rows. Measured at F = 3072 to 32768: at these numbers
// strips are even or a little ahead, at 21 entries a latent twice as fast (float, no projection).
// Short vectors take so long for the sums that little is left to gain: there strips are even at 21.
inline bool strips_pay(const cpu::GradientTerms& terms) {
  const int64_t entries = terms.lists.offsets[terms.lists.d_sae];
  const bool projects = terms.project_onto != nullptr;
  const bool is_float = terms.factor.type == DType::kFloat32;
  const int64_t least = is_float ? (projects ? 8 : 4) : (projects ? 32 : 10);
  const int64_t wanted = kLanes == 4 && least < 24 ? 24 : least;
  return terms.factor.d_in > 0 && entries >= 8 * terms.factor.tokens &&
         entries >= wanted * terms.lists.d_sae;
}

// The memory of the gradients of the latents that are kept.
struct GradientRows {
  float* rows;           // [kept][d_in]
  const int32_t* slots;  // [d_sae]: row of a latent, or -1; null: all are kept in their order

  float* at(int64_t latent, int64_t d_in) const {
    const int64_t slot = slots != nullptr ? slots[latent] : latent;
    return slot >= 0 ? rows + slot * d_in : nullptr;
  }
};

// Sums over the entries, the shift and the extra gradient; not the projection, which needs whole
// rows. Threads divide the strips, so that each is copied about once; a latent's squared norm is
// kept strip by strip and added in the order of the strips.
template <int kVectors, class T>
class LatentStrips {
 public:
  // sums [d_sae]: of the coefficients.
  LatentStrips(const cpu::GradientTerms& terms, const StripPlan& plan, const float* sums,
               const GradientRows& kept)
      : terms_(terms), plan_(plan), sums_(sums), kept_(kept) {}

  // Finds the rows that are kept and, where squares [strips][d_sae] is not null, the squared norms
  // of all latents in every strip, except those which are not kept and `skips_others`.
  bool run(float* squares, bool skips_others, const cpu::Parallel& parallel) {
    squares_ = squares;
    skips_others_ = skips_others;
    strip_bytes_ = plan_.strip_bytes();
    if (!strip_memory_.reset(parallel.threads() * strip_bytes_)) return false;
    if (plan_.ranges > 1) {
      if (!partial_.reset(parallel.threads() * kRangedLatents * kColumns * 4)) return false;
      if (!cut_lists(parallel)) return false;
    }
    share_pieces({terms_.lists.offsets, 0, terms_.lists.d_sae}, plan_.strips, true, parallel,
                 [&](int64_t thread, int64_t strip, int64_t first, int64_t end) {
                   work(thread, strip, first, end);
                 });
    return true;
  }

 private:
  static constexpr int64_t kColumns = kVectors * kLanes;
  // Latents that go through all ranges before others do, because their sums need memory.
  static constexpr int64_t kRangedLatents = 8192;
  using Row = StripRow<kVectors>;

  struct Piece {
    int64_t strip, column, width;
    float* memory;   // the strip
    float* partial;  // [end - first][kColumns]: sums between two ranges
    const int32_t* still_columns;
    int64_t still_count;
    int64_t first, end;
  };

  // The entries at which the lists pass from one range of tokens to the next.
  bool cut_lists(const cpu::Parallel& parallel) {
    const cpu::LatentMajor& lists = terms_.lists;
    if (!cuts_.reset((lists.d_sae * plan_.ranges + 1) * 8)) return false;
    cuts_.as<int64_t>()[lists.d_sae * plan_.ranges] = lists.offsets[lists.d_sae];
    constexpr int64_t kLatents = 64;
    parallel.for_each((lists.d_sae + kLatents - 1) / kLatents, [&](int64_t task) {
      const int64_t end = (task + 1) * kLatents < lists.d_sae ? (task + 1) * kLatents : lists.d_sae;
      for (int64_t latent = task * kLatents; latent < end; ++latent) {
        int64_t* const cuts = cuts_.as<int64_t>() + latent * plan_.ranges;
        int64_t at = lists.offsets[latent];
        for (int64_t range = 0; range < plan_.ranges; ++range) {
          cuts[range] = at;
          const int64_t rows = (range + 1) * plan_.range_rows;
          while (at < lists.offsets[latent + 1] && lists.rows[at] < rows) ++at;
        }
      }
    });
    return true;
  }

  void work(int64_t thread, int64_t strip, int64_t first, int64_t end) {
    Piece piece{};
    piece.strip = strip;
    piece.column = strip * kColumns;
    const int64_t left = terms_.factor.d_in - piece.column;
    piece.width = left < kColumns ? left : kColumns;
    piece.memory = strip_memory_.as<float>(thread * strip_bytes_);
    find_still_columns(piece);
    piece.first = first;
    piece.end = end;
    if (plan_.ranges == 1) {
      copy_range(piece, 0);
      for (int64_t latent = first; latent < end; ++latent) whole_latent(piece, latent);
      return;
    }
    piece.partial = partial_.as<float>() + thread * kRangedLatents * kColumns;
    for (; piece.first < end; piece.first = piece.end) {
      piece.end = piece.first + kRangedLatents < end ? piece.first + kRangedLatents : end;
      for (int64_t range = 0; range < plan_.ranges; ++range) {
        copy_range(piece, range);
        for (int64_t latent = piece.first; latent < piece.end; ++latent) {
          add_range(piece, latent, range);
        }
      }
    }
  }

  void find_still_columns(Piece& piece) const {
    const int32_t* column = terms_.still_columns;
    const int32_t* const end = column + terms_.still_count;
    while (column < end && *column < piece.column) ++column;
    piece.still_columns = column;
    while (column < end && *column < piece.column + piece.width) ++column;
    piece.still_count = column - piece.still_columns;
  }

  void copy_range(const Piece& piece, int64_t range) const {
    const int64_t first = range * plan_.range_rows;
    const int64_t end = first + plan_.range_rows;
    copy_strip<kVectors>(static_cast<const T*>(terms_.factor.dense), terms_.factor.d_in,
                         piece.column, first,
                         end < terms_.factor.tokens ? end : terms_.factor.tokens, piece.memory);
  }

  bool is_wanted(int64_t latent) const {
    return !skips_others_ || kept_.at(latent, terms_.factor.d_in) != nullptr;
  }

  void whole_latent(const Piece& piece, int64_t latent) const {
    fetch_ahead(piece, latent);
    if (!is_wanted(latent)) return;
    const cpu::LatentMajor& lists = terms_.lists;
    const int64_t begin = lists.offsets[latent];
    Row row{};
    add_from_strip(piece.memory, 0, lists.rows + begin, lists.coefficients + begin,
                   lists.offsets[latent + 1] - begin, row);
    finish(piece, latent, row);
  }

  void add_range(const Piece& piece, int64_t latent, int64_t range) const {
    float* const partial = piece.partial + (latent - piece.first) * kColumns;
    const bool last = range + 1 == plan_.ranges;
    if (last) fetch_ahead(piece, latent);
    if (!is_wanted(latent)) return;
    const cpu::LatentMajor& lists = terms_.lists;
    const int64_t* const cuts = cuts_.as<int64_t>() + latent * plan_.ranges + range;
    Row row{};
    if (range > 0) row = load_columns<kVectors>(partial, kColumns);
    add_from_strip(piece.memory, range * plan_.range_rows, lists.rows + cuts[0],
                   lists.coefficients + cuts[0], cuts[1] - cuts[0], row);
    if (last) {
      finish(piece, latent, row);
    } else {
      store_columns(partial, row, kColumns);
    }
  }

  // Rows of d_in columns are too far apart for the hardware to foresee them.
  void fetch_ahead(const Piece& piece, int64_t latent) const {
    constexpr int64_t kAhead = 8;
    if (latent + kAhead >= piece.end) return;
    const int64_t d_in = terms_.factor.d_in;
    float* const row = kept_.at(latent + kAhead, d_in);
    if (row != nullptr) prefetch_for_writing(row + piece.column, piece.width * 4);
    if (terms_.extra_grad != nullptr) {
      prefetch_row(terms_.extra_grad + (latent + kAhead) * d_in + piece.column, piece.width * 4);
    }
  }

  // Adds the parts of the gradient beside the sum over entries, in the order of finish_gradient.
  void finish(const Piece& piece, int64_t latent, Row& row) const {
    const int64_t d_in = terms_.factor.d_in;
    if (terms_.factor.shift != nullptr) {
      add_scaled(row, terms_.factor.shift + piece.column, -sums_[latent], piece.width);
      if (piece.still_count > 0 && std::isfinite(sums_[latent])) clear_still_columns(piece, row);
    }
    if (terms_.extra_grad != nullptr) {
      add_scaled(row, terms_.extra_grad + latent * d_in + piece.column, 1.0f, piece.width);
    }
    float* const to = kept_.at(latent, d_in);
    if (to != nullptr) store_columns(to + piece.column, row, piece.width);
    if (squares_ == nullptr) return;
    clear_padding(row, piece.width);
    Vec squares{};
    SAE_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) squares += row.value[v] * row.value[v];
    squares_[piece.strip * terms_.lists.d_sae + latent] = reduce_add(squares);
  }

  // row += scale * from.
  static void add_scaled(Row& row, const float* from, float scale, int64_t width) {
    const Row columns = load_columns<kVectors>(from, width);
    const Vec factor = broadcast(scale);
    SAE_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) row.value[v] += factor * columns.value[v];
  }

  static void clear_still_columns(const Piece& piece, Row& row) {
    float columns[kColumns];
    std::memcpy(columns, &row, sizeof columns);
    for (int64_t i = 0; i < piece.still_count; ++i) {
      columns[piece.still_columns[i] - piece.column] = 0.0f;
    }
    std::memcpy(&row, columns, sizeof columns);
  }

  const cpu::GradientTerms& terms_;
  const StripPlan& plan_;
  const float* sums_;
  const GradientRows& kept_;
  float* squares_ = nullptr;
  bool skips_others_ = false;
  int64_t strip_bytes_ = 0;
  Scratch strip_memory_, partial_, cuts_;
};

// Calls LatentStrips::run for the element type and the width.
inline bool gradients_in_strips(const cpu::GradientTerms& terms, const StripPlan& plan,
                                const float* sums, const GradientRows& kept, float* squares,
                                bool skips_others, const cpu::Parallel& parallel) {
  return with_element(terms.factor.type, [&](auto element) {
    return with_strip_width(plan, [&](auto width) {
      return LatentStrips<decltype(width)::value, decltype(element)>(terms, plan, sums, kept)
          .run(squares, skips_others, parallel);
    });
  });
}

}  // namespace sae_fast::SAE_FAST_ISA
