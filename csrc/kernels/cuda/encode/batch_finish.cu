// The end of a batch's top-k: the wanted-th best of the exact scores is found by radix selection,
// and the selected entries are ordered by counting: how many every row has, where it begins, and
// each entry into a place of its row that atomics give it; then every row by latent.
#include "kernels/cuda/encode/batch.cuh"
#include "kernels/cuda/encode/batch_find.cuh"
#include "kernels/cuda/encode/score.cuh"
#include "kernels/cuda/ordering.cuh"

namespace sae_fast::cuda {
namespace {

constexpr int kEndThreads = 256;
constexpr int kEndWarps = kEndThreads / kWarpSize;
constexpr int kEndBlocks = 1024;

// Calls visit(value, place) for every entry of the rows that are computed in full. All warps of
// the grid share the latents; the weights come from the cache for all rows but one.
template <typename Weight, bool kVector, typename Visit>
__device__ void visit_full_rows(const Encoder& encoder, const Weight* __restrict__ weights,
                                const float* __restrict__ x, const BatchState& batch,
                                Visit&& visit) {
  const int64_t rows = batch.full_rows();
  if (rows == 0) return;
  const auto last = static_cast<int32_t>(encoder.d_sae - 1);
  const int64_t groups = ceil_div<int64_t>(encoder.d_sae, kScoresAtOnce);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kEndWarps;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * kEndWarps + threadIdx.x / kWarpSize;
       group < groups; group += warps) {
    const auto first = static_cast<int32_t>(group * kScoresAtOnce);
    int32_t latents[kScoresAtOnce];
#pragma unroll
    for (int s = 0; s < kScoresAtOnce; ++s) latents[s] = s < last - first ? first + s : last;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = batch.full_row(i);
      const float score = score_latents<Weight, kVector>(
          x + flat_index(token, encoder.d_in, 0), encoder.b_dec, weights, latents, encoder.d_in);
      const int number = owned_sum<kScoresAtOnce>();
      if (!stores_sum<kScoresAtOnce>() || number > last - first) continue;
      const int32_t latent = first + number;
      visit(score + encoder.b_enc[latent], batch.order.place(token, latent));
    }
  }
}

// Calls visit(value, place) for every entry of the active list, with all lanes of a warp: those
// beyond the end have a value that is not positive.
template <typename Visit>
__device__ void visit_list(const BatchState& batch, Visit&& visit) {
  if (batch.numbers->everything != 0) return;
  const BatchList list = batch.list(batch.numbers->active);
  const int64_t size = list.size();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kEndThreads + threadIdx.x - lane_index();
       first < size; first += static_cast<int64_t>(gridDim.x) * kEndThreads) {
    const int64_t i = first + lane_index();
    const bool there = i < size;
    visit(there ? list.values[i] : -INFINITY, there ? list.places[i] : kNoPlace);
  }
}

// The digit of a pass: of the value key, or of the place.
struct Digit16 {
  bool of_value;
  int32_t shift;

  __device__ void count(const BatchState& batch, const Cut& cut, float value,
                        uint64_t place) const {
    const uint32_t key = value_key(value);
    if (key > kLastPositive || !cut.matches(key, place)) return;
    const uint64_t bits = of_value ? key : place;
    atomicAdd(&batch.histogram[bits >> shift & kBinMask], Count{1});
  }
};

__device__ inline bool is_selected(const Cut& cut, float value, uint64_t place) {
  const uint32_t key = value_key(value);
  return key <= kLastPositive && cut.selects(key, place);
}

// ---- kernels: selection

// Calls in this process that have computed their whole batch in full, on each device: such a call
// gives the same result, many times slower, and the host would not notice it.
__device__ Count full_batches = 0;

__global__ void __launch_bounds__(kWarpSize) read_full_batches_kernel(int64_t* __restrict__ count) {
  if (threadIdx.x == 0) *count = static_cast<int64_t>(full_batches);
}

