// Decoding, its gradient for the code, and both, in strips of W_dec.
#pragma once

#include "kernels/cpu/decode.h"
#include "kernels/cpu/isa/strips.h"

namespace sae_fast::SAE_FAST_ISA {

// The entries of a code range by range of latents, where W_dec is cut into ranges: a token's
// entries stay together and, within a range, in their order.
class RangedCode {
 public:
  RangedCode(const cpu::Code& code, const StripPlan& plan)
      : code_(code),
        plan_(plan),
        entries_(code.begin(code.tokens)),
        inverse_rows_(1.0 / static_cast<double>(plan.range_rows)) {}

  // Returns false if memory ran out.
  bool sort(const cpu::Parallel& parallel) {
    const int64_t bytes = entries_ * 4;
    if (!starts_.reset((code_.tokens * plan_.ranges + 1) * 8) || !indices_.reset(bytes) ||
        !values_.reset(bytes) || !positions_.reset(bytes)) {
      return false;
    }
    starts_.as<int64_t>()[code_.tokens * plan_.ranges] = entries_;
    constexpr int64_t kTokens = 64;
    parallel.for_each((code_.tokens + kTokens - 1) / kTokens, [&](int64_t task) {
      const int64_t end = (task + 1) * kTokens;
      for (int64_t token = task * kTokens; token < (end < code_.tokens ? end : code_.tokens);
           ++token) {
        sort_token(token);
      }
    });
    return true;
  }

  int64_t entries() const { return entries_; }
  const int32_t* indices() const { return indices_.as<int32_t>(); }
  const float* values() const { return values_.as<float>(); }
  const int32_t* positions() const { return positions_.as<int32_t>(); }  // in the code
  int64_t begin(int64_t token, int64_t range) const {
    return starts_.as<int64_t>()[token * plan_.ranges + range];
  }

 private:
  // By counting, without a branch that depends on the data: there are too many entries for
  // mispredictions.
  void sort_token(int64_t token) {
    int64_t* const starts = starts_.as<int64_t>() + token * plan_.ranges;
    const int64_t begin = code_.begin(token);
    const int64_t end = code_.end(token);
    for (int64_t range = 0; range < plan_.ranges; ++range) starts[range] = 0;
    for (int64_t i = begin; i < end; ++i) ++starts[range_of(code_.indices[i])];
    int64_t to = begin;
    for (int64_t range = 0; range < plan_.ranges; ++range) {
      const int64_t count = starts[range];
      starts[range] = to;
      to += count;
    }
    for (int64_t i = begin; i < end; ++i) {
      const int32_t index = code_.indices[i];
      const int64_t place = starts[range_of(index)]++;
      indices_.as<int32_t>()[place] = index;
      if (code_.values != nullptr) values_.as<float>()[place] = code_.values[i];
      positions_.as<int32_t>()[place] = static_cast<int32_t>(i);
    }
    // Each stands at the end of its range, where the next one begins.
    for (int64_t range = plan_.ranges - 1; range > 0; --range) starts[range] = starts[range - 1];
    starts[0] = begin;
  }

  // index / range_rows: the half keeps rounding away from the border between two ranges.
  int64_t range_of(int32_t index) const {
    return static_cast<int64_t>((index + 0.5) * inverse_rows_);
  }

