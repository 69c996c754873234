// The batches of a stream at one instruction set: one pass over each row, which stays in registers
// between being read as stored and written as float.
#include "kernels/cpu/isa/gather.h"
#include "kernels/cpu/isa/kernels.h"

namespace sae_fast::SAE_FAST_ISA {
namespace {

constexpr int64_t kRowsPerTask = 32;
// Rows are fetched this far ahead: they lie anywhere in a pool far larger than the caches.
constexpr int64_t kAhead = 4;

template <bool kHasMean>
Vec standardized(Vec value, Vec mean, Vec scale) {
  return kHasMean ? (value - mean) * scale : value * scale;
}

template <bool kHasMean, class T>
void write_row(const T* from, const float* mean, float scale, int64_t d_in, float* to) {
  const Vec factor = broadcast(scale);
  int64_t i = 0;
  for (; i + kLanes <= d_in; i += kLanes) {
    const Vec shift = kHasMean ? load(mean + i) : Vec{};
    store(to + i, standardized<kHasMean>(load(from + i), shift, factor));
  }
  if (i == d_in) return;
  const Vec shift = kHasMean ? load_tail(mean + i, d_in - i) : Vec{};
  store_tail(to + i, standardized<kHasMean>(load_tail(from + i, d_in - i), shift, factor),
             d_in - i);
}

template <bool kHasMean, class T>
void gather_task(const cpu::RowGather& gather, int64_t begin, int64_t end) {
  const int64_t d_in = gather.d_in;
  const auto* source = static_cast<const T*>(gather.source);
  const auto row_bytes = d_in * static_cast<int64_t>(sizeof(T));
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < gather.count) prefetch_row(source + gather.rows[i + kAhead] * d_in, row_bytes);
    const int64_t place = gather.places == nullptr ? i : gather.places[i];
    write_row<kHasMean>(source + gather.rows[i] * d_in, gather.mean, gather.scale, d_in,
                        gather.out + place * d_in);
  }
}

}  // namespace

void gather_rows(const cpu::RowGather& gather, const cpu::Parallel& parallel) {
  const int64_t tasks = (gather.count + kRowsPerTask - 1) / kRowsPerTask;
  parallel.for_each(tasks, [&](int64_t task) {
    const int64_t begin = task * kRowsPerTask;
    const int64_t end = begin + kRowsPerTask < gather.count ? begin + kRowsPerTask : gather.count;
    with_element(gather.type, [&](auto element) {
      using T = decltype(element);
      if (gather.mean != nullptr) {
        gather_task<true, T>(gather, begin, end);
      } else {
        gather_task<false, T>(gather, begin, end);
      }
      return true;
    });
  });
}

}  // namespace sae_fast::SAE_FAST_ISA
