// An encoder as the CUDA tests know it. The library's product is a double loop here, made wrong by
// as much as a tensor core might be.
#pragma once

#include <algorithm>

#include "kernels/common/encode_plan.h"
#include "kernels/cuda/encode/encode.h"
#include "tests/cuda_testing.h"

namespace sae_fast::testing {

struct Shape {
  int64_t tokens, d_in, d_sae;
};

enum class Precision { kExact, kBFloat16, kFloat16 };

// Half of all problems are exact.
inline Precision any_precision(Random& random) {
  const Precision precisions[] = {Precision::kExact, Precision::kBFloat16, Precision::kExact,
                                  Precision::kFloat16};
  return precisions[random.integer(0, 3)];
}

// An encoder with its storage, packed by the kernel under test, and the scores of all latents.
class EncodeProblem {
 public:
  EncodeProblem(Random& random, const Shape& shape, Numbers numbers, Precision precision)
      : shape(shape),
        precision(precision),
        x(random.numbers(shape.tokens * shape.d_in, numbers)),
        W_enc(random.numbers(shape.d_sae * shape.d_in, numbers)),
        b_enc(random.numbers(shape.d_sae, numbers)),
        b_dec(random.numbers(shape.d_in, numbers)),
        jitter_(numbers == Numbers::kNormal) {}

  DType type() const {
    return precision == Precision::kFloat16 ? DType::kFloat16 : DType::kBFloat16;
  }

  void scale(float factor) {
    for (auto* numbers : {&x, &b_enc, &b_dec}) {
      for (float& value : *numbers) value *= factor;
    }
  }

  // To be called when all numbers are as they shall be.
  void pack(Random& random) {
    rounded_ = stale(shape.d_sae * shape.d_in, uint16_t{0xfbfb});
    stats_ = stale(2 * shape.d_sae, 777.0f);
    rounded_x_ = stale(shape.tokens * shape.d_in, uint16_t{0xfbfb});
    check_success(cuda::pack_encoder(W_enc.data(), shape.d_sae, shape.d_in, rounded_.data(), type(),
                                     stats_.data(), nullptr),
                  "pack_encoder");
    for (int64_t n = 0; n < shape.tokens; ++n) {
      for (int64_t j = 0; j < shape.d_sae; ++j) {
        products_.push_back(product(random, n, j));
        const float biased = products_.back() + b_enc[static_cast<size_t>(j)];
        full_scores_.push_back(full_score(n, j));
        scores_.push_back(precision == Precision::kExact ? full_scores_.back() : biased);
      }
    }
  }

  cuda::Encoder encoder() const {
    return {W_enc.data(),  {rounded_.data(), type()},
            stats_.data(), b_enc.data(),
            b_dec.data(),  shape.d_sae,
            shape.d_in,    precision == Precision::kExact};
  }
  cuda::Tokens tokens() { return {x.data(), rounded_x_.data(), shape.tokens}; }

  // The scores expected of streaming and of computing in full: equal, but for the product's
  // roundings where they are the result.
  const std::vector<float>& scores() const { return scores_; }
  const std::vector<float>& full_scores() const { return full_scores_; }

  // Calls call(product) for every chunk of `columns` latents.
  template <typename Call>
  void for_each_chunk(int64_t columns, Call&& call) const {
    for (int64_t first = 0; first < shape.d_sae; first += columns) {
      const int64_t width = std::min(columns, shape.d_sae - first);
      std::vector<float> chunk;
      for (int64_t n = 0; n < shape.tokens; ++n) {
        const auto row = products_.begin() + n * shape.d_sae + first;
        chunk.insert(chunk.end(), row, row + width);
      }
      call(cuda::Product{chunk.data(), first, width});
    }
  }

  // Makes the products wrong by more than any bound, most of them upwards.
  void spoil_products(Random& random, float share) {
    for (float& value : products_) {
      value += share * std::fabs(value) * static_cast<float>(random.integer(1, 9));
    }
  }

  // Checks the matrices that begin_* has left for the library to multiply.
  void check_rounded_tokens() const {
    for (size_t i = 0; i < rounded_x_.size(); ++i) {
      check(same(from_bits(rounded_x_[i], type()), rounded(centred(i), type())),
            "token %ld is rounded to %g", static_cast<long>(i) / shape.d_in,
            from_bits(rounded_x_[i], type()));
    }
  }

  Shape shape;
  Precision precision;
  std::vector<float> x, W_enc, b_enc, b_dec;

 private:
  float centred(size_t i) const { return x[i] - b_dec[i % static_cast<size_t>(shape.d_in)]; }

  float product(Random& random, int64_t token, int64_t latent) const {
    double sum = 0.0;
    double size_x = 0.0;
    double size_w = 0.0;
    for (int64_t d = 0; d < shape.d_in; ++d) {
      const double a = rounded(centred(static_cast<size_t>(token * shape.d_in + d)), type());
      const double w = rounded(W_enc[static_cast<size_t>(latent * shape.d_in + d)], type());
      sum += a * w;
      size_x += a * a;
      size_w += w * w;
    }
    const double terms = static_cast<double>(shape.d_in) * 0x1p-23 * std::sqrt(size_x * size_w);
    if (jitter_) sum += terms * static_cast<double>(random.integer(-9, 9)) / 10.0;
    return static_cast<float>(sum);
  }

  // In the order of additions of score_latents.
  float full_score(int64_t token, int64_t latent) const {
    const DType operands = precision == Precision::kExact ? DType::kFloat32 : type();
    float sums[32] = {};
    for (int64_t d = 0; d < shape.d_in; ++d) {
      const float a = rounded(centred(static_cast<size_t>(token * shape.d_in + d)), operands);
      const float w = rounded(W_enc[static_cast<size_t>(latent * shape.d_in + d)], operands);
      float& sum = sums[d % 128 / 4];
      sum = std::fmaf(a, w, sum);
    }
    for (int step = 16; step > 0; step /= 2) {
      for (int lane = 0; lane < step; ++lane) sums[lane] += sums[lane + step];
    }
    return sums[0] + b_enc[static_cast<size_t>(latent)];
  }

  bool jitter_;
  std::vector<uint16_t> rounded_, rounded_x_;
  std::vector<float> stats_, products_, scores_, full_scores_;
};

inline Shape any_shape(Random& random) {
  const int64_t widths[] = {1, 6, 8, 37, 128, 140};
  const int64_t most[] = {20, 300, 1100};
  return {random.integer(0, 3), widths[random.integer(0, 5)],
          random.integer(1, most[random.integer(0, 2)])};
}

// Blocks that find nothing to do cost time in the emulation.
class FewBlocks {
 public:
  FewBlocks() { emulated_cuda::device.max_blocks = std::min(before_.max_blocks, 3u); }
  ~FewBlocks() { emulated_cuda::device = before_; }
  FewBlocks(const FewBlocks&) = delete;
  FewBlocks& operator=(const FewBlocks&) = delete;

 private:
  emulated_cuda::Device before_ = emulated_cuda::device;
};

}  // namespace sae_fast::testing