// One warp, of which one thread writes. From here on it is known whether the lists count:
// tighten_limit has seen whether they had room for everything.
__global__ void __launch_bounds__(kWarpSize) begin_cut_kernel(BatchState batch, Count wanted) {
  if (threadIdx.x != 0) return;
  BatchNumbers& numbers = *batch.numbers;
  if (numbers.wrong != 0) numbers.everything = 1;
  if (numbers.everything != 0) atomicAdd(&full_batches, Count{1});
  numbers.cut = {};
  numbers.cut.wanted = wanted;
  numbers.cut.place_bits = ~uint64_t{0} << batch.order.bits;  // no place has these
}

__global__ void __launch_bounds__(kEndThreads) count_list_kernel(BatchState batch, Digit16 digit) {
  const Cut cut = batch.numbers->cut;
  if (cut.settled != 0) return;
  visit_list(batch, [&](float value, uint64_t place) { digit.count(batch, cut, value, place); });
}

template <typename Weight, bool kVector>
__global__ void __launch_bounds__(kEndThreads)
    count_rows_kernel(Encoder encoder, const Weight* __restrict__ weights,
                      const float* __restrict__ x, BatchState batch, Digit16 digit) {
  const Cut cut = batch.numbers->cut;
  if (cut.settled != 0) return;
  visit_full_rows<Weight, kVector>(encoder, weights, x, batch, [&](float value, uint64_t place) {
    digit.count(batch, cut, value, place);
  });
}

// One block. Where there are fewer entries than are wanted, none of their bits matters.
__global__ void __launch_bounds__(kFindThreads) cut_kernel(BatchState batch, Digit16 digit) {
  __shared__ FindShared shared;
  Cut& cut = batch.numbers->cut;
  if (cut.settled != 0) return;
  const Bin found = find_bin(batch.histogram, cut.wanted, shared);
  if (threadIdx.x != 0) return;
  cut.settled = found.bin == kBins || cut.wanted - found.before == found.count ? 1 : 0;
  if (found.bin == kBins) return;
  cut.wanted -= found.before;
  if (digit.of_value) {
    cut.value |= static_cast<uint32_t>(found.bin) << digit.shift;
    cut.value_bits |= static_cast<uint32_t>(kBinMask) << digit.shift;
  } else {
    cut.place |= static_cast<uint64_t>(found.bin) << digit.shift;
    cut.place_bits |= kBinMask << digit.shift;
  }
}

// ---- kernels: the code

struct Selected {
  uint64_t* places;  // [N * k]
  float* values;     // [N * k]
  int64_t capacity;

  __device__ BatchList list(const BatchState& batch) const {
    return {places, values, &batch.numbers->selected, capacity};
  }
};

struct RowOrder {
  uint32_t* counts;  // [N + 1]: entries of each row; the last is the launch's ticket
  int32_t* numbers;  // [N * k]: of a selected entry in its row
  int32_t* entries;  // [N * k]: the rows' entries, unordered

  RowOrder(Scratch& scratch, const BatchSize& size)
      : counts(scratch.take<uint32_t>(size.tokens + 1)),
        numbers(scratch.take<int32_t>(size.wanted())),
        entries(scratch.take<int32_t>(size.wanted())) {}
};

__global__ void __launch_bounds__(kEndThreads) take_list_kernel(BatchState batch, Selected to) {
  __shared__ Staging staging[kEndWarps];
  const Cut cut = batch.numbers->cut;
  Appender selected(to.list(batch), staging[threadIdx.x / kWarpSize]);
  visit_list(batch, [&](float value, uint64_t place) {
    selected.add(is_selected(cut, value, place), place, value);
  });
  selected.flush();
}

