#include "kernels/cuda/bookkeeping.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/vector.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kEndThreads = 1024;
constexpr int kStatisticRows = 256;    // of the target, that one block sums
constexpr int64_t kEntryBlocks = 264;  // two a multiprocessor of an H200
constexpr int64_t kRowParts = 128;     // partial sums of weighted_row_sum
constexpr int kSumWidth = 8;

// ---- kernels

struct StatisticSums {
  double* columns;   // [parts, D]: of x - x[0]
  double* squares;   // [parts, tiles of 32 columns]
  int64_t* actives;  // [entry_blocks]
  int64_t parts, tiles, entry_blocks;

  int64_t target_blocks() const { return parts * tiles; }
};

// Sums (x - x[0]) and its square over the rows and the 32 columns of tile `block`.
__device__ void sum_target(const BatchArrays& batch, const StatisticSums& sums, int64_t block,
                           double (*columns)[kWarpSize], double* squares) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t part = block / sums.tiles;
  const int64_t tile = block % sums.tiles;
  const int64_t column = tile * kWarpSize + lane;
  double sum = 0.0;
  double square = 0.0;
  if (column < batch.d_in) {
    const auto first = static_cast<double>(batch.target[column]);
    const int64_t end = min((part + 1) * kStatisticRows, batch.rows);
#pragma unroll 4
    for (int64_t row = part * kStatisticRows + warp; row < end; row += kWarps) {
      const double moved = static_cast<double>(batch.target[row * batch.d_in + column]) - first;
      sum += moved;
      square += moved * moved;
    }
  }
  columns[warp][lane] = sum;
  square = block_sum(square, squares);  // its barriers publish the columns' sums
  if (threadIdx.x == 0) sums.squares[block] = square;
  if (warp != 0 || column >= batch.d_in) return;
  for (int other = 1; other < kWarps; ++other) sum += columns[other][lane];
  sums.columns[part * batch.d_in + column] = sum;
}

__device__ inline bool fires(const BatchArrays& batch, int64_t entry) {
  const float value = batch.values[entry];
  return (batch.is_signed ? fabsf(value) : value) > 0.0f;
}

// Counts the entries that fire.
__device__ void count_entries(const BatchArrays& batch, const StatisticSums& sums, int64_t block,
                              int64_t* actives) {
  int64_t active = 0;
  const int64_t stride = sums.entry_blocks * kThreads;
  for (int64_t entry = block * kThreads + threadIdx.x; entry < batch.entries; entry += stride) {
    if (fires(batch, entry)) ++active;
  }
  active = block_sum(active, actives);
  if (threadIdx.x == 0) sums.actives[block] = active;
}

// The first blocks take a tile of the target each, the others share the entries. All clear `fired`.
__global__ void __launch_bounds__(kThreads)
    partial_statistics_kernel(BatchArrays batch, StatisticSums sums, bool* __restrict__ fired) {
  __shared__ double columns[kWarps][kWarpSize];
  __shared__ double squares[kWarps];
  __shared__ int64_t actives[kWarps];
  const int64_t tiles = sums.parts * sums.tiles;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t latent = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; latent < batch.d_sae; latent += stride) fired[latent] = false;
  for (int64_t block = blockIdx.x; block < tiles + sums.entry_blocks; block += gridDim.x) {
    if (block < tiles) {
      sum_target(batch, sums, block, columns, squares);
    } else {
      count_entries(batch, sums, block - tiles, actives);
    }
    __syncthreads();  // the arrays are free for the next block
  }
}

