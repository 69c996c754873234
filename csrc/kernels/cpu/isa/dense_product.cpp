// Products of dense matrices on tiles, see sliced_tiles.h.
//
// The depth is divided into passes of equal length. In a pass the left operand's rows are packed
// as a whole, 4096 of them at most, and every thread takes blocks of columns of the product, whose
// part of the right operand it packs into its L2: a strip of the left operand stays in L1 while the
// block's strips pass. What is added to a number of the product, and in which order, depends on the
// depth alone.
#include "kernels/cpu/isa/kernels.h"
#include "kernels/cpu/isa/simd.h"
#include "kernels/cpu/isa/sliced_tiles.h"
#include "kernels/cpu/isa/tasks.h"

namespace sae_fast::SAE_FAST_ISA {
namespace {

// ReLU as torch has it: NaN stays.
inline Vec relu(Vec value) { return value < 0.0f ? Vec{} : value; }

inline Vec load_part(const float* from, int64_t count) {
  return count >= kLanes ? load(from) : load_tail(from, count);
}

inline void store_part(float* to, Vec value, int64_t count) {
  if (count >= kLanes) {
    store(to, value);
  } else {
    store_tail(to, value, count);
  }
}

#if defined(SAE_FAST_TILES)

constexpr int64_t kMostRows = 4096;    // packed at once
constexpr int64_t kMostColumns = 512;  // in a block: less than 1.2 MB of a 2 MB L2

// Asks for large pages for memory of this size that is not yet used: each small page of it would
// cost a fault, and every row of a wide product a page of its own.
void advise_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kWorthwhile = uintptr_t{4} << 20;
  const auto start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (start + kPage - 1) / kPage * kPage;
  const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end >= begin + kWorthwhile) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Format>
class Product {
 public:
  Product(const cpu::DenseProblem& problem, const cpu::Parallel& parallel)
      : problem_(problem), parallel_(parallel) {
    const int64_t all_steps = ceil_div(problem.depth, Format::kStepDepth);
    steps_ = ceil_div(all_steps, ceil_div(all_steps, Format::kMostSteps));
    const int64_t shares = ceil_div(ceil_div(problem.columns, kMostColumns), parallel.threads());
    const int64_t blocks = shares * parallel.threads();
    block_columns_ = ceil_div(ceil_div(problem.columns, blocks), kBlock) * kBlock;
  }

  cpu::DenseResult run() {
    advise_large_pages(problem_.product, problem_.rows * problem_.columns * int64_t{sizeof(float)});
    const int64_t rows = ceil_div(smaller(problem_.rows, kMostRows), kBlock) * kBlock;
    const int64_t row_bytes = steps_ * Format::kStepBytes / kStripRows;
    // Packed rows and their scales: of the left operand, and of each thread's part of the right.
    const int64_t thread_bytes = block_columns_ * (row_bytes + int64_t{sizeof(float)});
    if (!left_.reset(rows * row_bytes) || !left_scales_.reset(rows * int64_t{sizeof(float)}) ||
        !right_.reset(parallel_.threads() * thread_bytes)) {
      return cpu::DenseResult::kNoMemory;
    }
    for (int64_t row = 0; row < problem_.rows; row += kMostRows) {
      const int64_t count = smaller(problem_.rows - row, kMostRows);
      for (int64_t begin = 0; begin < problem_.depth; begin += steps_ * Format::kStepDepth) {
        pack_left(row, count, begin);
        if (is_unsuited_) return cpu::DenseResult::kUnsuited;
        SharedLoop loop(problem_.columns, block_columns_);
        parallel_.for_each(parallel_.threads(), [&](int64_t thread) {
          Tiles tiles;
          char* packed = right_.as<char>(thread * thread_bytes);
          auto* scales = reinterpret_cast<float*>(packed + block_columns_ * row_bytes);
          for (int64_t column; loop.take(column);) {
            multiply_block(tiles, row, count, column, begin, packed, scales);
          }
        });
        if (is_unsuited_) return cpu::DenseResult::kUnsuited;
      }
    }
    return cpu::DenseResult::kDone;
  }

 private:
  static constexpr int64_t kBlock = Format::kBlockStrips * kStripRows;  // multiplied at once

  int64_t strip_bytes() const { return steps_ * Format::kStepBytes; }

  // Packs `rows` rows of an operand from `first` on, and zeros that fill the block up.
  template <bool kRight>
  void pack(const cpu::Operand& operand, int64_t first, int64_t rows, int64_t begin, char* to,
            float* scales) {
    const int64_t depth = smaller(problem_.depth - begin, steps_ * Format::kStepDepth);
    const float* from = operand.data + begin * operand.depth_stride;
    for (int64_t row = 0; row < rows; row += kPackedRows) {
      const RowPart part = {from + (first + row) * operand.row_stride, operand.row_stride,
                            operand.depth_stride, smaller(rows - row, kPackedRows), depth};
      char* part_to = to + row / kStripRows * strip_bytes();
      if (!Format::template pack<kRight>(part, steps_, part_to, scales + row)) {
        __atomic_store_n(&is_unsuited_, true, __ATOMIC_RELAXED);
        return;
      }
    }
    for (int64_t row = ceil_div(rows, kStripRows) * kStripRows; row % kBlock != 0;
         row += kStripRows) {
      std::memset(to + row / kStripRows * strip_bytes(), 0, static_cast<size_t>(strip_bytes()));
    }
  }

