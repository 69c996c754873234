// The moments of one row in an update kernel: read as floats, and written back as they are kept.
// All threads of the block make one for each row, read and write their columns of it, and call
// finish with the row's divisor.
#pragma once

#include <type_traits>

#include "kernels/common/moments.h"
#include "kernels/common/update_rule.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace sae_fast::cuda {

// The memory of a moment: its codes, and for kUInt8 its scales and a row of shared memory.
struct MomentPlace {
  void* codes;    // [F, D]
  float* scales;  // [F, moment_blocks(D)]
  float* shared;  // [D]
  int64_t latent, d_in;
  uint32_t seed;  // of the row's random bits; not for kFloat32
};

template <DType kType, class Moment>
class RowMoment;

template <class Moment>
class RowMoment<DType::kFloat32, Moment> {
 public:
  static constexpr int kSharedRows = 0;

  __device__ explicit RowMoment(const MomentPlace& place)
      : floats_(static_cast<float*>(place.codes) + place.latent * place.d_in) {}

  template <int kWidth>
  __device__ Vector<float, kWidth> read(int column) const {
    return load_once<float, kWidth>(floats_ + column);
  }

  template <int kWidth>
  __device__ void write(int column, const Vector<float, kWidth>& moments) const {
    store_once(floats_ + column, moments);
  }

 private:
  float* floats_;
};

template <class Moment>
class RowMoment<DType::kBFloat16, Moment> {
 public:
  static constexpr int kSharedRows = 0;

  __device__ explicit RowMoment(const MomentPlace& place)
      : codes_(static_cast<uint16_t*>(place.codes) + place.latent * place.d_in),
        seed_(place.seed) {}

  template <int kWidth>
  __device__ Vector<float, kWidth> read(int column) const {
    const auto codes = load_once<uint16_t, kWidth>(codes_ + column);
    Vector<float, kWidth> moments;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) moments.at[i] = float_from_bits(uint32_t{codes.at[i]} << 16);
    return moments;
  }

  template <int kWidth>
  __device__ void write(int column, const Vector<float, kWidth>& moments) const {
    Vector<uint16_t, kWidth> codes;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const uint32_t random = moment_random(seed_, static_cast<uint32_t>(column + i));
      codes.at[i] =
          static_cast<uint16_t>(round_moment_to_16<Moment>(float_bits(moments.at[i]), random));
    }
    store_once(codes_ + column, codes);
  }

 private:
  uint16_t* codes_;
  uint32_t seed_;
};

// A block of columns has one scale, which is known when all of them are: until then the new moments
// are floats in shared memory. Then every warp takes whole blocks of columns.
template <class Moment>
class RowMoment<DType::kUInt8, Moment> {
 public:
  static constexpr int kSharedRows = 1;

  __device__ explicit RowMoment(const MomentPlace& place)
      : codes_(static_cast<uint8_t*>(place.codes) + place.latent * place.d_in),
        scales_(place.scales + place.latent * moment_blocks(place.d_in)),
        floats_(place.shared),
        columns_(static_cast<int>(place.d_in)),
        seed_(place.seed) {}

  template <int kWidth>
  __device__ Vector<float, kWidth> read(int column) const {
    const float scale = scales_[column / kMomentBlock];
    const auto raw = load_once<uint8_t, kWidth>(codes_ + column);
    Vector<float, kWidth> moments;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) moments.at[i] = decode_moment<Moment>(raw.at[i], scale);
    return moments;
  }

  template <int kWidth>
  __device__ void write(int column, const Vector<float, kWidth>& moments) const {
    store<float, kWidth>(floats_ + column, moments);
  }

  // By one warp, when all of the block's floats are written; its lanes take kWidth columns each,
  // kParts times.
  template <int kWidth>
  __device__ void encode(int block) const {
    constexpr int kPart = kWarpSize * kWidth;
    constexpr int kParts = static_cast<int>(kMomentBlock) / kPart;
    const int first =
        block * static_cast<int>(kMomentBlock) + static_cast<int>(threadIdx.x) % kWarpSize * kWidth;
    Vector<float, kWidth> moments[kParts];
    uint32_t largest = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      moments[part] = {};
      const int column = first + part * kPart;
      if (column < columns_) moments[part] = load<float, kWidth>(floats_ + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        largest = max(largest, float_bits(moments[part].at[i]) & kMagnitude);
      }
    }
    const float scale = float_from_bits(block_scale_bits<Moment>(warp_max(largest)));
    if (threadIdx.x % kWarpSize == 0) scales_[block] = scale;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int column = first + part * kPart;
      if (column >= columns_) continue;
      Vector<uint8_t, kWidth> rounded;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const uint32_t random = moment_random(seed_, static_cast<uint32_t>(column + i));
        rounded.at[i] = encode_moment<Moment>(moments[part].at[i], scale, random);
      }
      store_once(codes_ + column, rounded);
    }
  }

 private:
  uint8_t* codes_;
  float* scales_;
  float* floats_;  // in shared memory
  int columns_;
  uint32_t seed_;
};

