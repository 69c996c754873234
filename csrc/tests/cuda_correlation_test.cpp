// code_correlation and its backward, compiled for the host, their matrix products done as
// tensor cores do: against all pairs of latents in double.
#include "kernels/cuda/correlation.cu"

#include "tests/correlation_problem.h"
#include "tests/cuda_testing.h"

namespace sae_fast::testing {
namespace {

// As ops/correlation_cuda.cpp calls the kernels; h and its like on the device.
class Correlations {
 public:
  Correlations(const CorrelationProblem& problem, int64_t at_once)
      : p(problem),
        at_once(at_once),
        means(stale(p.F, 777.0)),
        inverse_norms(stale(p.F, 777.0f)),
        gram(stale(p.groups() * p.N * p.N, 0.0f)),
        tile_squares(stale(cuda::square_sums(p.N), 0.0)) {
    check_success(
        cuda::latent_moments(p.h.data(), p.N, p.F, means.data(), inverse_norms.data(), nullptr),
        "latent_moments");
  }

  void write_sums(CorrelationResult& result) {
    if (p.split > 0) write_gram(0, p.split, gram.data(), tile_squares.data());
    if (p.groups() == 2) write_gram(p.split, p.F - p.split, gram.data() + p.N * p.N, nullptr);
    const cuda::CorrelationSums sums{
        tile_squares.data(), gram.data(), inverse_norms.data(), p.groups(), p.N, p.F, p.split};
    TestScratch scratch(cuda::correlation_sums_scratch_bytes(sums));
    float within = 777.0f, between = 777.0f;
    check_success(
        cuda::correlation_sums(sums, &within, &between, result.n_active, scratch.data(), nullptr),
        "correlation_sums");
    result.within = static_cast<double>(within);
    result.between = static_cast<double>(between);
  }

  void write_gradient(const float* grad_within, const float* grad_between, float* grad_h) {
    const bool two = p.groups() == 2 && grad_between != nullptr;
    const float* const second = two ? gram.data() + p.N * p.N : nullptr;
    if (!two) grad_between = nullptr;
    if (p.split > 0 && (two || grad_within != nullptr)) {
      const cuda::TokenMatrix matrix{grad_within != nullptr ? gram.data() : nullptr,
                                     second,
                                     grad_within,
                                     grad_between,
                                     p.N,
                                     p.F};
      write_columns(matrix, 0, p.split, grad_h);
    }
    if (two) {
      write_columns({nullptr, gram.data(), nullptr, grad_between, p.N, p.F}, p.split, p.F - p.split,
                    grad_h);
    }
  }

 private:
  cuda::Latents latents(int64_t first, int64_t count) const {
    return {
        p.h.data() + first, means.data() + first, inverse_norms.data() + first, p.N, p.F, count};
  }

  void write_gram(int64_t first, int64_t count, float* to, double* squares_of_tiles) {
    const int64_t N = p.N;
    const int64_t width = std::min(cuda::kProductLatents, (count + 7) / 8 * 8);
    const int64_t chunks = (count + width - 1) / width;
    auto squares = stale(N * chunks, 777.0);
    auto total = stale(N * 2 * N, 777.0f);
    for (int64_t chunk = 0; chunk < chunks; chunk += at_once) {
      const int64_t some = std::min(at_once, chunks - chunk);
      const int64_t columns = some * width;
      const int64_t begin = chunk * width;
      auto halves = stale(2 * N * columns, __half{});
      check_success(
          cuda::split_latents(latents(first + begin, std::min(columns, count - begin)), columns,
                              halves.data(), squares.data() + chunk, chunks, nullptr),
          "split_latents");
      std::vector<float> parts;
      for (int64_t part = 0; part < some; ++part) {
        const __half* const from = halves.data() + part * width;
        const auto product = half_product({from, columns, 1}, {from, 1, columns}, N, width, 2 * N);
        parts.insert(parts.end(), product.begin(), product.end());
      }
      check_success(
          cuda::sum_products(total.data(), parts.data(), N * 2 * N, some, chunk == 0, nullptr),
          "sum_products");
    }
    check_success(cuda::finish_correlation_gram(total.data(), squares.data(), chunks, N, to,
                                                squares_of_tiles, nullptr),
                  "finish_correlation_gram");
  }

  // In two parts where there are enough latents.
  void write_columns(const cuda::TokenMatrix& matrix, int64_t first, int64_t count, float* grad_h) {
    const int64_t N = p.N;
    auto matrix_halves = stale(N * 2 * N, __half{});
    auto scalars = stale(cuda::kMatrixScalars, 777.0);
    check_success(cuda::split_token_matrix(matrix, matrix_halves.data(), scalars.data(), nullptr),
                  "split_token_matrix");
    const int64_t part = (count + 15) / 16 * 8;
    for (int64_t begin = 0; begin < count; begin += part) {
      const cuda::Latents some = latents(first + begin, std::min(part, count - begin));
      const int64_t columns = (some.count + 7) / 8 * 8;
      auto halves = stale(2 * N * columns, __half{});
      check_success(cuda::split_latents(some, columns, halves.data(), nullptr, 0, nullptr),
                    "split_latents");
      const HalfMatrix unit{halves.data(), columns, 1};
      const auto high = half_product({matrix_halves.data() + N, 2 * N, 1}, unit, N, N, columns);
      const auto mixed = half_product({matrix_halves.data(), 2 * N, 1}, unit, N, 2 * N, columns);
      check_success(cuda::correlation_gradient(some, high.data(), mixed.data(), columns,
                                               scalars.data(), grad_h + first + begin, nullptr),
                    "correlation_gradient");
    }
  }

  const CorrelationProblem& p;
  int64_t at_once;  // products
  std::vector<double> means;
  std::vector<float> inverse_norms, gram;
  std::vector<double> tile_squares;
};

}  // namespace

void test_cuda_correlation(uint64_t seed) {
  Random random(seed);
  const CorrelationProblem problem(random, seed % 8 == 0, 70);
  float of_within = random.number(Numbers::kNormal);
  float of_between = random.number(Numbers::kNormal);
  // Whole losses may be scaled by far: their gradient keeps its accuracy.
  const float scale = random.integer(0, 1) == 0 ? 1.0f : 0x1p-40f;
  of_within *= scale;
  of_between *= scale;
  const int64_t which = random.integer(0, 3);
  const float* const grad_within = (which & 1) != 0 ? &of_within : nullptr;
  const float* const grad_between = (which & 2) != 0 ? &of_between : nullptr;
  CorrelationResult result{};
  result.grad_h.assign(problem.h.size(), 0.0f);
  Correlations correlations(problem, random.integer(1, 2));
  correlations.write_sums(result);
  correlations.write_gradient(grad_within, grad_between, result.grad_h.data());
  check_correlation(problem, result, grad_within != nullptr ? *grad_within : 0.0,
                    grad_between != nullptr ? *grad_between : 0.0, 1e-5);
}

}  // namespace sae_fast::testing
