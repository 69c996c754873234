#include "kernels/cuda/decode.h"

#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kMaxWidth = 8;
constexpr int kDecodeThreads = 256;
constexpr int kBackwardThreads = 256;
constexpr int kReconstructThreads = 128;
// Blocks that a multiprocessor's registers must hold: its shared memory rarely holds more, and left
// to itself the assembler spills in pursuit of an occupancy that shared memory forbids.
constexpr int kReconstructBlocks = 5;

// Rows of W_dec whose products one warp sums together: enough loads in flight to cover memory's
// latency, and the dense row is read once for all of them.
constexpr int kDotsAtOnce = 4;
constexpr int kStagedDotsAtOnce = 8;

// ---- kernels

__device__ inline int64_t first_entry(const CodeRows& code, int64_t row) {
  return code.offsets != nullptr ? code.offsets[row] : row * code.k;
}

// sum += values[e] * row indices[e] for e in [begin, end), in ascending e. W_column is W_dec plus
// the caller's first column.
template <typename Weight, int kWidth>
__device__ void add_rows(Vector<float, kWidth>& sum, const float* __restrict__ values,
                         const int32_t* __restrict__ indices, int64_t begin, int64_t end,
                         const Weight* __restrict__ W_column, int64_t d_in) {
#pragma unroll 4
  for (int64_t entry = begin; entry < end; ++entry) {
    add_scaled(sum, values[entry], load<Weight, kWidth>(W_column + indices[entry] * d_in));
  }
}

// dots[e] = <dense_row, W_dec[indices[e]]> for e in [begin, end), kDotsAtOnce by each of the
// block's warps in turn.
template <typename Dense, typename Weight, int kWidth>
__device__ void row_dots(const Dense* dense_row, const int32_t* __restrict__ indices, int64_t begin,
                         int64_t end, const Weight* __restrict__ W_dec, int64_t d_in,
                         float* __restrict__ dots) {
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int64_t first = begin + warp * kDotsAtOnce; first < end; first += warps * kDotsAtOnce) {
    const Weight* rows[kDotsAtOnce];
#pragma unroll
    for (int i = 0; i < kDotsAtOnce; ++i) {  // past the end, the last row once more
      rows[i] = W_dec + indices[min(first + i, end - 1)] * d_in;
    }
    float sums[kDotsAtOnce] = {};
    for (int64_t column = lane * kWidth; column < d_in; column += kWarpSize * kWidth) {
      const auto dense = load_floats<Dense, kWidth>(dense_row + column);
#pragma unroll
      for (int i = 0; i < kDotsAtOnce; ++i) {
        sums[i] = add_dot(sums[i], dense, load<Weight, kWidth>(rows[i] + column));
      }
    }
    const float sum = warp_sums<kDotsAtOnce>(sums);
    const int64_t entry = first + owned_sum<kDotsAtOnce>();
    if (stores_sum<kDotsAtOnce>() && entry < end) dots[entry] = sum;
  }
}

// One warp a (row, 32 * kWidth columns).
template <typename Weight, int kWidth>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_kernel(const float* __restrict__ values, const int32_t* __restrict__ indices,
                  CodeRows code, const Weight* __restrict__ W_dec, const float* __restrict__ b_dec,
                  float* __restrict__ x_hat, int64_t d_in) {
  constexpr int kWarps = kDecodeThreads / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t chunks = ceil_div<int64_t>(d_in, kWarpSize * kWidth);
  const int64_t tasks = code.rows * chunks;
  int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  for (; task < tasks; task += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t row = task / chunks;
    const int64_t column = ((task - row * chunks) * kWarpSize + lane) * kWidth;
    if (column >= d_in) continue;
    Vector<float, kWidth> sum{};
    if (b_dec != nullptr) sum = load<float, kWidth>(b_dec + column);
    add_rows(sum, values, indices, first_entry(code, row), first_entry(code, row + 1),
             W_dec + column, d_in);
    store<float, kWidth>(x_hat + row * d_in + column, sum);
  }
}

// One block a row; a warp takes kDotsAtOnce entries.
template <typename Weight, int kWidth>
__global__ void __launch_bounds__(kBackwardThreads)
    decode_backward_kernel(const float* __restrict__ grad, const int32_t* __restrict__ indices,
                           CodeRows code, const Weight* __restrict__ W_dec,
                           float* __restrict__ grad_values, int64_t d_in) {
  for (int64_t row = blockIdx.x; row < code.rows; row += gridDim.x) {
    row_dots<float, Weight, kWidth>(grad + row * d_in, indices, first_entry(code, row),
                                    first_entry(code, row + 1), W_dec, d_in, grad_values);
  }
}

// Shared memory of reconstruct: the first `capacity` entries of a row of the code, and for each
// warp its columns of their rows of W_dec. A lane reads back only what it copied itself, so the
// copies need no barrier. A row's further entries are read from memory a second time.
template <typename Weight, int kWidth>
struct Stage {
  Vector<Weight, kWidth>* tiles;  // [warps, capacity, 32]
  float* dots;                    // [warps, capacity]: this warp's columns' share of residual_dot
  float* values;                  // [capacity]
  int32_t* indices;               // [capacity]

