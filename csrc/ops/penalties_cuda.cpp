// CUDA side of the penalties: torch's products, and the kernels before and after them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>

#include "kernels/cuda/correlation.h"
#include "kernels/cuda/decorrelation.h"
#include "ops/cuda.h"
#include "ops/penalties.h"
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
void write_decorrelation_gradient(const Tensor& grad, const float* W, const Tensor& norms,
                                  const Tensor& halves, const Tensor& gram_halves,
                                  cudaStream_t stream) {
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
  write_decorrelation_gradient(grad, weights.data<float>(), norms, halves, gram_halves, stream);
  return {loss, grad};
}

// Floats of the products that are in memory at once, more where one product has more.
constexpr int64_t kProductFloats = int64_t{1} << 24;

// Tensor cores want rows of a multiple of 16 bytes; the columns behind the last are zeros.
int64_t padded(int64_t columns) { return (columns + 7) / 8 * 8; }

// Dense codes, and what brings their latents to unit length.
struct Codes {
  const float* h;
  const double* means;
  const float* inverse_norms;
  int64_t tokens, d_sae;

  cuda::Latents latents(int64_t first, int64_t count) const {
    return {h + first, means + first, inverse_norms + first, tokens, d_sae, count};
  }
};

// The Gram matrix of latents [first, first + count), count > 0: its products in order of the
// latents, several at once.
void write_gram(const Codes& codes, int64_t first, int64_t count, const Tensor& like, float* gram,
                double* tile_squares, cudaStream_t stream) {
  const int64_t N = codes.tokens;
  const int64_t width = std::min(cuda::kProductLatents, padded(count));
  const int64_t chunks = (count + width - 1) / width;
  const int64_t at_once = std::clamp(kProductFloats / (2 * N * N), int64_t{1}, chunks);
  const Tensor squares = torch::stable::new_empty(like, {N, chunks}, ScalarType::Double);
  const Tensor total = torch::stable::new_empty(like, {N, 2 * N});
  for (int64_t chunk = 0; chunk < chunks; chunk += at_once) {
    const int64_t some = std::min(at_once, chunks - chunk);
    const int64_t begin = chunk * width;
    const Tensor halves = torch::stable::new_empty(like, {2 * N, some * width}, ScalarType::Half);
    STD_CUDA_CHECK(cuda::split_latents(
        codes.latents(first + begin, std::min(some * width, count - begin)), some * width,
        halves.mutable_data_ptr(), mutable_data<double>(squares) + chunk, chunks, stream));
    const Tensor parts = torch::stable::new_empty(like, {some, N, 2 * N});
    Tensor split =
        torch::stable::transpose(torch::stable::view(halves, {2 * N, some, width}), 0, 1);
    products_into(parts, torch::stable::narrow(split, 1, 0, N),
                  torch::stable::transpose(split, 1, 2));
    STD_CUDA_CHECK(cuda::sum_products(mutable_data<float>(total), parts.const_data_ptr<float>(),
                                      total.numel(), some, chunk == 0, stream));
  }
  STD_CUDA_CHECK(cuda::finish_correlation_gram(total.const_data_ptr<float>(),
                                               squares.const_data_ptr<double>(), chunks, N, gram,
                                               tile_squares, stream));
}

using Correlations = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Correlations code_correlation(const Tensor& h, int64_t split) {
  check_groups("code_correlation", h, split);
  const DeviceGuard guard(h.get_device_index());
  const int64_t N = h.size(0);
  const int64_t d_sae = h.size(1);
  const int64_t groups = gram_matrices(h, split);
  // Zeros where no kernel writes: h is empty, or the first group, which then has no matrix.
  const bool blank = h.numel() == 0 || split == 0;
  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return blank ? torch::stable::new_zeros(h, sizes, type)
                 : torch::stable::new_empty(h, sizes, type);
  };
  const Tensor within = make({}, ScalarType::Float);
  const Tensor between = make({}, ScalarType::Float);
  const Tensor n_active = make({2}, ScalarType::Long);
  const Tensor means = make({d_sae}, ScalarType::Double);
  const Tensor inverse_norms = make({d_sae}, ScalarType::Float);
  const Tensor gram = make({groups, N, N}, ScalarType::Float);
  const Tensor tile_squares = make({cuda::square_sums(N)}, ScalarType::Double);
  const Correlations result{within, between, n_active, means, inverse_norms, gram};
  if (h.numel() == 0) return result;
  const Input rows(h);
  const cudaStream_t stream = current_stream(h);
  STD_CUDA_CHECK(cuda::latent_moments(rows.data<float>(), N, d_sae, mutable_data<double>(means),
                                      mutable_data<float>(inverse_norms), stream));
  const Codes codes{rows.data<float>(), means.const_data_ptr<double>(),
                    inverse_norms.const_data_ptr<float>(), N, d_sae};
  auto* const matrices = mutable_data<float>(gram);
  if (split > 0) {
    write_gram(codes, 0, split, h, matrices, mutable_data<double>(tile_squares), stream);
  }
  if (groups == 2) {
    write_gram(codes, split, d_sae - split, h, matrices + N * N, nullptr, stream);
  }
  const cuda::CorrelationSums sums{tile_squares.const_data_ptr<double>(),
                                   matrices,
                                   codes.inverse_norms,
                                   groups,
                                   N,
                                   d_sae,
                                   split};
  const Tensor scratch = new_scratch(h, cuda::correlation_sums_scratch_bytes(sums));
  STD_CUDA_CHECK(
      cuda::correlation_sums(sums, mutable_data<float>(within), mutable_data<float>(between),
                             mutable_data<int64_t>(n_active), scratch.mutable_data_ptr(), stream));
  return result;
}

