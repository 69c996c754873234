// Exact selection of the k best among candidates: order statistics by bisection on ordered integer
// keys, candidate buffers that shrink when they fill, and the final ranking.
#pragma once

#include <new>
#include <type_traits>

#include "kernels/common/order.h"
#include "kernels/cpu/isa/simd.h"

namespace sae_fast::SAE_FAST_ISA {

inline int64_t count_at_least(const int32_t* keys, int64_t count, int32_t bound) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += keys[i] >= bound ? 1 : 0;
  return total;
}

// The k-th largest of `count` >= k >= 1 keys.
inline int32_t kth_largest(const int32_t* keys, int64_t count, int64_t k) {
  int32_t low = INT32_MAX;  // invariant: at least k keys are >= low
  int32_t high = INT32_MIN;
  for (int64_t i = 0; i < count; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  while (low < high) {
    const auto middle =
        static_cast<int32_t>((static_cast<int64_t>(low) + static_cast<int64_t>(high) + 1) >> 1);
    const int64_t reached = count_at_least(keys, count, middle);
    if (reached < k) {
      high = middle - 1;
      continue;
    }
    low = middle;
    if (reached == k) {  // the smallest key that is still there is the k-th
      int32_t smallest = INT32_MAX;
      for (int64_t i = 0; i < count; ++i) {
        const int32_t key = keys[i] >= middle ? keys[i] : INT32_MAX;
        smallest = key < smallest ? key : smallest;
      }
      return smallest;
    }
  }
  return low;
}

// A key that at least k of `count` >= k keys reach and that lies less than `slack` below the k-th.
inline int32_t near_kth_largest(const int32_t* keys, int64_t count, int64_t k, int32_t slack) {
  int32_t low = INT32_MAX;  // invariant: at least k keys are >= low, fewer are > high
  int32_t high = INT32_MIN;
  for (int64_t i = 0; i < count; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  while (static_cast<int64_t>(high) - low > slack) {
    const auto middle =
        static_cast<int32_t>((static_cast<int64_t>(low) + static_cast<int64_t>(high) + 1) >> 1);
    const int64_t reached = count_at_least(keys, count, middle);
    if (reached == k) return middle;
    if (reached > k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

inline void keys_of(const float* values, int64_t count, int32_t* keys) {
  for (int64_t i = 0; i < count; ++i) keys[i] = ordered_key(values[i]);
}

// Undoes ordered_key for keys of numbers.
inline float value_of_key(int32_t key) {
  return key < 0 ? -float_from_bits(static_cast<uint32_t>(-key))
                 : float_from_bits(static_cast<uint32_t>(key));
}

// Keeps the entries with value >= bound, in order; returns how many.
inline int64_t keep_at_least(float* values, int32_t* indices, int64_t count, float bound) {
  int64_t kept = 0;
#if defined(__AVX512F__)
  for (int64_t i = 0; i < count; i += 16) {
    const auto live = static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1u << (count - i)) - 1);
    const __m512 value = _mm512_maskz_loadu_ps(live, values + i);
    const __m512i index = _mm512_maskz_loadu_epi32(live, indices + i);
    const __mmask16 keep = _mm512_mask_cmp_ps_mask(live, value, _mm512_set1_ps(bound), _CMP_GE_OQ);
    const int number = __builtin_popcount(keep);
    const auto kept_lanes = static_cast<__mmask16>((1u << number) - 1);
    _mm512_mask_storeu_ps(values + kept, kept_lanes, _mm512_maskz_compress_ps(keep, value));
    _mm512_mask_storeu_epi32(indices + kept, kept_lanes, _mm512_maskz_compress_epi32(keep, index));
    kept += number;
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    values[kept] = values[i];
    indices[kept] = indices[i];
    kept += values[i] >= bound ? 1 : 0;
  }
#endif
  return kept;
}

// A candidate as one integer: ascending order of the upper half is the order of the result.
inline uint64_t sortable(int32_t key, int64_t position) {
  const uint32_t descending = ~(static_cast<uint32_t>(key) ^ 0x80000000u);
  return (static_cast<uint64_t>(descending) << 32) | static_cast<uint64_t>(position);
}

inline int64_t position_of(uint64_t entry) { return static_cast<int64_t>(entry & 0xffffffffu); }

// Sorts by the upper half, stably: least significant digit first, skipping
// digits that all entries share. The result is in `entries`; `spare` is scratch of the same size.
inline void radix_sort(uint64_t* entries, uint64_t* spare, int64_t count) {
  constexpr int kDigits = 4;
  uint32_t places[kDigits][256] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int digit = 0; digit < kDigits; ++digit) {
      ++places[digit][entries[i] >> (32 + 8 * digit) & 255];
    }
  }
  uint64_t* from = entries;
  uint64_t* to = spare;
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = 32 + 8 * digit;
    if (places[digit][from[0] >> shift & 255] == static_cast<uint32_t>(count)) continue;
    uint32_t total = 0;
    for (uint32_t& place : places[digit]) {
      const uint32_t here = place;
      place = total;
      total += here;
    }
    for (int64_t i = 0; i < count; ++i) to[places[digit][from[i] >> shift & 255]++] = from[i];
    uint64_t* const swapped = from;
    from = to;
    to = swapped;
  }
  if (from != entries) std::memcpy(entries, from, static_cast<size_t>(count) * sizeof(uint64_t));
}

inline float relu(float value) { return value <= 0.0f ? 0.0f : value; }  // NaN stays NaN