// One block sums, so that the order of additions depends on shapes alone; the others mark the
// latents that fire.
__global__ void __launch_bounds__(kEndThreads)
    statistics_kernel(BatchArrays batch, StatisticSums sums, float* fvu, float* l0, float* variance,
                      bool* __restrict__ fired) {
  __shared__ double partial[kEndThreads / kWarpSize];
  const int64_t markers = max(static_cast<int64_t>(gridDim.x) - 1, int64_t{1});
  int64_t marker = static_cast<int64_t>(blockIdx.x) - 1;
  if (gridDim.x == 1) marker = 0;
  for (int64_t entry = marker * kEndThreads + threadIdx.x; marker >= 0 && entry < batch.entries;
       entry += markers * kEndThreads) {
    if (fires(batch, entry)) fired[batch.indices[entry]] = true;  // by any number of threads
  }
  if (blockIdx.x != 0) return;
  double error = 0.0;
  for (int64_t row = threadIdx.x; row < batch.rows; row += kEndThreads) {
    error += static_cast<double>(batch.squared_error[row]);
  }
  error = block_sum(error, partial);
  double square = 0.0;
  for (int64_t i = threadIdx.x; i < sums.parts * sums.tiles; i += kEndThreads) {
    square += sums.squares[i];
  }
  square = block_sum(square, partial);
  double centre = 0.0;
  if (sums.parts > 0) {
    for (int64_t column = threadIdx.x; column < batch.d_in; column += kEndThreads) {
      double sum = 0.0;
#pragma unroll 4
      for (int64_t part = 0; part < sums.parts; ++part) {
        sum += sums.columns[part * batch.d_in + column];
      }
      centre += sum * sum;
    }
  }
  centre = block_sum(centre, partial);
  double active = 0.0;  // whole numbers below 2^31
  for (int64_t i = threadIdx.x; i < sums.entry_blocks; i += kEndThreads) {
    active += static_cast<double>(sums.actives[i]);
  }
  active = block_sum(active, partial);
  if (threadIdx.x != 0) return;
  double found = square - centre / static_cast<double>(batch.rows);
  if (found < 0.0) found = 0.0;
  if (batch.given_variance != nullptr) found = static_cast<double>(*batch.given_variance);
  const BatchStatistics statistics =
      sae_fast::batch_statistics({error, found, static_cast<int64_t>(active), batch.rows});
  *fvu = statistics.fvu;
  *l0 = statistics.l0;
  *variance = statistics.variance;
}

// One thread an entry, and one a row.
__global__ void __launch_bounds__(kThreads) code_gradients_kernel(CodeGradients gradients) {
  const int64_t entries = gradients.rows * gradients.k;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i < max(entries, gradients.rows); i += stride) {
    const float* const grads = gradients.grad_error;
    if (i < gradients.rows) gradients.scale[i] = 2.0f * grads[i * gradients.grad_stride];
    if (i >= entries) continue;
    const uint32_t row = static_cast<uint32_t>(i) / static_cast<uint32_t>(gradients.k);
    const float scale = 2.0f * grads[row * gradients.grad_stride];
    gradients.grad_values[i] = gradients.residual_dot[i] * scale;
    gradients.coefficients[i] = gradients.values[i] * scale;
  }
}

// One block a part of the rows and 32 * kWidth columns: each warp sums some of the rows.
template <typename Element, int kWidth>
__global__ void __launch_bounds__(kThreads)
    partial_rows_kernel(const float* __restrict__ weights, const Element* __restrict__ matrix,
                        int64_t rows, int64_t d_in, int64_t tiles, float* __restrict__ partials) {
  __shared__ float sums[kWarps][kWarpSize * kWidth];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int64_t block = blockIdx.x; block < kRowParts * tiles; block += gridDim.x) {
    const int64_t part = block / tiles;
    const int64_t column = (block % tiles) * kWarpSize * kWidth + lane * kWidth;
    const int64_t end = rows * (part + 1) / kRowParts;
    Vector<float, kWidth> sum{};
    if (column < d_in) {
#pragma unroll 4
      for (int64_t row = rows * part / kRowParts + warp; row < end; row += kWarps) {
        add_scaled(sum, weights[row], load<Element, kWidth>(matrix + row * d_in + column));
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[warp][i * kWarpSize + lane] = sum.at[i];
    __syncthreads();
    if (warp == 0 && column < d_in) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        float total = sum.at[i];
        for (int other = 1; other < kWarps; ++other) total += sums[other][i * kWarpSize + lane];
        partials[part * d_in + column + i] = total;
      }
    }
    __syncthreads();
  }
}

// One thread a column.
__global__ void __launch_bounds__(kThreads)
    row_parts_kernel(const float* __restrict__ partials, int64_t d_in, float factor,
                     float* __restrict__ sum) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; column < d_in; column += stride) {
    float total = 0.0f;
#pragma unroll 8
    for (int64_t part = 0; part < kRowParts; ++part) total += partials[part * d_in + column];
    sum[column] = factor * total;
  }
}

// Returns the sum of squares to all threads of a block.
__device__ double sum_squares(const float* __restrict__ numbers, int64_t count, double* partial) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kEndThreads) {
    const auto number = static_cast<double>(numbers[i]);
    sum += number * number;
  }
  return block_sum(sum, partial);
}

// One block in all.
__global__ void __launch_bounds__(kEndThreads) square_kernel(SquareSums sums, double* total) {
  __shared__ double partial[kEndThreads / kWarpSize];
  const double first = sum_squares(sums.first, sums.first_count, partial);
  const double second = sum_squares(sums.second, sums.second_count, partial);
  if (threadIdx.x != 0) return;
  const double before = sums.more != nullptr ? *total + *sums.more : *total;
  *total = before + first + second;
}

