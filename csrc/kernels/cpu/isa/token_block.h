// A block of tokens as the encoder's product reads them, and how many tokens a block has.
#pragma once

#include "kernels/cpu/isa/screen.h"

namespace sae_fast::SAE_FAST_ISA {

// Tokens of one block as the product reads them, and their exact scores.
template <class Product, class T>
class TokenBlock {
 public:
  using Element = typename Product::Element;
  using Sum = typename Product::Sum;

  // Room for `rows` tokens, of which `positions`, a multiple of the product's group, are multiplied
  // at once.
  bool allocate(int64_t rows, int64_t positions, int64_t d_in) {
    d_in_ = d_in;
    steps_ = Product::steps(d_in);
    const int64_t group_bytes = (positions + 1) * steps_ * static_cast<int64_t>(sizeof(Element));
    if (!x_memory_.reset(rows * (d_in + 3) * 4) || !group_memory_.reset(group_bytes) ||
        !sum_memory_.reset(Product::most_sums(positions) * static_cast<int64_t>(sizeof(Sum)))) {
      return false;
    }
    x_ = x_memory_.as<float>();
    scales_ = x_ + rows * d_in;
    errors_ = scales_ + rows;
    norms_ = errors_ + rows;
    groups_ = group_memory_.as<Element>();
    row_ = groups_ + positions * steps_;
    std::memset(groups_, 0, static_cast<size_t>(group_bytes));  // a group need not be full
    sums_ = sum_memory_.as<Sum>();
    return true;
  }

  const float* rows() const { return x_; }

  // Centres a token and rounds it to the scoring type.
  void set(int64_t row, const float* x, const float* b_dec) {
    float* to = x_ + row * d_in_;
    for (int64_t i = 0; i < d_in_; ++i) to[i] = to_float(round_to<T>(x[i] - b_dec[i]));
  }

  // Packs block row `row` as the `position`-th row of the product.
  void pack(int64_t row, int64_t position, const LatentBounds& bounds) {
    const RowStats stats = Product::round(x_ + row * d_in_, d_in_, row_);
    Product::place(row_, steps_, position, groups_);
    scales_[row] = stats.scale;
    norms_[row] = stats.norm;
    errors_[row] = bounds.template score_error<Product>(stats, d_in_);
    if (kSumsAreScores<Product, T> && errors_[row] < INFINITY) errors_[row] = 0.0f;
  }

  const Sum* multiply(typename Product::Registers& registers, int64_t rows,
                      const cpu::PackedEncoder& encoder, int64_t panel) const {
    const int64_t stride = cpu::packed_steps(encoder.screen, d_in_) * kPanel;
    const auto* packed = static_cast<const Element*>(encoder.packed) + panel * stride;
    Product::multiply(registers, groups_, rows, packed, steps_, sums_);
    return sums_;
  }

  // All panels, through a filter of the product.
  template <class Filter>
  void multiply_and_filter(typename Product::Registers& registers, int64_t rows,
                           const cpu::PackedEncoder& encoder, const float* bias, Filter& filter) {
    Product::multiply_and_filter(registers, groups_, rows,
                                 static_cast<const Element*>(encoder.packed),
                                 cpu::panels(encoder.d_sae), steps_, bias, sums_, filter);
  }

  float score(int64_t row, const T* latent, float bias) const {
    return dot_in_strips(x_ + row * d_in_, latent, d_in_) + bias;
  }

  // Returns true if a candidate has an approximate score and must still be scored.
  bool is_approximate(int64_t row, float screening_bias) const {
    return !kSumsAreScores<Product, T> || !(errors_[row] < INFINITY) || std::isnan(screening_bias);
  }

  float scale(int64_t row) const { return scales_[row]; }
  float error(int64_t row) const { return errors_[row]; }
  float norm(int64_t row) const { return norms_[row]; }

 private:
  int64_t d_in_ = 0, steps_ = 0;
  float* x_ = nullptr;         // [rows][d_in] centred tokens
  Element* groups_ = nullptr;  // positions * steps elements, as the product reads them
  Sum* sums_ = nullptr;        // as many as the product needs for its positions
  Element* row_ = nullptr;     // [steps]
  float* scales_ = nullptr;    // [rows] of the quantised token
  float* errors_ = nullptr;    // [rows] score_error
  float* norms_ = nullptr;     // [rows] bound on |x|
  Scratch x_memory_, group_memory_, sum_memory_;
};

template <class T>
inline const T* scoring_rows(const cpu::PackedEncoder& encoder) {
  if constexpr (std::is_same_v<T, float>) {
    return encoder.W_enc;
  } else {
    return static_cast<const T*>(encoder.rounded);
  }
}

// Rows that go through the product at once: what suits it, and a share for every thread; in whole
// groups.
template <class Product>
inline int64_t product_rows(int64_t tokens, int64_t d_in, int threads) {
  constexpr int64_t kUnit = Product::kGroup;
  const int64_t most = Product::most_rows(d_in);
  const int64_t share = (tokens + threads - 1) / threads;
  const int64_t rows = most < share ? most : share;
  return rows < kUnit ? kUnit : (rows + kUnit - 1) / kUnit * kUnit;
}

// Rows in a block, whose candidates are scored together: the more, the fewer times all encoder rows
// are read; as many as leave two blocks a thread where they can, whose strips of columns stay in
// L2, and whose candidates, of `bytes_per_row`, do not need too much memory. A multiple of `unit`
// if that is possible.
inline int64_t block_rows(int64_t tokens, int64_t unit, int64_t bytes_per_row, int threads) {
  constexpr int64_t kMostRows = 1024;
  const int64_t half_share = (tokens + 2 * threads - 1) / (2 * int64_t{threads});
  const int64_t held = (int64_t{32} << 20) / (bytes_per_row + 1);
  int64_t rows = half_share < kMostRows ? half_share : kMostRows;
  rows = rows < held ? rows : held;
  if (rows >= unit) return rows / unit * unit;
  const int64_t least = unit < held ? unit : held;
  return least > 1 ? least : 1;
}

}  // namespace sae_fast::SAE_FAST_ISA
