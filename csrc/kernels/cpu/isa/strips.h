// Strips: some columns of a table cut out and laid side by side, row after row, so that they stay
// in L2 while every token (or every latent) gathers from them; then the next strip. Gathering whole
// rows instead fetches each from L3, entry by entry, and cutting columns off in place would not
// help: rows lie a few kilobytes apart, so their pieces would share a quarter of the cache's sets.
#pragma once

#include "kernels/cpu/isa/gather.h"

namespace sae_fast::SAE_FAST_ISA {

// The part of L2 that a strip may fill. L2 has 1 MB on many processors with AVX-512 and 2 MB on all
// with tiles. A narrower strip that fits with room to spare loses more by the second visit to every
// token than it gains: 4096 rows of 32 columns took a third longer than of 64.
#if defined(SAE_FAST_TILES)
constexpr int64_t kStripBytes = int64_t{1664} << 10;
#else
constexpr int64_t kStripBytes = int64_t{1024} << 10;
#endif

// Strips of 64 columns, or of 32 where 64 would take too much; of 32 alone where vectors are so
// short that sums over 64 columns do not fit into registers.
constexpr int kNarrowStrip = 32 / kLanes;  // vectors
constexpr int kWideStrip = kLanes == 4 ? kNarrowStrip : 64 / kLanes;

// The division of a table, from its shape alone: bits of results depend on it.
struct StripPlan {
  StripPlan(int64_t rows, int64_t d_in)
      : wide(rows * kWideStrip * kLanes * 4 <= kStripBytes),
        columns((wide ? kWideStrip : kNarrowStrip) * kLanes),
        strips((d_in + columns - 1) / columns),
        ranges(rows > 0 ? (rows * columns * 4 + kStripBytes - 1) / kStripBytes : 1),
        range_rows((rows + ranges - 1) / ranges) {}

  int64_t strip_bytes() const { return range_rows * columns * 4; }

  bool wide;
  int64_t columns, strips;
  int64_t ranges, range_rows;  // of rows, where even a narrow strip of all would take too much
};

// Calls function(integral_constant) with a plan's vectors a strip.
template <class Function>
inline bool with_strip_width(const StripPlan& plan, Function&& function) {
  if (plan.wide) return function(std::integral_constant<int, kWideStrip>{});
  return function(std::integral_constant<int, kNarrowStrip>{});
}

// Some columns of one row.
template <int kVectors>
struct StripRow {
  Vec value[kVectors];
};

// Columns of a row that has `width` of them left, zeros behind.
template <int kVectors, class T>
inline StripRow<kVectors> load_columns(const T* from, int64_t width) {
  constexpr int64_t kColumns = kVectors * kLanes;
  StripRow<kVectors> row;
  if (width >= kColumns) {
    SAE_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) row.value[v] = load(from + v * kLanes);
    return row;
  }
  T padded[kColumns] = {};
  std::memcpy(padded, from, static_cast<size_t>(width) * sizeof(T));
  SAE_FAST_UNROLL
  for (int v = 0; v < kVectors; ++v) row.value[v] = load(padded + v * kLanes);
  return row;
}

template <int kVectors>
inline void store_columns(float* to, const StripRow<kVectors>& row, int64_t width) {
  if (width >= kVectors * kLanes) {
    SAE_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) store(to + v * kLanes, row.value[v]);
  } else {
    std::memcpy(to, &row, static_cast<size_t>(width) * sizeof(float));
  }
}

// Zeros instead of what the columns behind `width` hold: 0 times infinity, say.
template <int kVectors>
inline void clear_padding(StripRow<kVectors>& row, int64_t width) {
  if (width >= kVectors * kLanes) return;
  float columns[kVectors * kLanes] = {};
  std::memcpy(columns, &row, static_cast<size_t>(width) * sizeof(float));
  std::memcpy(&row, columns, sizeof columns);
}

// Rows [first, end) of a table, from `column` on, as floats.
template <int kVectors, class T>
inline void copy_strip(const T* table, int64_t d_in, int64_t column, int64_t first, int64_t end,
                       float* to) {
  constexpr int64_t kColumns = kVectors * kLanes;
  constexpr int64_t kAhead = 12;
  const int64_t width = d_in - column < kColumns ? d_in - column : kColumns;
  for (int64_t r = first; r < end; ++r, to += kColumns) {
    const T* from = table + r * d_in + column;
    if (r + kAhead < end)
      prefetch_row(from + kAhead * d_in, width * static_cast<int64_t>(sizeof(T)));
    store_columns(to, load_columns<kVectors>(from, width), kColumns);
  }
}