// Columns [first, first + count) of the gradient, some at a time.
void write_correlation_gradient(const Codes& codes, const cuda::TokenMatrix& matrix, int64_t first,
                                int64_t count, const Tensor& grad_h, cudaStream_t stream) {
  const int64_t N = codes.tokens;
  const Tensor scalars =
      torch::stable::new_empty(grad_h, {cuda::kMatrixScalars}, ScalarType::Double);
  Tensor matrix_halves = torch::stable::new_empty(grad_h, {N, 2 * N}, ScalarType::Half);
  STD_CUDA_CHECK(cuda::split_token_matrix(matrix, matrix_halves.mutable_data_ptr(),
                                          mutable_data<double>(scalars), stream));
  const int64_t at_once = std::max(cuda::kProductLatents, kProductFloats / N / 8 * 8);
  for (int64_t begin = 0; begin < count; begin += at_once) {
    const cuda::Latents latents = codes.latents(first + begin, std::min(at_once, count - begin));
    const int64_t columns = padded(latents.count);
    Tensor halves = torch::stable::new_empty(grad_h, {2 * N, columns}, ScalarType::Half);
    STD_CUDA_CHECK(
        cuda::split_latents(latents, columns, halves.mutable_data_ptr(), nullptr, 0, stream));
    const Tensor high = torch::stable::new_empty(grad_h, {N, columns});
    const Tensor mixed = torch::stable::new_empty(grad_h, {N, columns});
    product_into(high, torch::stable::narrow(matrix_halves, 1, N, N),
                 torch::stable::narrow(halves, 0, 0, N));
    product_into(mixed, matrix_halves, halves);
    STD_CUDA_CHECK(cuda::correlation_gradient(
        latents, high.const_data_ptr<float>(), mixed.const_data_ptr<float>(), columns,
        scalars.const_data_ptr<double>(), mutable_data<float>(grad_h) + first + begin, stream));
  }
}

Tensor code_correlation_backward(const OptionalTensor& grad_within,
                                 const OptionalTensor& grad_between, const Tensor& h, int64_t split,
                                 const Tensor& means, const Tensor& inverse_norms,
                                 const Tensor& gram) {
  constexpr const char* kOp = "code_correlation_backward";
  check_correlation(kOp, grad_within, grad_between, h, split, means, inverse_norms, gram);
  check_same_device(kOp, {{"h", h},
                          {"grad_within", grad_within},
                          {"grad_between", grad_between},
                          {"means", means},
                          {"inverse_norms", inverse_norms},
                          {"gram", gram}});
  const DeviceGuard guard(h.get_device_index());
  const int64_t N = h.size(0);
  const int64_t d_sae = h.size(1);
  const bool two = split < d_sae && grad_between.has_value();
  const bool one = split > 0 && (two || grad_within.has_value());
  const bool all_written = (one || split == 0) && (two || split == d_sae);
  const Tensor grad_h = all_written ? torch::stable::new_empty(h, {N, d_sae})
                                    : torch::stable::new_zeros(h, {N, d_sae});
  if (h.numel() == 0) return grad_h;
  const Input rows(h), all_means(means), inverse(inverse_norms), matrices(gram);
  const Input of_within(grad_within), of_between(grad_between);
  const Codes codes{rows.data<float>(), all_means.data<double>(), inverse.data<float>(), N, d_sae};
  const cudaStream_t stream = current_stream(h);
  const auto* const first = matrices.data<float>();
  const float* const grad_pairs = two ? of_between.data<float>() : nullptr;
  if (one) {
    const cuda::TokenMatrix matrix{grad_within.has_value() ? first : nullptr,
                                   two ? first + N * N : nullptr,
                                   of_within.data<float>(),
                                   grad_pairs,
                                   N,
                                   d_sae};
    write_correlation_gradient(codes, matrix, 0, split, grad_h, stream);
  }
  if (two) {
    const cuda::TokenMatrix matrix{nullptr, first, nullptr, grad_pairs, N, d_sae};
    write_correlation_gradient(codes, matrix, split, d_sae - split, grad_h, stream);
  }
  return grad_h;
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("decorrelation", TORCH_BOX(&sae_fast::ops::decorrelation));
  m.impl("code_correlation", TORCH_BOX(&sae_fast::ops::code_correlation));
  m.impl("code_correlation_backward", TORCH_BOX(&sae_fast::ops::code_correlation_backward));
}
