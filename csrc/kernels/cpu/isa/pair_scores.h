// Exact scores of pairs of a token and a latent, many at a time: a strip of columns of all tokens
// of a block is copied side by side, where it stays in L2, and the pairs are visited latent by
// latent, so that each encoder row is read once a block. Then the next strip.
//
// This defines a score: the sums of the strips, each a tree over the lanes of one chain of
// multiply-adds, added one after the other, then the bias. dot_in_strips() gives the same
// bits for a single pair.
#pragma once

#include "kernels/cpu/isa/simd.h"

namespace sae_fast::SAE_FAST_ISA {

constexpr int kStripVectors = 128 / kLanes;
constexpr int kStripColumns = kStripVectors * kLanes;

// Longest chain of roundings in a score: the bound on its error is this times 2^-24 times |x| |w|.
inline double score_roundings(int64_t d_in) {
  return static_cast<double>(d_in) / kStripColumns + kStripVectors + 8.0;
}

// The lanes of a whole strip's sum.
template <class T>
inline Vec multiply_strip(const float* x, const T* w) {
  Vec sum = {};
  SAE_FAST_UNROLL
  for (int v = 0; v < kStripVectors; ++v) sum += load(x + v * kLanes) * load(w + v * kLanes);
  return sum;
}

// Multiplies a strip that ends after `width` columns.
template <class T>
inline Vec multiply_narrow_strip(const float* x, const T* w, int64_t width) {
  Vec sum = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) sum += load(x + i) * load(w + i);
  if (i < width) sum += load_tail(x + i, width - i) * load_tail(w + i, width - i);
  return sum;
}

template <class T>
inline float dot_in_strips(const float* x, const T* w, int64_t size) {
  float total = 0.0f;
  int64_t i = 0;
  for (; i + kStripColumns <= size; i += kStripColumns) {
    total += reduce_add(multiply_strip(x + i, w + i));
  }
  if (i < size) total += reduce_add(multiply_narrow_strip(x + i, w + i, size - i));
  return total;
}

// The pairs of a block. Use: count() each, begin_adding(), add() each in the same number, score().
template <class T>
class PairScores {
 public:
  bool allocate(int64_t rows, int64_t d_in, int64_t d_sae, int64_t most_pairs) {
    d_in_ = d_in;
    d_sae_ = d_sae;
    const int64_t padded = most_pairs + kLanes;
    if (!strip_memory_.reset(rows * kStripColumns * 4) || !pair_memory_.reset(padded * 16) ||
        !latent_memory_.reset((d_sae + 1) * 8)) {
      return false;
    }
    strip_ = strip_memory_.as<float>();
    pairs_ = pair_memory_.as<Pair>();
    latents_ = reinterpret_cast<int32_t*>(pairs_ + padded);
    scores_ = reinterpret_cast<float*>(latents_ + padded);
    offsets_ = latent_memory_.as<int32_t>();
    distinct_ = offsets_ + d_sae + 1;
    return true;
  }

  void start() { std::memset(offsets_, 0, static_cast<size_t>(d_sae_ + 1) * sizeof(int32_t)); }
  void count(int32_t latent) { ++offsets_[latent + 1]; }

  void begin_adding() {
    distinct_count_ = 0;
    for (int64_t j = 0; j < d_sae_; ++j) {
      distinct_[distinct_count_] = static_cast<int32_t>(j);
      distinct_count_ += offsets_[j + 1] != 0 ? 1 : 0;
      offsets_[j + 1] += offsets_[j];
    }
    count_ = offsets_[d_sae_];
  }
  // A pair whose score goes to `place`.
  void add(int32_t latent, int32_t row, int32_t place) {
    pairs_[offsets_[latent]++] = {row, place};
  }

  // Calls write(place, score) for every pair. x [rows][d_in], W [d_sae][d_in], bias [d_sae].
  template <class Write>
  void score(const float* x, int64_t rows, const T* W, const float* bias, Write&& write) {
    if (count_ == 0) return;
    int64_t at = 0;
    for (int64_t number = 0; number < distinct_count_; ++number) {
      for (; at < offsets_[distinct_[number]]; ++at) latents_[at] = distinct_[number];
    }
    for (; at % kLanes != 0; ++at) {  // whole vectors of pairs
      pairs_[at] = pairs_[count_ - 1];
      latents_[at] = latents_[count_ - 1];
    }
    std::memset(scores_, 0, static_cast<size_t>(at) * sizeof(float));
    for (int64_t column = 0; column < d_in_; column += kStripColumns) {
      const int64_t width = d_in_ - column;
      copy_strip(x + column, rows, width < kStripColumns ? width : kStripColumns);
      if (width >= kStripColumns) {
        add_strip(W + column, kStripColumns,
                  [](const float* a, const T* b) { return multiply_strip(a, b); });
      } else {
        add_strip(W + column, width, [width](const float* a, const T* b) {
          return multiply_narrow_strip(a, b, width);
        });
      }
    }
    for (int64_t i = 0; i < count_; ++i) write(pairs_[i].place, scores_[i] + bias[latents_[i]]);
  }

 private:
  struct Pair {
    int32_t row;
    int32_t place;
  };

  // `x` and `W` are at the strip's first column.
  void copy_strip(const float* x, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(strip_ + row * kStripColumns, x + row * d_in_,
                  static_cast<size_t>(width) * sizeof(float));
    }
  }

  template <class Multiply>
  void add_strip(const T* W, int64_t width, Multiply&& multiply) {
    constexpr int64_t kAhead = 256;  // pairs whose encoder rows are fetched before they are needed
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
    int64_t ahead = 0;  // number of the next latent to fetch
    for (int64_t i = 0; i < count_; i += kLanes) {
      for (; ahead < distinct_count_ && first_pair(ahead) < i + kAhead; ++ahead) {
        const char* line = reinterpret_cast<const char*>(W + distinct_[ahead] * d_in_);
        for (int64_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(line + at, 0, 2);
      }
      Vec sums[kLanes];
      SAE_FAST_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) {
        sums[lane] = multiply(strip_ + int64_t{pairs_[i + lane].row} * kStripColumns,
                              W + latents_[i + lane] * d_in_);
      }
      store(scores_ + i, load(scores_ + i) + reduce_add_each(sums));
    }
  }

  // The first pair of a latent that has any, by its number among these.
  int64_t first_pair(int64_t number) const {
    return number == 0 ? 0 : offsets_[distinct_[number - 1]];
  }

  int64_t d_in_ = 0, d_sae_ = 0;
  int64_t count_ = 0, distinct_count_ = 0;
  float* strip_ = nullptr;       // [rows][kStripColumns]
  Pair* pairs_ = nullptr;        // latent by latent
  int32_t* latents_ = nullptr;   // of each pair
  float* scores_ = nullptr;      // of each pair
  int32_t* offsets_ = nullptr;   // [d_sae + 1] of the latents among the pairs
  int32_t* distinct_ = nullptr;  // latents that have pairs
  Scratch strip_memory_, pair_memory_, latent_memory_;
};

}  // namespace sae_fast::SAE_FAST_ISA