// Fetches lines that will be written: fetched as for reading, they would have to be asked for once
// more when the write comes, which took a fifth of a reconstruction.
inline void prefetch_for_writing(const void* row, int64_t bytes) {
  const char* line = static_cast<const char*>(row);
  for (int64_t offset = 0; offset < bytes; offset += 64) {
#if defined(__x86_64__)
    // The compiler has this instruction only for some processors; for others this does nothing.
    asm volatile("prefetchw %0" : : "m"(line[offset]));
#else
    __builtin_prefetch(line + offset, 1, 3);
#endif
  }
}

// row += the sum over entries of coefficients[i] * (row indices[i] of the table, of which the strip
// starts with `first_row`), in entry order as in gather_sum, so that strips and whole rows give the
// same bits.
template <int kVectors>
inline void add_from_strip(const float* strip, int64_t first_row, const int32_t* indices,
                           const float* coefficients, int64_t count, StripRow<kVectors>& row) {
  StripRow<kVectors> sum = row;
  for (int64_t i = 0; i < count; ++i) {
    const float* from = strip + (indices[i] - first_row) * (kVectors * kLanes);
    const Vec coefficient = broadcast(coefficients[i]);
    SAE_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) sum.value[v] += coefficient * load(from + v * kLanes);
  }
  row = sum;
}

// <row, row `index` of the strip> before the sum over lanes.
template <int kVectors>
inline Vec dot_lanes(const float* strip, int64_t index, const StripRow<kVectors>& row) {
  const float* from = strip + index * (kVectors * kLanes);
  Vec sum = row.value[0] * load(from);
  SAE_FAST_UNROLL
  for (int v = 1; v < kVectors; ++v) sum += row.value[v] * load(from + v * kLanes);
  return sum;
}

// dots[i] = <row, row indices[i] of the table>, added to what is there unless `fresh`.
template <int kVectors>
inline void dots_with_strip(const float* strip, int64_t first_row, const int32_t* indices,
                            int64_t count, const StripRow<kVectors>& row, float* dots, bool fresh) {
  int64_t i = 0;
  Vec sums[kLanes];
  for (; i + kLanes <= count; i += kLanes) {
    SAE_FAST_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] = dot_lanes(strip, indices[i + lane] - first_row, row);
    }
    const Vec result = reduce_add_each(sums);
    store(dots + i, fresh ? result : load(dots + i) + result);
  }
  const int64_t rest = count - i;
  if (rest == 0) return;
  for (int lane = 0; lane < kLanes; ++lane) {
    sums[lane] = lane < rest ? dot_lanes(strip, indices[i + lane] - first_row, row) : Vec{};
  }
  const Vec result = reduce_add_each(sums);
  store_tail(dots + i, fresh ? result : load_tail(dots + i, rest) + result, rest);
}

// Lists of entries, of every token or of every latent, as work to divide among threads.
struct EntryLists {
  const int64_t* offsets;  // [count + 1], or null where each has k entries
  int64_t k, count;

  int64_t begin(int64_t list) const { return offsets != nullptr ? offsets[list] : list * k; }

  // The first list that begins at `entry` or behind.
  int64_t list_at(int64_t entry) const {
    int64_t low = 0;
    int64_t high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (begin(middle) < entry) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Calls piece(thread, strip, first, end) for every strip and every list, with about as many entries
// for each thread. Without `by_strips` the threads divide the lists: each goes through all strips
// and copies every one of them. With it they divide the strips: few threads copy a strip, but the
// results of different strips for one list come from different threads.
template <class Piece>
inline void share_pieces(const EntryLists& lists, int64_t strips, bool by_strips,
                         const cpu::Parallel& parallel, Piece&& piece) {
  const int64_t entries = lists.begin(lists.count);
  const int64_t threads = parallel.threads();
  // The list at a share of the entries; all lists behind the last entry belong to the last share.
  const auto at = [&](int64_t entry) {
    return entry >= entries ? lists.count : lists.list_at(entry);
  };
  parallel.for_each(threads, [&](int64_t thread) {
    if (!by_strips) {
      const int64_t first = at(entries * thread / threads);
      const int64_t end =
          thread + 1 == threads ? lists.count : at(entries * (thread + 1) / threads);
      for (int64_t strip = 0; strip < strips && first < end; ++strip) {
        piece(thread, strip, first, end);
      }
      return;
    }
    const int64_t low = strips * entries * thread / threads;
    const int64_t high = strips * entries * (thread + 1) / threads;
    for (int64_t strip = low / entries; strip * entries < high; ++strip) {
      const int64_t start = strip * entries;
      const int64_t first = at(low > start ? low - start : 0);
      const int64_t end = at(high - start);
      if (first < end) piece(thread, strip, first, end);
    }
  });
}

}  // namespace sae_fast::SAE_FAST_ISA