  __device__ Stage(void* shared, int warps, int capacity) {
    tiles = static_cast<Vector<Weight, kWidth>*>(shared);
    dots = reinterpret_cast<float*>(tiles + warps * capacity * kWarpSize);
    values = dots + warps * capacity;
    indices = reinterpret_cast<int32_t*>(values + capacity);
  }

  static size_t bytes(int warps, int capacity) {
    const size_t warp_entry = sizeof(Vector<Weight, kWidth>) * kWarpSize + sizeof(float);
    return static_cast<size_t>(capacity) *
           (static_cast<size_t>(warps) * warp_entry + sizeof(float) + sizeof(int32_t));
  }
};

template <typename Weight, int kWidth>
__device__ inline void copy_async(Vector<Weight, kWidth>* to, const Weight* from) {
  if constexpr (sizeof(Vector<Weight, kWidth>) >= 4) {
    __pipeline_memcpy_async(to, from, sizeof(Vector<Weight, kWidth>));
  } else {  // no asynchronous copy is that short
    *to = load<Weight, kWidth>(from);
  }
}

// One warp's 32 * kWidth columns of a row: returns the lane's share of the squared error.
// `tile` and `dots` are the warp's own; staged entries are begin .. begin + staged - 1.
template <typename Weight, int kWidth>
__device__ float reconstruct_columns(
    const float* __restrict__ values, const int32_t* __restrict__ indices, int64_t begin,
    int64_t end, int staged, const Stage<Weight, kWidth>& stage, Vector<Weight, kWidth>* tile,
    float* dots, const Weight* __restrict__ W_column, const float* __restrict__ b_column,
    const float* __restrict__ x_column, Weight* residual_column, int64_t d_in, bool active) {
  Vector<float, kWidth> sum{};
  float error = 0.0f;
  if (active) {
    for (int i = 0; i < staged; ++i) {
      copy_async(tile + i * kWarpSize, W_column + stage.indices[i] * d_in);
    }
    __pipeline_commit();
    const auto x = load<float, kWidth>(x_column);
    if (b_column != nullptr) sum = load<float, kWidth>(b_column);
    add_rows(sum, values, indices, begin + staged, end, W_column, d_in);
    __pipeline_wait_prior(0);
#pragma unroll 4
    for (int i = 0; i < staged; ++i) add_scaled(sum, stage.values[i], tile[i * kWarpSize]);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum.at[i] -= x.at[i];
    error = add_dot(0.0f, sum, sum);
    sum = store<Weight, kWidth>(residual_column, sum);
  }
  for (int first = 0; first < staged; first += kStagedDotsAtOnce) {
    float products[kStagedDotsAtOnce] = {};
    if (active) {
#pragma unroll
      for (int i = 0; i < kStagedDotsAtOnce; ++i) {
        products[i] = add_dot(0.0f, sum, tile[min(first + i, staged - 1) * kWarpSize]);
      }
    }
    const float product = warp_sums<kStagedDotsAtOnce>(products);
    const int entry = first + owned_sum<kStagedDotsAtOnce>();
    if (stores_sum<kStagedDotsAtOnce>() && entry < staged) dots[entry] += product;
  }
  return error;
}

// One block a row of x; its warps share the row's columns.
template <typename Weight, int kWidth>
__global__ void __launch_bounds__(kReconstructThreads, kReconstructBlocks)
    reconstruct_kernel(const float* __restrict__ values, const int32_t* __restrict__ indices,
                       CodeRows code, const Weight* __restrict__ W_dec,
                       const float* __restrict__ b_dec, const float* __restrict__ x,
                       Weight* residual, float* __restrict__ squared_error,
                       float* __restrict__ residual_dot, int64_t d_in, int capacity) {
  __shared__ float errors[kReconstructThreads / kWarpSize];
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const Stage<Weight, kWidth> stage(dynamic_shared_memory(), warps, capacity);
  Vector<Weight, kWidth>* const tile = stage.tiles + warp * capacity * kWarpSize + lane;
  float* const dots = stage.dots + warp * capacity;

  for (int64_t row = blockIdx.x; row < code.rows; row += gridDim.x) {
    const int64_t begin = first_entry(code, row);
    const int64_t end = first_entry(code, row + 1);
    const int staged = static_cast<int>(min(end - begin, static_cast<int64_t>(capacity)));
    for (int i = static_cast<int>(threadIdx.x); i < staged; i += static_cast<int>(blockDim.x)) {
      stage.values[i] = values[begin + i];
      stage.indices[i] = indices[begin + i];
    }
    for (int i = lane; i < staged; i += kWarpSize) dots[i] = 0.0f;
    __syncthreads();

    float error = 0.0f;
    const int64_t stride = static_cast<int64_t>(warps) * kWarpSize * kWidth;
    for (int64_t first = warp * kWarpSize * kWidth; first < d_in; first += stride) {
      const int64_t column = first + lane * kWidth;
      error += reconstruct_columns<Weight, kWidth>(
          values, indices, begin, end, staged, stage, tile, dots, W_dec + column,
          b_dec != nullptr ? b_dec + column : nullptr, x + row * d_in + column,
          residual + row * d_in + column, d_in, column < d_in);
    }
    error = block_sum(error, errors);  // its barriers publish the dots and the residual too
    if (threadIdx.x == 0) squared_error[row] = error;
    for (int i = static_cast<int>(threadIdx.x); i < staged; i += static_cast<int>(blockDim.x)) {
      float dot = 0.0f;
      for (int w = 0; w < warps; ++w) dot += stage.dots[w * capacity + i];
      residual_dot[begin + i] = dot;
    }
    row_dots<Weight, Weight, kWidth>(residual + row * d_in, indices, begin + staged, end, W_dec,
                                     d_in, residual_dot);
    __syncthreads();  // the stage is free for the next row
  }
}

