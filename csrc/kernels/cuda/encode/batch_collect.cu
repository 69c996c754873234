// The batch's candidates: each chunk of the product is counted, so that the limit tightens, and
// what still reaches the limit is listed.
#include "kernels/cuda/encode/batch.cuh"
#include "kernels/cuda/encode/batch_find.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kScanThreads = 256;
constexpr int kScanWarps = kScanThreads / kWarpSize;
constexpr int kCompactBlocks = 512;

// The work of a pass over a chunk.
enum class Work { kCount, kCollect, kBoth };

// The least value that a pass visits. Only lower bounds in a better bin than the limit's count:
// those in the limit's bin could not tighten it.
template <Work kWork>
__device__ inline float least_value(uint32_t limit, float error) {
  if constexpr (kWork == Work::kCount) {
    const uint32_t first_of_bin = limit >> kBinBits << kBinBits;
    return value_of_key(first_of_bin == 0 ? 0 : first_of_bin - 1);
  } else {
    return value_of_key(limit) - error;
  }
}

// Bounds on the exact scores of a lane's columns of a strip.
struct Bounds {
  Columns low, high;
};

template <bool kExact>
__device__ inline Bounds bounds_of(const Columns& values, unsigned bits, int64_t latent,
                                   const TokenBound& token, const Encoder& encoder) {
  Bounds bounds{values, values};
  if constexpr (kExact) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      if ((bits >> i & 1u) == 0) continue;
      const float error = token.error(latent_bound(encoder, latent + i));
      bounds.high.at[i] += error;
      bounds.low.at[i] -= error;
      if (bounds.low.at[i] != bounds.low.at[i]) bounds.low.at[i] = -INFINITY;  // nothing is known
    }
  }
  return bounds;
}

// Counts and lists what passed the coarse bound in a strip.
template <bool kExact, bool kVector, Work kWork>
__device__ void scan_strip(const RowSegment& at, int strip, unsigned bits, int64_t row,
                           uint32_t limit, const TokenBound& token, const Encoder& encoder,
                           const BatchState& batch, Appender& list) {
  const int64_t latent = at.latent(strip);
  const Columns values = at.load_strip<kVector>(strip);
  const Bounds bounds = bounds_of<kExact>(values, bits, latent, token, encoder);
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const bool there = (bits >> i & 1u) != 0;
    if constexpr (kWork != Work::kCollect) {
      const uint32_t bin = value_key(bounds.low.at[i]) >> kBinBits;
      if (there && bin < limit >> kBinBits) atomicAdd(&batch.histogram[bin], Count{1});
    }
    if constexpr (kWork != Work::kCount) {
      list.add(there && value_key(bounds.high.at[i]) <= limit, batch.order.place(row, latent + i),
               bounds.low.at[i]);
    }
  }
}

// ---- kernels

// One warp, of which one thread writes.
__global__ void __launch_bounds__(kWarpSize) begin_kernel(BatchNumbers* numbers) {
  if (threadIdx.x != 0) return;
  *numbers = {};
  numbers->limit = kLastPositive;
}

// One thread a token of the block: keeps its bounds for later blocks.
__global__ void __launch_bounds__(kScanThreads)
    add_kernel(int64_t rows, int64_t first_row, const TokenBound* __restrict__ bounds,
               const int32_t* __restrict__ flags, BatchState batch) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kScanThreads;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  for (; row < rows; row += stride) {
    batch.bounds[first_row + row] = bounds[row];
    if ((flags[row] & kMainList) == 0) continue;
    batch.rows[atomicAdd(&batch.numbers->full_rows, 1)] = static_cast<int32_t>(first_row + row);
  }
}

// One warp a row of the chunk. The first chunks, before the limit has tightened, count and list
// most of their entries; later ones cost the loads and one vote a segment. Not measured.
template <bool kExact, bool kVector, Work kWork>
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(Encoder encoder, Product product, int64_t rows, int64_t first_row,
                SegmentState segments, const int32_t* __restrict__ flags, BatchState batch) {
  __shared__ Staging staging[kScanWarps];
  if (batch.numbers->everything != 0) return;
  const uint32_t limit = batch.numbers->limit;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  Appender list(batch.list(batch.numbers->active), staging[warp]);
  RowSegment at{nullptr, encoder.b_enc + product.first_latent, product.first_latent,
                static_cast<int>(product.columns), 0};
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kScanWarps + warp; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kScanWarps) {
    if ((flags[row] & kMainList) != 0) continue;
    const TokenBound token = batch.bounds[first_row + row];
    at.product = product.values + flat_index(row, product.columns, 0);
    for (at.begin = 0; at.begin < at.columns; at.begin += kSegment) {
      Columns values[kStrips];
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) values[strip] = at.load_strip<kVector>(strip);
      const float error = kExact ? token.error(segments.bounds[at.segment()]) : 0.0f;
      const unsigned passed = at.existing() & not_below(values, least_value<kWork>(limit, error));
      if (!__any_sync(kFullWarp, passed != 0)) continue;
#pragma unroll 1
      for (int strip = 0; strip < kStrips; ++strip) {
        const unsigned bits = passed >> strip * kLaneColumns & kLaneMask;
        if (!__any_sync(kFullWarp, bits != 0)) continue;
        scan_strip<kExact, kVector, kWork>(at, strip, bits, first_row + row, limit, token, encoder,
                                           batch, list);
      }
    }
  }
  if constexpr (kWork != Work::kCount) list.flush();
}

