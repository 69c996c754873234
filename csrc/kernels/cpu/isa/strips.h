// Gradient rows for all latents at once, strip by strip: the dense factor is cut into strips of
// columns that fit in L2, and every latent sums its list out of one strip before the next. Lists
// point all over the batch, so gathering whole rows would fetch each of them from L3 every time.
#pragma once

#include "kernels/cpu/isa/gather.h"
#include "kernels/cpu/rows.h"

namespace sae_fast::SAE_FAST_ISA {

// Vectors in a strip: about half of a 1 MB L2 for the whole batch. From shapes alone.
inline int strip_vectors(int64_t tokens, int64_t element_bytes) {
  for (int vectors = 8; vectors > 1; vectors /= 2) {
    if (tokens * vectors * kLanes * element_bytes <= int64_t{512} * 1024) return vectors;
  }
  return 1;
}

// The dense factor rearranged as [strip][token][width], zeros past its last column.
template <class T>
class StripMajor {
 public:
  bool prepare(const cpu::DenseFactor& factor, const cpu::Parallel& parallel) {
    vectors_ = strip_vectors(factor.tokens, static_cast<int64_t>(sizeof(T)));
    width_ = vectors_ * kLanes;
    tokens_ = factor.tokens;
    strips_ = (factor.d_in + width_ - 1) / width_;
    if (!memory_.reset(strips_ * tokens_ * width_ * static_cast<int64_t>(sizeof(T)))) return false;
    const auto* from = static_cast<const T*>(factor.dense);
    parallel.for_each(strips_, [&](int64_t strip) {
      const int64_t column = strip * width_;
      const int64_t live = factor.d_in - column < width_ ? factor.d_in - column : width_;
      T* to = memory_.template as<T>() + strip * tokens_ * width_;
      for (int64_t token = 0; token < tokens_; ++token, to += width_) {
        std::memcpy(to, from + token * factor.d_in + column, static_cast<size_t>(live) * sizeof(T));
        for (int64_t i = live; i < width_; ++i) to[i] = T{};
      }
    });
    return true;
  }

  int vectors() const { return vectors_; }
  int64_t width() const { return width_; }
  int64_t strips() const { return strips_; }
  const T* strip(int64_t index) const {
    return memory_.template as<T>() + index * tokens_ * width_;
  }

 private:
  int vectors_ = 1;
  int64_t width_ = 0, tokens_ = 0, strips_ = 0;
  Scratch memory_;
};

// What the norm of a projected gradient row needs: |g - (g·w) w|² = |g|² - (g·w)² (2 - |w|²).
struct RowProducts {
  double gradient_squared = 0.0;
  double along = 0.0;
  double direction_squared = 0.0;

  double projected_squared() const {
    const double rest = gradient_squared - along * along * (2.0 - direction_squared);
    return rest > 0.0 ? rest : 0.0;
  }
};

// One latent's piece of gradient in one strip.
struct StripTerms {
  const int32_t* rows;
  const float* coefficients;
  int64_t count;
  float shift_scale;        // minus the sum of the coefficients
  const float* shift;       // [width] of this strip, or null
  const float* extra_grad;  // likewise
  const float* direction;   // likewise
  int64_t live;             // columns that exist
};

// Columns [0, kVectors * kLanes) of a row of which only `live` exist.
template <int kVectors>
inline void load_live(const float* from, int64_t live, Vec* to) {
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = live - v * kLanes;
    to[v] = left >= kLanes ? load(from + v * kLanes)
                           : (left > 0 ? load_tail(from + v * kLanes, left) : Vec{});
  }
}

// Sums the piece, adds its products to `products`, and stores it in `cached` if not null.
template <int kVectors, class T>
inline void strip_gradient(const T* strip, const StripTerms& terms, RowProducts& products,
                           float* cached) {
  Vec sum[kVectors] = {};
  for (int64_t i = 0; i < terms.count; ++i) {
    const T* row = strip + static_cast<int64_t>(terms.rows[i]) * (kVectors * kLanes);
    const Vec coefficient = broadcast(terms.coefficients[i]);
    SAE_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[v] += coefficient * load(row + v * kLanes);
  }
  Vec other[kVectors];
  if (terms.shift != nullptr) {
    load_live<kVectors>(terms.shift, terms.live, other);
    for (int v = 0; v < kVectors; ++v) sum[v] += broadcast(terms.shift_scale) * other[v];
  }
  if (terms.extra_grad != nullptr) {
    load_live<kVectors>(terms.extra_grad, terms.live, other);
    for (int v = 0; v < kVectors; ++v) sum[v] += other[v];
  }
  Vec squares = {};
  for (int v = 0; v < kVectors; ++v) squares += sum[v] * sum[v];
  products.gradient_squared += static_cast<double>(reduce_add(squares));
  if (terms.direction != nullptr) {
    load_live<kVectors>(terms.direction, terms.live, other);
    Vec along = {};
    Vec length = {};
    for (int v = 0; v < kVectors; ++v) {
      along += sum[v] * other[v];
      length += other[v] * other[v];
    }
    products.along += static_cast<double>(reduce_add(along));
    products.direction_squared += static_cast<double>(reduce_add(length));
  }
  if (cached == nullptr) return;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = terms.live - v * kLanes;
    if (left >= kLanes) {
      store(cached + v * kLanes, sum[v]);
    } else if (left > 0) {
      store_tail(cached + v * kLanes, sum[v], left);
    }
  }
}

// Calls function(std::integral_constant) for the number of vectors in a strip.
template <class Function>
inline void with_vectors(int vectors, Function&& function) {
  switch (vectors) {
    case 8: return function(std::integral_constant<int, 8>{});
    case 4: return function(std::integral_constant<int, 4>{});
    case 2: return function(std::integral_constant<int, 2>{});
    default: return function(std::integral_constant<int, 1>{});
  }
}

}  // namespace sae_fast::SAE_FAST_ISA