// ---- launchers

// Returns how many entries a block of reconstruct stages: a typical row's number, if two blocks
// still fit into a multiprocessor's shared memory. It depends on shapes and on the device's kind
// alone, so results are the same in every run.
template <typename Weight, int kWidth>
cudaError_t staging_capacity(const CodeRows& code, int warps, int* capacity) {
  int block_limit = 0;
  int total = 0;
  int reserved = 0;
  cudaError_t error = cudaSuccess;
  const auto query = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = device_attribute(value, attribute);
  };
  query(&block_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  query(&total, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  query(&reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  if (error != cudaSuccess) return error;
  const int errors_bytes = static_cast<int>(sizeof(float)) * kReconstructThreads / kWarpSize;
  const int budget = std::min(block_limit, total / 2 - reserved) - errors_bytes;
  // Rows of a compressed code differ: half more than the mean covers most.
  const int64_t mean = ceil_div(code.entries, code.rows);
  const int64_t wanted = code.offsets != nullptr ? mean + mean / 2 : code.k;
  const auto entry_bytes = static_cast<int>(Stage<Weight, kWidth>::bytes(warps, 1));
  *capacity = static_cast<int>(std::min<int64_t>(wanted, budget / entry_bytes));
  return cudaSuccess;
}

}  // namespace

cudaError_t decode(const float* values, const int32_t* indices, CodeRows code, TypedPointer W_dec,
                   const float* b_dec, float* x_hat, int64_t d_in, cudaStream_t stream) {
  if (d_in == 0) return cudaSuccess;
  return with_rows<kMaxWidth>(W_dec, d_in, {b_dec, x_hat}, [&](const auto* weights, auto width) {
    using Weight = std::decay_t<decltype(*weights)>;
    constexpr int kWidth = decltype(width)::value;
    const int64_t warps = code.rows * ceil_div<int64_t>(d_in, kWarpSize * kWidth);
    return launch(decode_kernel<Weight, kWidth>,
                  ceil_div<int64_t>(warps, kDecodeThreads / kWarpSize), kDecodeThreads, 0, stream,
                  values, indices, code, weights, b_dec, x_hat, d_in);
  });
}

cudaError_t decode_backward(const float* grad, const int32_t* indices, CodeRows code,
                            TypedPointer W_dec, float* grad_values, int64_t d_in,
                            cudaStream_t stream) {
  return with_rows<kMaxWidth>(W_dec, d_in, {grad}, [&](const auto* weights, auto width) {
    using Weight = std::decay_t<decltype(*weights)>;
    constexpr int kWidth = decltype(width)::value;
    return launch(decode_backward_kernel<Weight, kWidth>, code.rows, kBackwardThreads, 0, stream,
                  grad, indices, code, weights, grad_values, d_in);
  });
}

cudaError_t reconstruct(const float* values, const int32_t* indices, CodeRows code,
                        TypedPointer W_dec, const float* b_dec, const float* x, void* residual,
                        float* squared_error, float* residual_dot, int64_t d_in,
                        cudaStream_t stream) {
  if (code.rows == 0) return cudaSuccess;
  return with_rows<kMaxWidth>(
      W_dec, d_in, {b_dec, x, residual}, [&](const auto* weights, auto width) {
        using Weight = std::decay_t<decltype(*weights)>;
        constexpr int kWidth = decltype(width)::value;
        const int64_t chunks = ceil_div<int64_t>(d_in, kWarpSize * kWidth);
        const int warps =
            static_cast<int>(std::clamp<int64_t>(chunks, 1, kReconstructThreads / kWarpSize));
        int capacity = 0;
        const cudaError_t error = staging_capacity<Weight, kWidth>(code, warps, &capacity);
        if (error != cudaSuccess) return error;
        return launch(reconstruct_kernel<Weight, kWidth>, code.rows, warps * kWarpSize,
                      Stage<Weight, kWidth>::bytes(warps, capacity), stream, values, indices, code,
                      weights, b_dec, x, static_cast<Weight*>(residual), squared_error,
                      residual_dot, d_in, capacity);
      });
}

}  // namespace sae_fast::cuda