  const cpu::Code& code_;
  const StripPlan& plan_;
  int64_t entries_;
  double inverse_rows_;
  Scratch starts_, indices_, values_, positions_;
};

enum class TokenWork { kDecode, kDecodeBackward, kReconstruct };

// Returns true if threads divide strips instead of tokens: if each thread with its tokens would use
// a row of a strip so few times that copying all strips would take as long. With more uses sums
// apart for every strip cost more than copies (measured with 2 threads: even at 11 uses, a third
// slower at 21); with very many they would also take more memory than W_dec.
inline bool shares_strips(int64_t entries, int64_t d_sae, int64_t threads) {
  return threads > 1 && entries < 8 * threads * d_sae && entries <= 64 * d_sae;
}

// Returns true if strips beat whole rows, from shapes alone: a latent needs enough entries to
// pay for copying, a token enough to pay for a visit in each strip. Rows of 16 bits gain less. A
// table that L2 holds as it is gives its rows fast enough for sums, but not for dots, which take
// fewer instructions in strips.
inline bool strips_pay(TokenWork work, const cpu::Code& code, const cpu::Decoder& decoder) {
  const int64_t entries = code.begin(code.tokens);
  if (entries == 0 || decoder.d_in == 0) return false;
  const int64_t bytes = decoder.d_sae * decoder.d_in * (decoder.type == DType::kFloat32 ? 4 : 2);
  if (work == TokenWork::kDecode && bytes <= 2 * kStripBytes) return false;
  const int64_t ranges = StripPlan(decoder.d_sae, decoder.d_in).ranges;
  const int64_t wanted = (decoder.type == DType::kFloat32 ? 8 : 16) * (ranges > 1 ? 3 : 1);
  return entries >= wanted * decoder.d_sae && entries >= wanted * ranges * code.tokens;
}

// Inputs and outputs; those that a kind of work does not have are null.
struct TokenRows {
  const float* from;     // [tokens][d_in]: x of kReconstruct, the gradient of kDecodeBackward
  void* rows;            // [tokens][d_in]: x_hat in float of kDecode, the residual of kReconstruct
  float* squared_error;  // [tokens]
  float* dots;           // one per entry
};

template <TokenWork kWork, int kVectors, class T>
class TokenStrips {
 public:
  TokenStrips(const cpu::Code& code, const cpu::Decoder& decoder, const TokenRows& to,
              const StripPlan& plan)
      : code_(code), decoder_(decoder), to_(to), plan_(plan), ranged_(code, plan) {}

  bool run(const cpu::Parallel& parallel) {
    const int64_t entries = ranged_.entries();
    const int64_t tokens = code_.tokens;
    // Sums that several threads find strip by strip wait side by side until all strips are done:
    // then they are added in the order in which one thread would have.
    by_strips_ = shares_strips(entries, decoder_.d_sae, parallel.threads());
    const int64_t sets = by_strips_ ? plan_.strips : 1;
    const bool apart = kDots && (by_strips_ || plan_.ranges > 1);
    if (plan_.ranges > 1 && !ranged_.sort(parallel)) return false;
    if (apart && !dots_.reset(sets * entries * 4)) return false;
    if (by_strips_ && kErrors && !errors_.reset(sets * tokens * 4)) return false;
    strip_bytes_ = plan_.strip_bytes();
    if (!strip_memory_.reset(parallel.threads() * strip_bytes_)) return false;
    const bool partial = kSums && plan_.ranges > 1;
    if (partial && !partial_.reset(parallel.threads() * kRangedTokens * kColumns * 4)) return false;
    share_pieces({code_.offsets, code_.k, tokens}, plan_.strips, by_strips_, parallel,
                 [&](int64_t thread, int64_t strip, int64_t first, int64_t end) {
                   work(thread, strip, first, end);
                 });
    if (apart) collect_dots(sets, parallel);
    if (by_strips_ && kErrors) collect_errors(sets);
    return true;
  }

 private:
  static constexpr bool kSums = kWork != TokenWork::kDecodeBackward;
  static constexpr bool kDots = kWork != TokenWork::kDecode;
  static constexpr bool kErrors = kWork == TokenWork::kReconstruct;
  static constexpr int64_t kColumns = kVectors * kLanes;
  // Tokens that go through all ranges before others do, because their sums need memory.
  static constexpr int64_t kRangedTokens = 4096;
  using Row = StripRow<kVectors>;

