// CUDA side of decorrelation: its two products, and the kernels round them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "kernels/cuda/decorrelation.h"
#include "ops/cuda.h"
#include "ops/product_cuda.h"

namespace sae_fast::ops {
namespace {

Tensor rows_of(Tensor matrix, int64_t first, int64_t count) {
  return torch::stable::narrow(matrix, 0, first, count);
}

Tensor columns_of(Tensor matrix, int64_t first, int64_t count) {
  return torch::stable::narrow(matrix, 1, first, count);
}

// [D, 2D]: the high halves' product with high and low ones.
Tensor gram_product(const Tensor& halves, const Tensor& like, int64_t d_in, cudaStream_t stream) {
  const int64_t rows = halves.size(0);
  const Tensor total = torch::stable::new_empty(like, {d_in, 2 * d_in});
  const int64_t parts = rows > cuda::kProductRows ? 1 : 0;
  const Tensor part = torch::stable::new_empty(like, {parts * d_in, 2 * d_in});
  for (int64_t first = 0; first < rows; first += cuda::kProductRows) {
    const Tensor chunk = rows_of(halves, first, std::min(cuda::kProductRows, rows - first));
    const Tensor turned = torch::stable::transpose(columns_of(chunk, 0, d_in), 0, 1);
    product_into(first == 0 ? total : part, turned, chunk);
    if (first == 0) continue;
    STD_CUDA_CHECK(cuda::add_product(mutable_data<float>(total), part.const_data_ptr<float>(),
                                     total.numel(), stream));
  }
  return total;
}

// The gradient, some rows at a time.
void write_gradient(const Tensor& grad, const float* W, const Tensor& norms, const Tensor& halves,
                    const Tensor& gram_halves, cudaStream_t stream) {
  constexpr int64_t kRows = 2 * cuda::kProductRows;
  const int64_t rows = grad.size(0);
  const int64_t d_in = grad.size(1);
  const Tensor gram_high = rows_of(gram_halves, d_in, d_in);
  const Tensor high = torch::stable::new_empty(grad, {std::min(kRows, rows), d_in});
  const Tensor mixed = torch::stable::new_empty(grad, {std::min(kRows, rows), d_in});
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = std::min(kRows, rows - first);
    const Tensor chunk = rows_of(halves, first, count);
    product_into(rows_of(high, 0, count), columns_of(chunk, 0, d_in), gram_high);
    product_into(rows_of(mixed, 0, count), chunk, gram_halves);
    STD_CUDA_CHECK(cuda::decorrelation_gradient(
        W + first * d_in, norms.const_data_ptr<float>() + first, high.const_data_ptr<float>(),
        mixed.const_data_ptr<float>(), count, d_in, rows, mutable_data<float>(grad) + first * d_in,
        stream));
  }
}

std::tuple<Tensor, Tensor> decorrelation(const Tensor& W) {
  check_float("decorrelation", "W", W, {kAnySize, kAnySize});
  const DeviceGuard guard(W.get_device_index());
  const int64_t rows = W.size(0);
  const int64_t d_in = W.size(1);
  const Tensor grad = torch::stable::new_empty(W, {rows, d_in});
  const Tensor loss = torch::stable::new_zeros(W, {});
  if (grad.numel() == 0) return {loss, grad};
  const Input weights(W);
  const cudaStream_t stream = current_stream(W);
  const Tensor halves = torch::stable::new_empty(W, {rows, 2 * d_in}, ScalarType::Half);
  const Tensor norms = torch::stable::new_empty(W, {rows});
  const Tensor fourth_powers = torch::stable::new_empty(W, {rows}, ScalarType::Double);
  STD_CUDA_CHECK(cuda::split_unit_rows(weights.data<float>(), rows, d_in, halves.mutable_data_ptr(),
                                       mutable_data<float>(norms),
                                       mutable_data<double>(fourth_powers), stream));
  const Tensor squares = torch::stable::new_empty(W, {d_in}, ScalarType::Double);
  const size_t bytes =
      std::max(cuda::column_squares_scratch_bytes(rows, d_in), cuda::gram_scratch_bytes(d_in));
  const Tensor scratch = new_scratch(W, bytes);
  STD_CUDA_CHECK(cuda::column_squares(weights.data<float>(), norms.const_data_ptr<float>(), rows,
                                      d_in, mutable_data<double>(squares),
                                      scratch.mutable_data_ptr(), stream));
  const Tensor product = gram_product(halves, W, d_in, stream);
  const Tensor gram_halves = torch::stable::new_empty(W, {2 * d_in, d_in}, ScalarType::Half);
  STD_CUDA_CHECK(cuda::split_gram(
      product.const_data_ptr<float>(),
      {squares.const_data_ptr<double>(), fourth_powers.const_data_ptr<double>(), rows}, d_in,
      gram_halves.mutable_data_ptr(), mutable_data<float>(loss), scratch.mutable_data_ptr(),
      stream));
  write_gradient(grad, weights.data<float>(), norms, halves, gram_halves, stream);
  return {loss, grad};
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("decorrelation", TORCH_BOX(&sae_fast::ops::decorrelation));
}