// One block. The limit becomes the end of the bin in which the counts reach the wanted number.
__global__ void __launch_bounds__(kFindThreads)
    tighten_kernel(BatchState batch, Count wanted, int64_t compact_above) {
  __shared__ FindShared shared;
  const Bin found = find_bin(batch.histogram, wanted, shared);
  if (threadIdx.x != 0) return;
  BatchNumbers& numbers = *batch.numbers;
  if (found.bin < kBins) {
    const auto last = static_cast<uint32_t>(found.bin << kBinBits | static_cast<int>(kBinMask));
    numbers.limit = min(numbers.limit, last);
  }
  const Count count = numbers.counts[numbers.active];
  if (count > static_cast<Count>(batch.capacity)) numbers.everything = 1;
  const bool compacting = count > static_cast<Count>(compact_above) && numbers.everything == 0;
  numbers.compacting = compacting ? 1 : 0;
  if (!compacting) return;
  numbers.active = 1 - numbers.active;
  numbers.counts[numbers.active] = 0;
}

// One warp 32 entries of the list that was active.
template <bool kExact>
__global__ void __launch_bounds__(kScanThreads) compact_kernel(Encoder encoder, BatchState batch) {
  __shared__ Staging staging[kScanWarps];
  if (batch.numbers->compacting == 0) return;
  const uint32_t limit = batch.numbers->limit;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const BatchList from = batch.list(1 - batch.numbers->active);
  Appender to(batch.list(batch.numbers->active), staging[warp]);
  const int64_t size = from.size();
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kScanWarps + warp) * kWarpSize;
       first < size; first += static_cast<int64_t>(gridDim.x) * kScanThreads) {
    const int64_t i = first + lane_index();
    uint64_t place = 0;
    float low = -INFINITY;
    bool keep = false;
    if (i < size) {
      place = from.places[i];
      low = from.values[i];
      const TokenBound token = batch.bounds[batch.order.token(place)];
      const float high = high_of<kExact>(low, token, encoder, batch.order.latent(place));
      keep = value_key(high) <= limit;
    }
    to.add(keep, place, low);
  }
  to.flush();
}

// ---- launchers

template <Work kWork>
cudaError_t scan(const Encoder& encoder, const Product& product, int64_t rows, int64_t first_row,
                 const EncodeState& block, const BatchState& batch, cudaStream_t stream) {
  const bool fits = vectors_fit(product.columns, kLaneColumns, {product.values, encoder.b_enc});
  const auto start = [&](auto* kernel) {
    return launch(kernel, ceil_div<int64_t>(rows, kScanWarps), kScanThreads, 0, stream, encoder,
                  product, rows, first_row, block.segments, block.fallback.flags, batch);
  };
  if (encoder.exact) {
    return start(fits ? scan_kernel<true, true, kWork> : scan_kernel<true, false, kWork>);
  }
  return start(fits ? scan_kernel<false, true, kWork> : scan_kernel<false, false, kWork>);
}

EncodeState block_state(const Encoder& encoder, const Tokens& tokens, const BlockScratch& block) {
  Scratch pieces(block.data);
  return EncodeState(pieces, tokens.rows, encoder.d_sae, 0, block.k_aux);
}

BatchState batch_state(const BatchSize& size, void* scratch) {
  Scratch pieces(scratch);
  return BatchState(pieces, size);
}

}  // namespace

cudaError_t tighten_limit(const Encoder& encoder, const BatchSize& size, const BatchState& state,
                          int64_t compact_above, cudaStream_t stream) {
  const cudaError_t error = launch(tighten_kernel, 1, kFindThreads, 0, stream, state,
                                   static_cast<Count>(size.wanted()), compact_above);
  if (error != cudaSuccess) return error;
  return launch(encoder.exact ? compact_kernel<true> : compact_kernel<false>, kCompactBlocks,
                kScanThreads, 0, stream, encoder, state);
}

cudaError_t begin_batch(const BatchSize& size, void* scratch, cudaStream_t stream) {
  const BatchState state = batch_state(size, scratch);
  const cudaError_t error = clear_histogram(state, stream);
  if (error != cudaSuccess) return error;
  return launch(begin_kernel, 1, kWarpSize, 0, stream, state.numbers);
}

cudaError_t add_block(const Encoder& encoder, const Tokens& tokens, const BatchSize& size,
                      const BlockScratch& block, void* scratch, cudaStream_t stream) {
  const EncodeState from = block_state(encoder, tokens, block);
  return launch(add_kernel, ceil_div<int64_t>(tokens.rows, kScanThreads), kScanThreads, 0, stream,
                tokens.rows, block.first_row, from.bounds, from.fallback.flags,
                batch_state(size, scratch));
}

cudaError_t select_batch(const Encoder& encoder, const Tokens& tokens, const BatchSize& size,
                         const Product& product, bool tighten, const BlockScratch& block,
                         void* scratch, cudaStream_t stream) {
  const EncodeState from = block_state(encoder, tokens, block);
  const BatchState batch = batch_state(size, scratch);
  if (!tighten) {
    return scan<Work::kBoth>(encoder, product, tokens.rows, block.first_row, from, batch, stream);
  }
  cudaError_t error =
      scan<Work::kCount>(encoder, product, tokens.rows, block.first_row, from, batch, stream);
  if (error == cudaSuccess) {
    error = tighten_limit(encoder, size, batch, batch.capacity / 2, stream);
  }
  if (error == cudaSuccess) {
    error =
        scan<Work::kCollect>(encoder, product, tokens.rows, block.first_row, from, batch, stream);
  }
  return error;
}

}  // namespace sae_fast::cuda