// One thread a latent; the first one has the numbers of the step too.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(StepRecord record, StepResults results, int64_t* __restrict__ tokens,
                  const bool* __restrict__ fired, int64_t d_sae, int64_t n_tokens) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t latent = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (latent == 0) sae_fast::finish_step(record, results);
  for (; latent < d_sae; latent += stride) {
    tokens[latent] = fired[latent] ? 0 : tokens[latent] + n_tokens;
  }
}

// ---- launchers

StatisticSums take_sums(Scratch& scratch, const BatchArrays& batch) {
  StatisticSums sums{};
  if (batch.given_variance == nullptr) {
    sums.parts = ceil_div<int64_t>(batch.rows, kStatisticRows);
    sums.tiles = ceil_div<int64_t>(batch.d_in, kWarpSize);
  }
  sums.entry_blocks = std::min(kEntryBlocks, ceil_div<int64_t>(batch.entries, kThreads));
  sums.columns = scratch.take<double>(sums.parts * batch.d_in);
  sums.squares = scratch.take<double>(sums.target_blocks());
  sums.actives = scratch.take<int64_t>(sums.entry_blocks);
  return sums;
}

int64_t blocks_for(int64_t threads) { return ceil_div<int64_t>(threads, kThreads); }

}  // namespace

cudaError_t batch_statistics_scratch_bytes(const BatchArrays& batch, size_t* bytes) {
  Scratch scratch(nullptr);
  take_sums(scratch, batch);
  *bytes = scratch.bytes();
  return cudaSuccess;
}

cudaError_t batch_statistics(const BatchArrays& batch, float* fvu, float* l0, float* variance,
                             bool* fired, void* scratch, cudaStream_t stream) {
  Scratch remaining(scratch);
  const StatisticSums sums = take_sums(remaining, batch);
  const int64_t blocks =
      std::max(sums.target_blocks() + sums.entry_blocks, std::min(kEntryBlocks, batch.d_sae));
  const cudaError_t error =
      launch(partial_statistics_kernel, blocks, kThreads, 0, stream, batch, sums, fired);
  if (error != cudaSuccess) return error;
  const int64_t markers = std::min(kEntryBlocks, ceil_div<int64_t>(batch.entries, kEndThreads));
  return launch(statistics_kernel, 1 + markers, kEndThreads, 0, stream, batch, sums, fvu, l0,
                variance, fired);
}

cudaError_t code_gradients(const CodeGradients& gradients, cudaStream_t stream) {
  const int64_t threads = std::max(gradients.rows * gradients.k, gradients.rows);
  return launch(code_gradients_kernel, blocks_for(threads), kThreads, 0, stream, gradients);
}

cudaError_t weighted_row_sum_scratch_bytes(int64_t d_in, size_t* bytes) {
  Scratch scratch(nullptr);
  scratch.take<float>(kRowParts * d_in);
  *bytes = scratch.bytes();
  return cudaSuccess;
}

cudaError_t weighted_row_sum(const float* weights, TypedPointer matrix, int64_t rows, int64_t d_in,
                             float factor, float* sum, void* scratch, cudaStream_t stream) {
  Scratch remaining(scratch);
  auto* const partials = remaining.take<float>(kRowParts * d_in);
  const cudaError_t error =
      with_rows<kSumWidth>(matrix, d_in, {}, [&](const auto* typed, auto width) {
        using Element = std::decay_t<decltype(*typed)>;
        constexpr int kWidth = decltype(width)::value;
        const int64_t tiles = ceil_div<int64_t>(d_in, kWarpSize * kWidth);
        return launch(partial_rows_kernel<Element, kWidth>, kRowParts * tiles, kThreads, 0, stream,
                      weights, typed, rows, d_in, tiles, partials);
      });
  if (error != cudaSuccess) return error;
  return launch(row_parts_kernel, blocks_for(d_in), kThreads, 0, stream, partials, d_in, factor,
                sum);
}

cudaError_t add_squares(const SquareSums& sums, double* total, cudaStream_t stream) {
  return launch(square_kernel, 1, kEndThreads, 0, stream, sums, total);
}

cudaError_t finish_step(const StepRecord& record, const StepResults& results, int64_t* tokens,
                        const bool* fired, int64_t d_sae, int64_t n_tokens, cudaStream_t stream) {
  return launch(finish_kernel, std::max<int64_t>(blocks_for(d_sae), 1), kThreads, 0, stream, record,
                results, tokens, fired, d_sae, n_tokens);
}

}  // namespace sae_fast::cuda
