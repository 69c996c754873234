// Products of dense matrices with as many rows as training steps have, on AMX.
#pragma once

#include <cstdint>

#include "kernels/cpu/parallel.h"

namespace sae_fast::cpu {

// A matrix [rows, depth]: element (row, k) is data[row * row_stride + k * depth_stride], and one of
// the strides is 1.
struct Operand {
  const float* data;
  int64_t row_stride, depth_stride;
};

// product [rows, columns] = left [rows, depth] · right [columns, depth]ᵀ + bias, and of that ReLU.
// With `rounded` the operands are rounded to bfloat16, else the product is float32's.
struct DenseProblem {
  Operand left, right;
  int64_t rows, columns, depth;
  bool rounded;
  const float* bias;  // [columns], or null for 0
  bool relu;
  float* product;
};

// kUnsuited: this instruction set has no tiles, or an operand has numbers of 2^100 or more,
// infinities or NaN, and is not rounded; the product was not computed. kNoMemory: for scratch
// space.
enum class DenseResult { kDone, kUnsuited, kNoMemory };

using DenseProduct = DenseResult (*)(const DenseProblem& problem, const Parallel& parallel);

// Adds bias and applies ReLU to a product that was computed elsewhere.
using FinishProduct = void (*)(const DenseProblem& problem, const Parallel& parallel);

}  // namespace sae_fast::cpu