template <typename Weight, bool kVector>
__global__ void __launch_bounds__(kEndThreads)
    take_rows_kernel(Encoder encoder, const Weight* __restrict__ weights,
                     const float* __restrict__ x, BatchState batch, Selected to) {
  const Cut cut = batch.numbers->cut;
  const BatchList list = to.list(batch);
  visit_full_rows<Weight, kVector>(encoder, weights, x, batch, [&](float value, uint64_t place) {
    if (!is_selected(cut, value, place)) return;
    const auto at = static_cast<int64_t>(atomicAdd(list.count, Count{1}));
    if (at >= list.capacity) return;
    list.places[at] = place;
    list.values[at] = value;
  });
}

// The last block turns the counts into offsets. Room that is left belongs to the last row.
__global__ void __launch_bounds__(kEndThreads)
    count_selected_kernel(BatchState batch, Selected from, RowOrder order,
                          int64_t* __restrict__ offsets) {
  __shared__ int64_t partial[kEndWarps];
  const int64_t size = from.list(batch).size();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kEndThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kEndThreads + threadIdx.x; i < size;
       i += stride) {
    const int64_t row = batch.order.token(from.places[i]);
    order.numbers[i] = static_cast<int32_t>(atomicAdd(&order.counts[row], 1u));
  }
  if (!is_last_block(&order.counts[batch.tokens])) return;
  block_scan<kOrderItems>(
      batch.tokens, partial, [&](int64_t row) { return int64_t{load_written(&order.counts[row])}; },
      [&](int64_t row, int64_t before) { offsets[row] = before; });
  if (threadIdx.x == 0) offsets[batch.tokens] = from.capacity;
}

// Puts entries into their rows, and zeros into the room that is left.
__global__ void __launch_bounds__(kEndThreads)
    place_selected_kernel(BatchState batch, Selected from, RowOrder order, BatchCode code) {
  const int64_t size = from.list(batch).size();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kEndThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kEndThreads + threadIdx.x; i < from.capacity;
       i += stride) {
    if (i < size) {
      const int64_t row = batch.order.token(from.places[i]);
      order.entries[code.offsets[row] + order.numbers[i]] = static_cast<int32_t>(i);
    } else {
      code.values[i] = 0.0f;
      code.indices[i] = 0;
    }
  }
}

__global__ void __launch_bounds__(kOrderThreads)
    order_rows_kernel(BatchState batch, Selected from, RowOrder order, BatchCode code) {
  __shared__ OrderShared shared;
  const int64_t size = from.list(batch).size();
  const auto latent = [&](int64_t i) { return batch.order.latent(from.places[order.entries[i]]); };
  order_lists(
      batch.tokens, shared, [&](int64_t row) { return code.offsets[row]; },
      [&](int64_t row) { return min(code.offsets[row + 1], size); }, latent,
      [&](int64_t i, int64_t to) {
        code.values[to] = from.values[order.entries[i]];
        code.indices[to] = latent(i);
      });
}

// ---- launchers

// The memory that the end of a call needs beside the state.
struct EndScratch {
  BatchState state;
  Selected selected;
  RowOrder order;

  EndScratch(Scratch& scratch, const BatchSize& size)
      : state(scratch, size),
        selected{scratch.take<uint64_t>(size.wanted()), scratch.take<float>(size.wanted()),
                 size.wanted()},
        order(scratch, size) {}
};

// The next digit of the cut. Without anything left to decide its launches return at once.
cudaError_t cut_digit(const Encoder& encoder, const Tokens& tokens, const BatchState& state,
                      const Digit16& digit, cudaStream_t stream) {
  cudaError_t error = clear_histogram(state, stream);
  if (error == cudaSuccess) {
    error = launch(count_list_kernel, kEndBlocks, kEndThreads, 0, stream, state, digit);
  }
  if (error != cudaSuccess) return error;
  error = with_scoring_rows(encoder, tokens, [&](const auto* weights, auto vector) {
    using Weight = std::decay_t<decltype(*weights)>;
    return launch(count_rows_kernel<Weight, decltype(vector)::value>, kEndBlocks, kEndThreads, 0,
                  stream, encoder, weights, tokens.x, state, digit);
  });
  if (error != cudaSuccess) return error;
  return launch(cut_kernel, 1, kFindThreads, 0, stream, state, digit);
}