  void pack_left(int64_t first, int64_t rows, int64_t begin) {
    parallel_.for_each(ceil_div(rows, kPackedRows), [&](int64_t number) {
      const int64_t row = number * kPackedRows;
      pack<false>(problem_.left, first + row, smaller(rows - row, kPackedRows), begin,
                  left_.as<char>() + row / kStripRows * strip_bytes(),
                  left_scales_.as<float>() + row);
    });
  }

  // All rows that are packed times a block of columns.
  void multiply_block(Tiles& tiles, int64_t first_row, int64_t rows, int64_t first_column,
                      int64_t begin, char* packed, float* scales) {
    const int64_t columns = smaller(problem_.columns - first_column, block_columns_);
    pack<true>(problem_.right, first_column, columns, begin, packed, scales);
    if (__atomic_load_n(&is_unsuited_, __ATOMIC_RELAXED)) return;
    alignas(64) Sum sums[2][Format::kSums];  // one is passed on while the other is made
    Block waiting;
    const int64_t rows_a_step = ceil_div(kBlock, steps_);
    int64_t made = 0;
    for (int64_t row = 0; row < rows; row += kBlock) {
      const char* left = left_.as<char>() + row / kStripRows * strip_bytes();
      for (int64_t column = 0; column < columns; column += kBlock, ++made) {
        Format::multiply(tiles, left, packed + column / kStripRows * strip_bytes(), steps_,
                         sums[made % 2], [&] { pass_on(waiting, rows_a_step, begin); });
        waiting = {sums[made % 2],
                   problem_.product + (first_row + row) * problem_.columns + first_column + column,
                   left_scales_.as<float>() + row,
                   scales + column,
                   first_column + column,
                   smaller(rows - row, kBlock),
                   smaller(columns - column, kBlock),
                   0};
      }
    }
    pass_on(waiting, kBlock, begin);
  }

  using Sum = std::conditional_t<Format::kScaled, int32_t, float>;

  // Sums of `rows` rows; the first `done` rows are part of the product already.
  struct Block {
    const Sum* sums = nullptr;
    float* product = nullptr;
    const float *left_scales = nullptr, *right_scales = nullptr;
    int64_t first_column = 0, rows = 0, columns = 0, done = 0;
  };

  // Adds some rows of the pass from `begin` to the product, or writes them where it is the first.
  // The last pass has bias and ReLU.
  void pass_on(Block& block, int64_t count, int64_t begin) const {
    const bool is_last = begin + steps_ * Format::kStepDepth >= problem_.depth;
    const float* bias = is_last ? problem_.bias : nullptr;
    const int64_t end = smaller(block.done + count, block.rows);
    for (; block.done < end; ++block.done) {
      float* to = block.product + block.done * problem_.columns;
      for (int64_t n = 0; n < block.columns; n += kLanes) {
        const Vec right_scale = Format::kScaled ? load(block.right_scales + n) : Vec{};
        const float left_scale = Format::kScaled ? block.left_scales[block.done] : 0.0f;
        Vec value = Format::product(block.sums, block.done, n, left_scale, right_scale);
        const int64_t left = block.columns - n;
        if (begin > 0) value += load_part(to + n, left);
        if (bias != nullptr) value += load_part(bias + block.first_column + n, left);
        if (is_last && problem_.relu) value = relu(value);
        store_part(to + n, value, left);
      }
    }
  }

  const cpu::DenseProblem& problem_;
  const cpu::Parallel& parallel_;
  int64_t steps_, block_columns_;
  Scratch left_, left_scales_, right_;
  bool is_unsuited_ = false;
};

#endif

}  // namespace

cpu::DenseResult dense_product(const cpu::DenseProblem& problem, const cpu::Parallel& parallel) {
#if defined(SAE_FAST_TILES)
  if (problem.rows == 0 || problem.columns == 0) return cpu::DenseResult::kDone;
  if (problem.depth == 0) return cpu::DenseResult::kUnsuited;
  if (problem.rounded) return Product<BFloat16Pairs>(problem, parallel).run();
  return Product<Int8Slices>(problem, parallel).run();
#else
  (void)problem, (void)parallel;
  return cpu::DenseResult::kUnsuited;
#endif
}

void finish_product(const cpu::DenseProblem& problem, const cpu::Parallel& parallel) {
  if (problem.bias == nullptr && !problem.relu) return;
  parallel.for_each(problem.rows, [&](int64_t row) {
    float* to = problem.product + row * problem.columns;
    for (int64_t n = 0; n < problem.columns; n += kLanes) {
      const int64_t left = problem.columns - n;
      Vec value = load_part(to + n, left);
      if (problem.bias != nullptr) value += load_part(problem.bias + n, left);
      store_part(to + n, problem.relu ? relu(value) : value, left);
    }
  });
}

}  // namespace sae_fast::SAE_FAST_ISA