  struct Piece {
    int64_t column, width;
    float* strip;
    float* partial;  // [end - first][kColumns]: sums between two ranges
    float* dots;     // one per entry
    float* errors;   // [tokens]
    bool fresh;      // nothing in dots and errors yet
    Row bias;
    int64_t first, end;
  };

  void work(int64_t thread, int64_t strip, int64_t first, int64_t end) {
    Piece piece{};
    piece.column = strip * kColumns;
    piece.width = decoder_.d_in - piece.column < kColumns ? decoder_.d_in - piece.column : kColumns;
    piece.strip = strip_memory_.as<float>(thread * strip_bytes_);
    piece.first = first;
    piece.end = end;
    piece.fresh = by_strips_ || strip == 0;
    const int64_t set = by_strips_ ? strip : 0;
    piece.dots = dots_ ? dots_.as<float>() + set * ranged_.entries() : to_.dots;
    piece.errors = errors_ ? errors_.as<float>() + set * code_.tokens : to_.squared_error;
    if (decoder_.b_dec != nullptr) {
      piece.bias = load_columns<kVectors>(decoder_.b_dec + piece.column, piece.width);
    }
    if (plan_.ranges == 1) {
      copy_range(piece, 0);
      for (int64_t token = first; token < end; ++token) whole_token(piece, token);
      return;
    }
    piece.partial = partial_.as<float>() + thread * kRangedTokens * kColumns;
    for (; piece.first < end; piece.first = piece.end) {
      piece.end = piece.first + kRangedTokens < end ? piece.first + kRangedTokens : end;
      work_in_ranges(piece);
    }
  }

  void work_in_ranges(const Piece& piece) const {
    const int64_t last = plan_.ranges - 1;
    for (int64_t range = 0; kSums && range <= last; ++range) {
      copy_range(piece, range);
      for (int64_t token = piece.first; token < piece.end; ++token) add_range(piece, token, range);
    }
    // Downwards: after the sums the last range is still there.
    for (int64_t range = last; kDots && range >= 0; --range) {
      if (!kSums || range < last) copy_range(piece, range);
      for (int64_t token = piece.first; token < piece.end; ++token) dot_range(piece, token, range);
    }
  }

  void copy_range(const Piece& piece, int64_t range) const {
    const int64_t first = range * plan_.range_rows;
    const int64_t end = first + plan_.range_rows;
    copy_strip<kVectors>(static_cast<const T*>(decoder_.W_dec), decoder_.d_in, piece.column, first,
                         end < decoder_.d_sae ? end : decoder_.d_sae, piece.strip);
  }

  void whole_token(const Piece& piece, int64_t token) const {
    fetch_ahead(piece, token);
    const int64_t begin = code_.begin(token);
    const int64_t count = code_.end(token) - begin;
    Row row = piece.bias;
    if constexpr (kSums) {
      add_from_strip(piece.strip, 0, code_.indices + begin, code_.values + begin, count, row);
      finish(piece, token, row);
    } else {
      row = given(piece, token);
    }
    if constexpr (kDots) {
      dots_with_strip(piece.strip, 0, code_.indices + begin, count, row, piece.dots + begin,
                      piece.fresh);
    }
  }

  void add_range(const Piece& piece, int64_t token, int64_t range) const {
    float* partial = piece.partial + (token - piece.first) * kColumns;
    const bool last = range + 1 == plan_.ranges;
    if (last) fetch_ahead(piece, token);
    const int64_t begin = ranged_.begin(token, range);
    Row row = range == 0 ? piece.bias : load_columns<kVectors>(partial, kColumns);
    add_from_strip(piece.strip, range * plan_.range_rows, ranged_.indices() + begin,
                   ranged_.values() + begin, ranged_.begin(token, range + 1) - begin, row);
    if (last) finish(piece, token, row);
    store_columns(partial, row, kColumns);
  }