// In place of the moment that a rule does not have.
class NoMoment {
 public:
  static constexpr int kSharedRows = 0;

  __device__ explicit NoMoment(const MomentPlace& /*place*/) {}

  template <int kWidth>
  __device__ Vector<float, kWidth> read(int /*column*/) const {
    return {};
  }

  template <int kWidth>
  __device__ void write(int /*column*/, const Vector<float, kWidth>& /*moments*/) const {}

  template <int kWidth>
  __device__ void encode(int /*block*/) const {}
};

template <DType kType>
using MomentCode =
    std::conditional_t<kType == DType::kFloat32, float,
                       std::conditional_t<kType == DType::kUInt8, uint8_t, uint16_t>>;

// Fetches a row's codes into L2.
template <UpdateRule kRule, DType kType>
__device__ inline void prefetch_moments(const Moments& moments, int64_t start, int columns) {
  using Code = MomentCode<kType>;
  prefetch_row(static_cast<const Code*>(moments.exp_avg) + start, columns);
  if constexpr (has_exp_avg_sq(kRule)) {
    prefetch_row(static_cast<const Code*>(moments.exp_avg_sq) + start, columns);
  }
}

// Both moments of a row, or the one that the rule has.
template <UpdateRule kRule, DType kType>
class RowMoments {
  using Mean = RowMoment<kType, ExpAvg>;
  using Square = std::conditional_t<has_exp_avg_sq(kRule), RowMoment<kType, ExpAvgSq>, NoMoment>;
  // A moment that is divided with the row is written after that; until then it is in shared memory.
  static constexpr bool kHeld = scales_with_weights(kRule);
  static_assert(!kHeld || !has_exp_avg_sq(kRule), "one row is held");

 public:
  // [kSharedRows, D] of shared memory
  static constexpr int kSharedRows = kHeld ? 1 : Mean::kSharedRows + Square::kSharedRows;

  __device__ RowMoments(const Moments& moments, int64_t latent, int64_t d_in, float* shared)
      : RowMoments(moments, latent, d_in, shared,
                   kType == DType::kFloat32 ? 0 : moment_seed(*moments.step, latent)) {}

  // The step of kWidth weights of the row; returns the new ones, which are not stored yet.
  template <int kWidth>
  __device__ Vector<float, kWidth> update(const UpdateStep& step, int column,
                                          Vector<float, kWidth> weights,
                                          const Vector<float, kWidth>& gradient) const {
    auto mean = mean_.template read<kWidth>(column);
    auto square = square_.template read<kWidth>(column);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      weights.at[i] =
          update_weight<kRule>(step, weights.at[i], gradient.at[i], mean.at[i], square.at[i]);
    }
    if constexpr (kHeld) {
      store<float, kWidth>(held_ + column, mean);
    } else {
      mean_.template write<kWidth>(column, mean);
    }
    square_.template write<kWidth>(column, square);
    return weights;
  }

  template <int kWidth>
  __device__ void finish(float divisor) const {
    if constexpr (kHeld) {
      for (int column = static_cast<int>(threadIdx.x) * kWidth; column < columns_;
           column += static_cast<int>(blockDim.x) * kWidth) {
        auto mean = load<float, kWidth>(held_ + column);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) mean.at[i] /= divisor;
        mean_.template write<kWidth>(column, mean);
      }
    }
    if constexpr (kType == DType::kUInt8) {
      __syncthreads();
      const int warps = static_cast<int>(blockDim.x) / kWarpSize;
      const auto blocks = static_cast<int>(moment_blocks(columns_));
      for (int block = static_cast<int>(threadIdx.x) / kWarpSize; block < blocks; block += warps) {
        mean_.template encode<kWidth>(block);
        square_.template encode<kWidth>(block);
      }
      __syncthreads();  // the next row writes over the floats
    }
  }

 private:
  __device__ RowMoments(const Moments& moments, int64_t latent, int64_t d_in, float* shared,
                        uint32_t seed)
      : mean_({moments.exp_avg, moments.exp_avg_scale, shared, latent, d_in, seed}),
        square_({moments.exp_avg_sq, moments.exp_avg_sq_scale, shared + d_in, latent, d_in, seed}),
        held_(shared),
        columns_(static_cast<int>(d_in)) {}

  Mean mean_;
  Square square_;
  float* held_;
  int columns_;
};

}  // namespace sae_fast::cuda