// Few candidates: each counts how many come before it. `keys` has room for 16 more, so that the
// count runs in whole vectors.
inline void rank_best(const float* values, const int32_t* indices, int32_t* keys, int64_t count,
                      int64_t k, float* out_values, int32_t* out_indices) {
  const int64_t padded = (count + 15) / 16 * 16;
  for (int64_t j = count; j < padded; ++j) keys[j] = INT32_MIN;  // sorts last
  for (int64_t i = 0; i < count; ++i) {
    int32_t above = 0;
    int32_t reached = 0;
#if defined(__AVX512F__)
    const __m512i key = _mm512_set1_epi32(keys[i]);
    for (int64_t j = 0; j < padded; j += 16) {
      const __m512i others = _mm512_loadu_si512(keys + j);
      above += __builtin_popcount(_mm512_cmpgt_epi32_mask(others, key));
      reached += __builtin_popcount(_mm512_cmpge_epi32_mask(others, key));
    }
#else
    for (int64_t j = 0; j < padded; ++j) {
      above += keys[j] > keys[i] ? 1 : 0;
      reached += keys[j] >= keys[i] ? 1 : 0;
    }
#endif
    int64_t rank = above;
    if (reached - above > 1) {  // equal keys rank by position
      for (int64_t j = 0; j < i; ++j) rank += keys[j] == keys[i] ? 1 : 0;
    }
    if (rank >= k) continue;
    out_values[rank] = relu(values[i]);
    out_indices[rank] = indices[i];
  }
}

// Writes the k best of `count` >= k candidates, listed by ascending index, best first, after ReLU.
// `keys` is scratch for `count` + 16 entries, `order` for twice `count`.
inline void select_best(const float* values, const int32_t* indices, int64_t count, int64_t k,
                        int32_t* keys, uint64_t* order, float* out_values, int32_t* out_indices) {
  keys_of(values, count, keys);
  constexpr int64_t kRankAll = 80;  // comparing all pairs beats sorting up to about here
  if (count <= kRankAll) {
    rank_best(values, indices, keys, count, k, out_values, out_indices);
    return;
  }
  int64_t kept = 0;
  if (count > 2 * k + 64) {  // drop all but the best before sorting
    const int32_t bound = kth_largest(keys, count, k);
    for (int64_t i = 0; i < count; ++i) {
      if (keys[i] >= bound) order[kept++] = sortable(keys[i], i);
    }
  } else {
    for (; kept < count; ++kept) order[kept] = sortable(keys[kept], kept);
  }
  radix_sort(order, order + count, kept);
  for (int64_t rank = 0; rank < k; ++rank) {
    const int64_t position = position_of(order[rank]);
    out_values[rank] = relu(values[position]);
    out_indices[rank] = indices[position];
  }
}

// Candidates of several rows: those whose approximate pre-activation reached the row's threshold,
// by ascending index. A row that cannot be held in its buffer, because too many candidates lie
// within the error bound of the k-th, is marked (`failed`) and goes to the exact path.
class CandidateRows {
 public:
  int64_t k = 0;         // as many as the result needs
  int64_t capacity = 0;  // entries of a row's buffer; appending writes up to 16 past the count
  int64_t reserved = 0;  // entries at its end that are kept free for the outlier latents
  float* values = nullptr;
  int32_t* indices = nullptr;
  int32_t* counts = nullptr;
  float* thresholds = nullptr;
  float* kth = nullptr;  // a lower bound of the k-th largest approximate value; NaN: not known
  uint8_t* failed = nullptr;

  static int64_t capacity_for(int64_t k, int64_t d_sae) {
    const int64_t everything = (d_sae + 63) / 64 * 64 + 128;
    const int64_t usual = (3 * k + 512) / 64 * 64 + 128;
    return usual < everything ? usual : everything;
  }
  static int64_t bytes_per_row(int64_t capacity) { return capacity * 8 + 20; }

  // Places the arrays of `rows` rows in `memory`.
  void place(char* memory, int64_t rows) {
    values = reinterpret_cast<float*>(memory);
    indices = reinterpret_cast<int32_t*>(values + rows * capacity);
    counts = indices + rows * capacity;
    thresholds = reinterpret_cast<float*>(counts + rows);
    kth = thresholds + rows;
    failed = reinterpret_cast<uint8_t*>(kth + rows);
  }

  float* row_values(int64_t row) const { return values + row * capacity; }
  int32_t* row_indices(int64_t row) const { return indices + row * capacity; }

  void start(int64_t row, float threshold) const {
    counts[row] = 0;
    thresholds[row] = threshold;
    kth[row] = NAN;
    failed[row] = 0;
  }

  // A lower bound of the k-th largest approximate value so far, at most about 1e-3 of it too low;
  // needs counts[row] >= k.
  float kth_value(int64_t row, int32_t* keys) const {
    constexpr int32_t kSlack = 1 << 13;  // in units of the 2^-23 between neighbouring floats
    keys_of(row_values(row), counts[row], keys);
    return value_of_key(near_kth_largest(keys, counts[row], k, kSlack));
  }

  // Makes room for another panel: drops entries more than `margin` below the k-th, which cannot be
  // among the best.
  void shrink_if_full(int64_t row, float margin, int32_t* keys) const {
    const int64_t room = capacity - reserved - kPanelRoom;
    if (counts[row] <= room) return;
    if (counts[row] >= k) {
      const float bound = kth_value(row, keys) - margin;
      if (bound > thresholds[row]) {
        counts[row] = static_cast<int32_t>(
            keep_at_least(row_values(row), row_indices(row), counts[row], bound));
        thresholds[row] = bound;
      }
    }
    if (counts[row] > room) {
      failed[row] = 1;
      counts[row] = 0;
      thresholds[row] = INFINITY;  // nothing finite passes any more
    }
  }

 private:
  static constexpr int64_t kPanelRoom = 64 + 16;
};

}  // namespace sae_fast::SAE_FAST_ISA