  void dot_range(const Piece& piece, int64_t token, int64_t range) const {
    const int64_t begin = ranged_.begin(token, range);
    const Row row =
        kSums ? load_columns<kVectors>(piece.partial + (token - piece.first) * kColumns, kColumns)
              : given(piece, token);
    dots_with_strip(piece.strip, range * plan_.range_rows, ranged_.indices() + begin,
                    ranged_.begin(token, range + 1) - begin, row, piece.dots + begin, piece.fresh);
  }

  Row given(const Piece& piece, int64_t token) const {
    return load_columns<kVectors>(to_.from + token * decoder_.d_in + piece.column, piece.width);
  }

  // Rows of d_in columns are too far apart for the hardware to foresee them.
  void fetch_ahead(const Piece& piece, int64_t token) const {
    constexpr int64_t kAhead = 8;
    if (token + kAhead >= piece.end) return;
    const int64_t at = (token + kAhead) * decoder_.d_in + piece.column;
    if constexpr (kWork != TokenWork::kDecode) prefetch_row(to_.from + at, piece.width * 4);
    if constexpr (kWork == TokenWork::kDecode) {
      prefetch_for_writing(static_cast<float*>(to_.rows) + at, piece.width * 4);
    } else if constexpr (kSums) {
      prefetch_for_writing(static_cast<T*>(to_.rows) + at,
                           piece.width * static_cast<int64_t>(sizeof(T)));
    }
  }

  // Turns finished columns of x_hat into the residual, if the work has one, and writes them.
  void finish(const Piece& piece, int64_t token, Row& row) const {
    const int64_t at = token * decoder_.d_in + piece.column;
    if constexpr (kWork == TokenWork::kDecode) {
      store_columns(static_cast<float*>(to_.rows) + at, row, piece.width);
    } else {
      const Row x = given(piece, token);
      SAE_FAST_UNROLL
      for (int v = 0; v < kVectors; ++v) row.value[v] -= x.value[v];
      clear_padding(row, piece.width);
      Vec squares{};
      SAE_FAST_UNROLL
      for (int v = 0; v < kVectors; ++v) squares += row.value[v] * row.value[v];
      const float error = reduce_add(squares);
      piece.errors[token] = piece.fresh ? error : piece.errors[token] + error;
      T* const residual = static_cast<T*>(to_.rows) + at;
      if constexpr (std::is_same_v<T, float>) {
        store_columns(residual, row, piece.width);
      } else {
        float columns[kColumns];
        std::memcpy(columns, &row, sizeof columns);
        store_rounded(residual, columns, piece.width);
      }
    }
  }

  // Writes the dots of an entry, strip after strip, to its place in the code.
  void collect_dots(int64_t sets, const cpu::Parallel& parallel) const {
    const int64_t entries = ranged_.entries();
    constexpr int64_t kPart = 1 << 14;
    parallel.for_each((entries + kPart - 1) / kPart, [&](int64_t part) {
      const int64_t end = (part + 1) * kPart < entries ? (part + 1) * kPart : entries;
      for (int64_t i = part * kPart; i < end; ++i) {
        float sum = dots_.as<float>()[i];
        for (int64_t set = 1; set < sets; ++set) sum += dots_.as<float>()[set * entries + i];
        to_.dots[plan_.ranges > 1 ? ranged_.positions()[i] : i] = sum;
      }
    });
  }

  void collect_errors(int64_t sets) const {
    for (int64_t token = 0; token < code_.tokens; ++token) {
      float sum = errors_.as<float>()[token];
      for (int64_t set = 1; set < sets; ++set) {
        sum += errors_.as<float>()[set * code_.tokens + token];
      }
      to_.squared_error[token] = sum;
    }
  }

  const cpu::Code& code_;
  const cpu::Decoder& decoder_;
  const TokenRows& to_;
  const StripPlan& plan_;
  RangedCode ranged_;
  bool by_strips_ = false;
  int64_t strip_bytes_ = 0;
  Scratch strip_memory_, partial_, dots_, errors_;
};

}  // namespace sae_fast::SAE_FAST_ISA
