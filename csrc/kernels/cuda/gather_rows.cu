#include "kernels/cuda/gather_rows.h"

#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kGatherThreads = 256;
constexpr int kGatherRows = kGatherThreads / kWarpSize;
constexpr int kGatherWidth = 8;

// One warp a row. A difference and then a product leave nothing to fuse: the bits are the CPU's.
template <typename Element, int kWidth>
__global__ void __launch_bounds__(kGatherThreads)
    gather_rows_kernel(const Element* __restrict__ source, const int64_t* __restrict__ rows,
                       const int64_t* __restrict__ places, const float* __restrict__ mean,
                       float scale, float* __restrict__ out, int64_t count, int64_t d_in) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kGatherRows;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kGatherRows + threadIdx.x / kWarpSize;
  for (; i < count; i += stride) {
    const Element* const from = source + rows[i] * d_in;
    float* const to = out + (places == nullptr ? i : places[i]) * d_in;
    for (int64_t column = lane * kWidth; column < d_in; column += kWarpSize * kWidth) {
      auto numbers = load_floats<Element, kWidth>(from + column);
      if (mean != nullptr) {
        const auto shift = load<float, kWidth>(mean + column);
#pragma unroll
        for (int p = 0; p < kWidth; ++p) numbers.at[p] -= shift.at[p];
      }
#pragma unroll
      for (int p = 0; p < kWidth; ++p) numbers.at[p] *= scale;
      store<float, kWidth>(to + column, numbers);
    }
  }
}

}  // namespace

cudaError_t gather_rows(TypedPointer source, const int64_t* rows, const int64_t* places,
                        const float* mean, float scale, float* out, int64_t count, int64_t d_in,
                        cudaStream_t stream) {
  return with_rows<kGatherWidth>(source, d_in, {mean, out}, [&](const auto* typed, auto width) {
    using Element = std::decay_t<decltype(*typed)>;
    constexpr int kWidth = decltype(width)::value;
    return launch(gather_rows_kernel<Element, kWidth>, ceil_div<int64_t>(count, kGatherRows),
                  kGatherThreads, 0, stream, typed, rows, places, mean, scale, out, count, d_in);
  });
}

}  // namespace sae_fast::cuda
