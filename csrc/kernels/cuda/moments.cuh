// The moments of one row in an update kernel: read as floats, and written back as they are kept.
// All threads of the block make one for each row, read and write the columns that are their own,
// and call finish.
#pragma once

#include "kernels/common/moments.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace sae_fast::cuda {

// kWidth neighbouring columns of both moments.
template <int kWidth>
struct MomentPair {
  Vector<float, kWidth> exp_avg, exp_avg_sq;
};

template <MomentType kType>
class RowMoments;

template <>
class RowMoments<MomentType::kFloat32> {
 public:
  static constexpr int kSharedRows = 0;

  __device__ RowMoments(const Moments& moments, int64_t latent, int64_t d_in, float* /*shared*/)
      : exp_avg_(static_cast<float*>(moments.exp_avg) + latent * d_in),
        exp_avg_sq_(static_cast<float*>(moments.exp_avg_sq) + latent * d_in) {}

  template <int kWidth>
  __device__ MomentPair<kWidth> read(int column) const {
    return {load<float, kWidth>(exp_avg_ + column), load<float, kWidth>(exp_avg_sq_ + column)};
  }

  template <int kWidth>
  __device__ void write(int column, const MomentPair<kWidth>& pair) const {
    store<float, kWidth>(exp_avg_ + column, pair.exp_avg);
    store<float, kWidth>(exp_avg_sq_ + column, pair.exp_avg_sq);
  }

  template <int kWidth>
  __device__ void finish() const {}

 private:
  float* exp_avg_;
  float* exp_avg_sq_;
};

template <>
class RowMoments<MomentType::kBFloat16> {
 public:
  static constexpr int kSharedRows = 0;

  __device__ RowMoments(const Moments& moments, int64_t latent, int64_t d_in, float* /*shared*/)
      : exp_avg_(static_cast<uint16_t*>(moments.exp_avg) + latent * d_in),
        exp_avg_sq_(static_cast<uint16_t*>(moments.exp_avg_sq) + latent * d_in),
        seed_(moment_seed(*moments.step, latent)) {}

  template <int kWidth>
  __device__ MomentPair<kWidth> read(int column) const {
    return {read_one<kWidth>(exp_avg_ + column), read_one<kWidth>(exp_avg_sq_ + column)};
  }

  template <int kWidth>
  __device__ void write(int column, const MomentPair<kWidth>& pair) const {
    Vector<uint16_t, kWidth> mean, square;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const uint32_t random = moment_random(seed_, static_cast<uint32_t>(column + i));
      mean.at[i] =
          static_cast<uint16_t>(round_moment_to_16<ExpAvg>(float_bits(pair.exp_avg.at[i]), random));
      square.at[i] = static_cast<uint16_t>(
          round_moment_to_16<ExpAvgSq>(float_bits(pair.exp_avg_sq.at[i]), random));
    }
    *reinterpret_cast<Vector<uint16_t, kWidth>*>(exp_avg_ + column) = mean;
    *reinterpret_cast<Vector<uint16_t, kWidth>*>(exp_avg_sq_ + column) = square;
  }

  template <int kWidth>
  __device__ void finish() const {}

 private:
  template <int kWidth>
  __device__ static Vector<float, kWidth> read_one(const uint16_t* from) {
    const auto codes = load<uint16_t, kWidth>(from);
    Vector<float, kWidth> floats;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) floats.at[i] = float_from_bits(uint32_t{codes.at[i]} << 16);
    return floats;
  }

  uint16_t* exp_avg_;
  uint16_t* exp_avg_sq_;
  uint32_t seed_;
};

// A block of columns has one scale, which is known when all of them are: until then the new moments
// are floats in shared memory. Then every warp takes whole blocks of columns.
template <>
class RowMoments<MomentType::kBlocks> {
 public:
  static constexpr int kSharedRows = 2;

