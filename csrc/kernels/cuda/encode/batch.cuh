// The state that the kernels of one batch's top-k share.
//
// Entries are ordered by a value key (select.cuh: the best has the smallest, those above 0 are up
// to kLastPositive), then by place: token, then latent. The limit is a value key that the wanted-th
// best exact score of the batch certainly reaches: as many lower bounds reach it. An entry is a
// candidate while its upper bound reaches the limit, so no wanted entry is dropped. If a list is
// too small or a bound proves wrong, the whole batch is computed in full.
#pragma once

#include "kernels/cuda/encode/batch.h"
#include "kernels/cuda/encode/product.cuh"

namespace sae_fast::cuda {

using Count = unsigned long long;  // the type of 64-bit atomics

constexpr uint32_t kLastPositive = 0x7ffffffe;  // the key of the least positive value

// Histograms are of 16 bits of a key at a time.
constexpr int kBinBits = 16;
constexpr int kBins = 1 << kBinBits;
constexpr uint64_t kBinMask = kBins - 1;

constexpr uint64_t kNoPlace = ~uint64_t{0};

// An entry's token and latent as one number, by which rows are in order.
struct Places {
  int32_t latent_bits, bits;

  Places(int64_t tokens, int64_t d_sae)
      : latent_bits(bits_of(d_sae)), bits(latent_bits + bits_of(tokens)) {}

  __device__ uint64_t place(int64_t token, int64_t latent) const {
    return static_cast<uint64_t>(token) << latent_bits | static_cast<uint64_t>(latent);
  }
  __device__ int64_t token(uint64_t place) const {
    return static_cast<int64_t>(place >> latent_bits);
  }
  __device__ int32_t latent(uint64_t place) const {
    return static_cast<int32_t>(place & ((uint64_t{1} << latent_bits) - 1));
  }

 private:
  // Of the numbers below count: at most 31 for tokens and for latents.
  static int32_t bits_of(int64_t count) {
    int32_t bits = 0;
    while (int64_t{1} << bits < count) ++bits;
    return bits;
  }
};

// The progress of a radix selection: the leading bits of the last entry that is wanted.
struct Cut {
  uint32_t value, value_bits;  // the bits found so far, and which they are
  uint64_t place, place_bits;
  Count wanted;     // how many are wanted of those with these bits
  int32_t settled;  // all of them: the other bits do not matter

  __device__ bool matches(uint32_t key, uint64_t at) const {
    return (key & value_bits) == value && (at & place_bits) == place;
  }
  // Once it is settled.
  __device__ bool selects(uint32_t key, uint64_t at) const {
    const uint32_t last = value | ~value_bits;
    return key < last || (key == last && at <= (place | ~place_bits));
  }
};

// Numbers of a call that only the device knows.
struct BatchNumbers {
  Count counts[2];  // of the two lists, with entries that found no room
  Count selected;   // entries handed to the final sort
  Cut cut;
  uint32_t limit;        // candidates' upper bounds have a value key up to here
  uint32_t exact_limit;  // as `limit`, from exact scores
  int32_t active;        // the list that grows
  int32_t compacting;    // the other list is to be put through the limit once more
  int32_t wrong;         // a score was outside of its bounds
  int32_t everything;    // no list counts: the whole batch is computed in full
  int32_t full_rows;     // otherwise: how many rows are
};

// Entries in any order; which order never shows in a result.
struct BatchList {
  uint64_t* places;
  float* values;  // the least that the exact score can be; then the exact score
  Count* count;
  int64_t capacity;

  __device__ int64_t size() const { return min(static_cast<int64_t>(*count), capacity); }
};

struct BatchState {
  BatchNumbers* numbers;
  Count* histogram;    // [kBins]
  TokenBound* bounds;  // [N]
  int32_t* rows;       // [N]: those to be computed in full
  uint64_t* places[2];
  float* values[2];  // [capacity] each
  int64_t capacity;
  int64_t tokens;
  Places order;

