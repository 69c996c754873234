// The step of a weight row for every rule and every type of its moments: in 16 and 8
// bits they are floats for as long as a block of columns is in the first cache.
#pragma once

#include "kernels/cpu/isa/moment_codes.h"
#include "kernels/cpu/update.h"

namespace sae_fast::SAE_FAST_ISA {

// update_weight on whole vectors.
template <UpdateRule kRule>
class VecStep;

template <>
class VecStep<UpdateRule::kAdam> {
 public:
  explicit VecStep(const UpdateStep& step)
      : beta2_(broadcast(step.beta2)),
        rest1_(broadcast(step.one_minus_beta1)),
        rest2_(broadcast(step.one_minus_beta2)),
        step_(broadcast(step.step_size)),
        correction_(broadcast(1.0f / step.sqrt_bias_correction2)),
        eps_(broadcast(step.eps)),
        decay_(broadcast(step.decay)) {}

  Vec operator()(Vec weight, Vec grad, Vec& exp_avg, Vec& exp_avg_sq) const {
    exp_avg = exp_avg + rest1_ * (grad - exp_avg);
    exp_avg_sq = beta2_ * exp_avg_sq + rest2_ * (grad * grad);
    const Vec denominator = vec_sqrt(exp_avg_sq) * correction_ + eps_;
    return decay_ * weight - step_ * (exp_avg / denominator);
  }

 private:
  Vec beta2_, rest1_, rest2_, step_, correction_, eps_, decay_;
};

template <>
class VecStep<UpdateRule::kSgd> {
 public:
  explicit VecStep(const UpdateStep& step)
      : beta1_(broadcast(step.beta1)),
        grad_decay_(broadcast(step.grad_decay)),
        step_(broadcast(step.step_size)) {}

  Vec operator()(Vec weight, Vec grad, Vec& exp_avg, Vec& /*exp_avg_sq*/) const {
    exp_avg = beta1_ * exp_avg + (grad + grad_decay_ * weight);
    return weight - step_ * exp_avg;
  }

 private:
  Vec beta1_, grad_decay_, step_;
};

template <>
class VecStep<UpdateRule::kSignum> {
 public:
  explicit VecStep(const UpdateStep& step)
      : rest1_(broadcast(step.one_minus_beta1)),
        step_(broadcast(step.step_size)),
        decay_(broadcast(step.decay)) {}

  Vec operator()(Vec weight, Vec grad, Vec& exp_avg, Vec& /*exp_avg_sq*/) const {
    exp_avg = exp_avg + rest1_ * (grad - exp_avg);
    const Vec zero{};
    return decay_ * weight - (exp_avg > zero ? step_ : exp_avg < zero ? -step_ : zero);
  }

 private:
  Vec rest1_, step_, decay_;
};

template <>
class VecStep<UpdateRule::kScheduleFreeSignum> {
 public:
  explicit VecStep(const UpdateStep& step)
      : step1_(broadcast(step.step_size * step.beta1)),
        rest1_(broadcast(step.step_size * step.one_minus_beta1)),
        decay_(broadcast(step.grad_decay)),
        share_(broadcast(step.average_share)) {}

  Vec operator()(Vec weight, Vec grad, Vec& exp_avg, Vec& /*exp_avg_sq*/) const {
    const Vec zero{}, one = broadcast(1.0f);
    const Vec direction = (grad > zero ? one : grad < zero ? -one : zero) + decay_ * weight;
    const Vec moved = exp_avg - step1_ * direction;
    exp_avg = moved - share_ * moved;
    return weight - rest1_ * direction + share_ * moved;
  }