  __device__ RowMoments(const Moments& moments, int64_t latent, int64_t d_in, float* shared)
      : exp_avg_{static_cast<uint8_t*>(moments.exp_avg) + latent * d_in,
                 moments.exp_avg_scale + latent * moment_blocks(d_in), shared},
        exp_avg_sq_{static_cast<uint8_t*>(moments.exp_avg_sq) + latent * d_in,
                    moments.exp_avg_sq_scale + latent * moment_blocks(d_in), shared + d_in},
        columns_(static_cast<int>(d_in)),
        seed_(moment_seed(*moments.step, latent)) {}

  template <int kWidth>
  __device__ MomentPair<kWidth> read(int column) const {
    return {exp_avg_.template read<kWidth>(column), exp_avg_sq_.template read<kWidth>(column)};
  }

  template <int kWidth>
  __device__ void write(int column, const MomentPair<kWidth>& pair) const {
    store<float, kWidth>(exp_avg_.floats + column, pair.exp_avg);
    store<float, kWidth>(exp_avg_sq_.floats + column, pair.exp_avg_sq);
  }

  template <int kWidth>
  __device__ void finish() const {
    __syncthreads();
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    for (int block = static_cast<int>(threadIdx.x) / kWarpSize; block < moment_blocks(columns_);
         block += warps) {
      exp_avg_.template encode<kWidth>(block, columns_, seed_);
      exp_avg_sq_.template encode<kWidth>(block, columns_, seed_);
    }
    __syncthreads();  // the next row writes over the floats
  }

 private:
  template <class Moment>
  struct Row {
    uint8_t* codes;
    float* scales;
    float* floats;  // in shared memory

    template <int kWidth>
    __device__ Vector<float, kWidth> read(int column) const {
      const float scale = scales[column / kMomentBlock];
      const auto raw = load<uint8_t, kWidth>(codes + column);
      Vector<float, kWidth> moments;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) moments.at[i] = decode_moment<Moment>(raw.at[i], scale);
      return moments;
    }

    // By one warp; its lanes take kWidth columns each, kParts times.
    template <int kWidth>
    __device__ void encode(int block, int columns, uint32_t seed) const {
      constexpr int kPart = kWarpSize * kWidth;
      constexpr int kParts = static_cast<int>(kMomentBlock) / kPart;
      const int first = block * static_cast<int>(kMomentBlock) +
                        static_cast<int>(threadIdx.x) % kWarpSize * kWidth;
      Vector<float, kWidth> moments[kParts];
      uint32_t largest = 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        moments[part] = {};
        const int column = first + part * kPart;
        if (column < columns) moments[part] = load<float, kWidth>(floats + column);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          largest = max(largest, float_bits(moments[part].at[i]) & kMagnitude);
        }
      }
      const float scale = float_from_bits(block_scale_bits<Moment>(warp_max(largest)));
      if (threadIdx.x % kWarpSize == 0) scales[block] = scale;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int column = first + part * kPart;
        if (column >= columns) continue;
        Vector<uint8_t, kWidth> rounded;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const uint32_t random = moment_random(seed, static_cast<uint32_t>(column + i));
          rounded.at[i] = encode_moment<Moment>(moments[part].at[i], scale, random);
        }
        *reinterpret_cast<Vector<uint8_t, kWidth>*>(codes + column) = rounded;
      }
    }
  };

  Row<ExpAvg> exp_avg_;
  Row<ExpAvgSq> exp_avg_sq_;
  int columns_;
  uint32_t seed_;
};

// Adam on kWidth weights of a row; returns the new ones, which are not stored yet.
template <int kWidth, MomentType kType>
__device__ inline Vector<float, kWidth> update_weights(const RowMoments<kType>& moments,
                                                       const AdamStep& adam, int column,
                                                       Vector<float, kWidth> weights,
                                                       const Vector<float, kWidth>& gradient) {
  auto pair = moments.template read<kWidth>(column);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    weights.at[i] =
        adam_update(adam, weights.at[i], gradient.at[i], pair.exp_avg.at[i], pair.exp_avg_sq.at[i]);
  }
  moments.template write<kWidth>(column, pair);
  return weights;
}

}  // namespace sae_fast::cuda