  BatchState(Scratch& scratch, const BatchSize& size)
      : numbers(scratch.take<BatchNumbers>(1)),
        histogram(scratch.take<Count>(kBins)),
        bounds(scratch.take<TokenBound>(size.tokens)),
        rows(scratch.take<int32_t>(size.tokens)),
        capacity(list_capacity(size)),
        tokens(size.tokens),
        order(size.tokens, size.d_sae) {
    for (int list = 0; list < 2; ++list) {
      places[list] = scratch.take<uint64_t>(capacity);
      values[list] = scratch.take<float>(capacity);
    }
  }

  __device__ BatchList list(int number) const {
    // Not indexed by a variable: that would put the kernel's argument into local memory.
    return {number == 0 ? places[0] : places[1], number == 0 ? values[0] : values[1],
            &numbers->counts[number], capacity};
  }
  __device__ int64_t full_rows() const {
    return numbers->everything != 0 ? tokens : numbers->full_rows;
  }
  __device__ int64_t full_row(int64_t i) const { return numbers->everything != 0 ? i : rows[i]; }

 private:
  // The rounding error of bfloat16 lets through up to 3 times the wanted number at d_in 4096, and
  // an eighth more between tightenings (estimated, not measured). Never more than all entries.
  static int64_t list_capacity(const BatchSize& size) {
    return std::min(6 * size.wanted() + (int64_t{1} << 12), size.tokens * size.d_sae);
  }
};

// The most that an entry's exact score can be, from the least.
template <bool kExact>
__device__ inline float high_of(float low, const TokenBound& token, const Encoder& encoder,
                                int64_t latent) {
  if constexpr (kExact) {
    return low + 2.0f * token.error(latent_bound(encoder, latent));
  } else {
    return low;
  }
}

// A warp's way into a list: entries wait in shared memory until there are enough for one atomic
// operation to make room for.
struct Staging {
  static constexpr int kRoom = 4 * kWarpSize;
  uint64_t places[kRoom];
  float values[kRoom];
};

class Appender {
 public:
  __device__ Appender(const BatchList& list, Staging& staging) : list_(list), staging_(staging) {}

  // All lanes of the warp call.
  __device__ void add(bool wanted, uint64_t place, float value) {
    const unsigned lanes = __ballot_sync(kFullWarp, wanted);
    if (lanes == 0) return;
    if (staged_ + kWarpSize > Staging::kRoom) flush();
    if (wanted) {
      const int at = staged_ + __popc(lanes & lanes_before());
      staging_.places[at] = place;
      staging_.values[at] = value;
    }
    staged_ += __popc(lanes);
  }

  __device__ void flush() {
    __syncwarp();  // the entries come from all lanes
    Count start = 0;
    if (lane_index() == 0 && staged_ > 0) {
      start = atomicAdd(list_.count, static_cast<Count>(staged_));
    }
    start = __shfl_sync(kFullWarp, start, 0);
    for (int i = lane_index(); i < staged_; i += kWarpSize) {
      const auto to = static_cast<int64_t>(start) + i;
      if (to >= list_.capacity) break;
      list_.places[to] = staging_.places[i];
      list_.values[to] = staging_.values[i];
    }
    staged_ = 0;
    __syncwarp();  // the room is free again
  }

 private:
  BatchList list_;
  Staging& staging_;
  int staged_ = 0;
};

// ---- steps of a call

inline cudaError_t clear_histogram(const BatchState& state, cudaStream_t stream) {
  return cudaMemsetAsync(state.histogram, 0, kBins * sizeof(Count), stream);
}

// Tightens the limit by what has been counted. A list of more than compact_above entries is put
// through the new limit.
cudaError_t tighten_limit(const Encoder& encoder, const BatchSize& size, const BatchState& state,
                          int64_t compact_above, cudaStream_t stream);

// Puts the exact score in place of each candidate's lower bound; where it cannot matter, a value
// that is not positive. Clears the histogram first.
cudaError_t score_candidates(const Encoder& encoder, const float* x, const BatchSize& size,
                             const BatchState& state, cudaStream_t stream);

}  // namespace sae_fast::cuda