 private:
  Vec step1_, rest1_, decay_, share_;
};

// The step of `d_in` weights; `grad` null stands for zeros, exp_avg_sq is read where there is one.
template <UpdateRule kRule>
inline void update_floats(const UpdateScalars& scalars, const float* grad, int64_t d_in,
                          float* weight, float* exp_avg, float* exp_avg_sq) {
  const VecStep<kRule> step(scalars.step);
  int64_t i = 0;
  for (; i + kLanes <= d_in; i += kLanes) {
    const Vec g = grad != nullptr ? load(grad + i) * broadcast(scalars.grad_scale) : Vec{};
    Vec m = load(exp_avg + i);
    Vec v{};
    if constexpr (has_exp_avg_sq(kRule)) v = load(exp_avg_sq + i);
    store(weight + i, step(load(weight + i), g, m, v));
    store(exp_avg + i, m);
    if constexpr (has_exp_avg_sq(kRule)) store(exp_avg_sq + i, v);
  }
  float unused = 0.0f;
  for (; i < d_in; ++i) {
    const float g = grad != nullptr ? grad[i] * scalars.grad_scale : 0.0f;
    float& v = has_exp_avg_sq(kRule) ? exp_avg_sq[i] : unused;
    weight[i] = update_weight<kRule>(scalars.step, weight[i], g, exp_avg[i], v);
  }
}

// One moment of one block: its codes in memory, and `floats` [kMomentBlock] in between.
template <class Format, class Moment>
class BlockMoment {
 public:
  BlockMoment(void* codes, int64_t offset, int64_t size, float* scale, float* floats)
      : codes_(static_cast<typename Format::Code*>(codes) + offset),
        size_(size),
        scale_(scale),
        floats_(floats) {}

  float* read() const {
    typename Format::Code whole[kMomentBlock] = {};
    std::memcpy(whole, codes_, bytes());
    Format::template decode<Moment>(whole, scale_ != nullptr ? *scale_ : 1.0f, floats_);
    return floats_;
  }

  void put_back(const uint32_t* random) const {
    typename Format::Code whole[kMomentBlock];
    const float scale = Format::template encode<Moment>(floats_, random, whole);
    if (scale_ != nullptr) *scale_ = scale;
    std::memcpy(codes_, whole, bytes());
  }

 private:
  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(typename Format::Code); }

  typename Format::Code* codes_;
  int64_t size_;
  float* scale_;
  float* floats_;
};

// The blocks of row `latent`: calls function(block, columns of it, place of its scales).
template <class Function>
inline void for_each_block(int64_t d_in, int64_t latent, Function&& function) {
  const int64_t blocks = moment_blocks(d_in);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kMomentBlock;
    const int64_t size = d_in - first < kMomentBlock ? d_in - first : kMomentBlock;
    function(first, size, latent * blocks + block);
  }
}

// The first moment of `size` columns of row `latent` from `first` on, whose scale is at `place`.
template <class Format>
inline BlockMoment<Format, ExpAvg> block_mean(const Moments& moments, int64_t row_start,
                                              int64_t first, int64_t size, int64_t place,
                                              float* floats) {
  float* const scale = moments.type == DType::kUInt8 ? moments.exp_avg_scale + place : nullptr;
  return {moments.exp_avg, row_start + first, size, scale, floats};
}

// The step of row `latent`, block by block.
template <UpdateRule kRule, class Format>
inline void update_blocks(const UpdateScalars& scalars, const float* grad, int64_t d_in,
                          int64_t latent, const Moments& moments, float* weight) {
  const uint32_t seed = moment_seed(*moments.step, latent);
  const int64_t start = latent * d_in;
  for_each_block(d_in, latent, [&](int64_t first, int64_t size, int64_t place) {
    const float* const own_grad = grad != nullptr ? grad + first : nullptr;
    alignas(64) float means[kMomentBlock];
    const auto mean = block_mean<Format>(moments, start, first, size, place, means);
    alignas(64) uint32_t random[kMomentBlock];
    fill_random(seed, first, random);
    if constexpr (has_exp_avg_sq(kRule)) {
      alignas(64) float squares[kMomentBlock];
      const bool scaled = moments.type == DType::kUInt8;
      const BlockMoment<Format, ExpAvgSq> square(
          moments.exp_avg_sq, start + first, size,
          scaled ? moments.exp_avg_sq_scale + place : nullptr, squares);
      update_floats<kRule>(scalars, own_grad, size, weight + first, mean.read(), square.read());
      square.put_back(random);
    } else {
      update_floats<kRule>(scalars, own_grad, size, weight + first, mean.read(), nullptr);
    }
    mean.put_back(random);
  });
}