// Value keys have 31 bits that matter; then, where entries of one value are left over, their
// places decide.
cudaError_t find_cut(const Encoder& encoder, const Tokens& tokens, const BatchSize& size,
                     const BatchState& state, cudaStream_t stream) {
  cudaError_t error =
      launch(begin_cut_kernel, 1, kWarpSize, 0, stream, state, static_cast<Count>(size.wanted()));
  for (int shift = kBinBits; shift >= 0 && error == cudaSuccess; shift -= kBinBits) {
    error = cut_digit(encoder, tokens, state, {true, shift}, stream);
  }
  const int digits = ceil_div(state.order.bits, kBinBits);
  for (int digit = digits - 1; digit >= 0 && error == cudaSuccess; --digit) {
    error = cut_digit(encoder, tokens, state, {false, digit * kBinBits}, stream);
  }
  return error;
}

cudaError_t take_selected(const Encoder& encoder, const Tokens& tokens, const EndScratch& scratch,
                          cudaStream_t stream) {
  const Selected& to = scratch.selected;
  const cudaError_t error =
      launch(take_list_kernel, kEndBlocks, kEndThreads, 0, stream, scratch.state, to);
  if (error != cudaSuccess) return error;
  return with_scoring_rows(encoder, tokens, [&](const auto* weights, auto vector) {
    using Weight = std::decay_t<decltype(*weights)>;
    return launch(take_rows_kernel<Weight, decltype(vector)::value>, kEndBlocks, kEndThreads, 0,
                  stream, encoder, weights, tokens.x, scratch.state, to);
  });
}

cudaError_t order_selected(const EndScratch& scratch, const BatchCode& code, cudaStream_t stream) {
  const auto& [state, selected, order] = scratch;
  const int64_t blocks = ceil_div<int64_t>(std::max<int64_t>(selected.capacity, 1), kEndThreads);
  cudaError_t error = cudaMemsetAsync(
      order.counts, 0, static_cast<size_t>(state.tokens + 1) * sizeof *order.counts, stream);
  if (error == cudaSuccess) {
    error = launch(count_selected_kernel, blocks, kEndThreads, 0, stream, state, selected, order,
                   code.offsets);
  }
  if (error == cudaSuccess) {
    error =
        launch(place_selected_kernel, blocks, kEndThreads, 0, stream, state, selected, order, code);
  }
  if (error != cudaSuccess) return error;
  return launch(order_rows_kernel, ceil_div<int64_t>(state.tokens, kOrderWarps), kOrderThreads, 0,
                stream, state, selected, order, code);
}

}  // namespace

cudaError_t batch_scratch_bytes(const BatchSize& size, size_t* bytes) {
  Scratch scratch(nullptr);
  const EndScratch pieces(scratch, size);
  *bytes = scratch.bytes();
  return cudaSuccess;
}

cudaError_t read_full_batches(int64_t* count, cudaStream_t stream) {
  return launch(read_full_batches_kernel, 1, kWarpSize, 0, stream, count);
}

cudaError_t finish_batch(const Encoder& encoder, const float* x, const BatchSize& size,
                         const BatchCode& code, void* scratch, cudaStream_t stream) {
  Scratch memory(scratch);
  const EndScratch pieces(memory, size);
  const BatchState& state = pieces.state;
  const Tokens tokens{x, nullptr, size.tokens};
  cudaError_t error = cudaSuccess;
  const auto then = [&](auto&& step) {
    if (error == cudaSuccess) error = step();
  };
  then([&] { return tighten_limit(encoder, size, state, 0, stream); });
  then([&] { return score_candidates(encoder, x, size, state, stream); });
  then([&] { return find_cut(encoder, tokens, size, state, stream); });
  then([&] { return take_selected(encoder, tokens, pieces, stream); });
  then([&] { return order_selected(pieces, code, stream); });
  return error;
}

}  // namespace sae_fast::cuda