// The step of row `latent`; weight [d_in] is the row, grad [d_in] its gradient or null.
template <UpdateRule kRule>
inline void update_weights(const UpdateScalars& scalars, const float* grad, int64_t d_in,
                           int64_t latent, const Moments& moments, float* weight) {
  switch (moments.type) {
    case DType::kFloat32: {
      const int64_t start = latent * d_in;
      auto* const squares = static_cast<float*>(moments.exp_avg_sq);
      update_floats<kRule>(scalars, grad, d_in, weight,
                           static_cast<float*>(moments.exp_avg) + start,
                           has_exp_avg_sq(kRule) ? squares + start : nullptr);
      return;
    }
    case DType::kBFloat16:
      update_blocks<kRule, MomentsIn16>(scalars, grad, d_in, latent, moments, weight);
      return;
    default:
      update_blocks<kRule, MomentsIn8>(scalars, grad, d_in, latent, moments, weight);
  }
}

// Floats of scratch that update_scaled_weights needs for a row.
inline int64_t held_floats(UpdateRule rule, DType type, int64_t d_in) {
  const bool needed = scales_with_weights(rule) && type != DType::kFloat32;
  return needed ? moment_blocks(d_in) * kMomentBlock : 0;
}

// row / divisor.
inline void divide_row(float* row, float divisor, int64_t size) {
  const Vec divisors = broadcast(divisor);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(row + i, load(row + i) / divisors);
  for (; i < size; ++i) row[i] /= divisor;
}

// Updates moments in codes, which can be written only when the row's divisor is known: until then
// they are floats in `held`. divide(moments, their number) divides weights and moments.
template <UpdateRule kRule, class Format, class Divide>
inline void update_held_blocks(const UpdateScalars& scalars, const float* grad, int64_t d_in,
                               int64_t latent, const Moments& moments, float* weight, float* held,
                               Divide&& divide) {
  const int64_t start = latent * d_in;
  for_each_block(d_in, latent, [&](int64_t first, int64_t size, int64_t place) {
    block_mean<Format>(moments, start, first, size, place, held + first).read();
  });
  update_floats<kRule>(scalars, grad, d_in, weight, held, nullptr);
  divide(held, d_in);
  const uint32_t seed = moment_seed(*moments.step, latent);
  for_each_block(d_in, latent, [&](int64_t first, int64_t size, int64_t place) {
    alignas(64) uint32_t random[kMomentBlock];
    fill_random(seed, first, random);
    block_mean<Format>(moments, start, first, size, place, held + first).put_back(random);
  });
}

// update_weights where scales_with_weights; held [held_floats].
template <UpdateRule kRule, class Divide>
inline void update_scaled_weights(const UpdateScalars& scalars, const float* grad, int64_t d_in,
                                  int64_t latent, const Moments& moments, float* weight,
                                  float* held, Divide&& divide) {
  switch (moments.type) {
    case DType::kFloat32: {
      auto* const exp_avg = static_cast<float*>(moments.exp_avg) + latent * d_in;
      update_floats<kRule>(scalars, grad, d_in, weight, exp_avg, nullptr);
      divide(exp_avg, d_in);
      return;
    }
    case DType::kBFloat16:
      update_held_blocks<kRule, MomentsIn16>(scalars, grad, d_in, latent, moments, weight, held,
                                             divide);
      return;
    default:
      update_held_blocks<kRule, MomentsIn8>(scalars, grad, d_in, latent, moments, weight, held,
                                            divide);
  }
}

}  // namespace sae_fast::SAE_FAST_ISA
