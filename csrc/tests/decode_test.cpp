// The decoder kernels. Values, weights and x are small integers, so every sum is exact, or NaN and
// infinities, which no order of the sums changes.
#include "tests/testing.h"

namespace sae_fast::testing {
namespace {

struct Result {
  std::vector<float> x_hat, grad_values, squared_error, residual_dot;
  Matrix residual;
};

Result run(const CodeProblem& problem, const cpu::Decoder& decoder, const std::vector<float>& x,
           const cpu::Parallel& parallel) {
  const auto size = static_cast<size_t>(problem.tokens * decoder.d_in);
  const auto entries = static_cast<size_t>(problem.entries());
  Result result{std::vector<float>(size), std::vector<float>(entries),
                std::vector<float>(static_cast<size_t>(problem.tokens)),
                std::vector<float>(entries), Matrix(std::vector<float>(size), decoder.type)};
  const cpu::Code code = problem.code();
  const cpu::Kernels& kernels = cpu::kernels();
  const cpu::Reconstruction to{x.data(), const_cast<void*>(result.residual.data()),
                               result.squared_error.data(), result.residual_dot.data()};
  check(kernels.decode(code, decoder, result.x_hat.data(), parallel) &&
            kernels.decode_backward(code, decoder, x.data(), result.grad_values.data(), parallel) &&
            kernels.reconstruct(code, decoder, to, parallel),
        "decode: out of memory");
  for (size_t i = 0; i < result.residual.elements.size(); ++i) {
    result.residual.values[i] = from_bits(result.residual.elements[i], decoder.type);
  }
  return result;
}

bool same_results(const Result& a, const Result& b) {
  return same_bits_or_nan(a.x_hat, b.x_hat) && same_bits_or_nan(a.grad_values, b.grad_values) &&
         same_bits_or_nan(a.squared_error, b.squared_error) &&
         same_bits_or_nan(a.residual_dot, b.residual_dot) &&
         same_bits_or_nan(a.residual.values, b.residual.values);
}

void check_token(const CodeProblem& problem, const Matrix& W_dec, const std::vector<float>& b_dec,
                 const std::vector<float>& x, const Result& result, int64_t token, int64_t d_in) {
  const cpu::Code code = problem.code();
  double squared_error = 0.0;
  for (int64_t d = 0; d < d_in; ++d) {
    double x_hat = b_dec.empty() ? 0.0 : b_dec[d];
    for (int64_t i = code.begin(token); i < code.end(token); ++i) {
      x_hat += static_cast<double>(code.values[i]) * W_dec.values[code.indices[i] * d_in + d];
    }
    const int64_t at = token * d_in + d;
    check(same(result.x_hat[at], x_hat), "token %ld: x_hat %g, not %g", token, result.x_hat[at],
          x_hat);
    const double residual = x_hat - x[at];
    check(same(result.residual.values[at], residual), "token %ld: residual %g, not %g", token,
          result.residual.values[at], residual);
    squared_error += residual * residual;
  }
  check(same(result.squared_error[token], squared_error), "token %ld: squared error %g, not %g",
        token, result.squared_error[token], squared_error);
  for (int64_t i = code.begin(token); i < code.end(token); ++i) {
    double along_x = 0.0;
    double along_residual = 0.0;
    for (int64_t d = 0; d < d_in; ++d) {
      const double w = W_dec.values[code.indices[i] * d_in + d];
      along_x += w * x[token * d_in + d];
      along_residual += w * result.residual.values[token * d_in + d];
    }
    check(same(result.grad_values[i], along_x), "entry %ld: gradient %g, not %g", i,
          result.grad_values[i], along_x);
    check(same(result.residual_dot[i], along_residual), "entry %ld: dot %g, not %g", i,
          result.residual_dot[i], along_residual);
  }
}

struct DecodeShape {
  int64_t tokens, k, d_in, d_sae;
};

// Few entries a latent, which are decoded row by row; many, in strips; and now and then so many
// latents that strips are narrow, or that they are cut into ranges as well.
DecodeShape any_shape(Random& random, uint64_t seed) {
  if (seed % 20 == 5) return {200, 400, random.integer(1, 70), random.integer(4200, 4800)};
  if (seed % 20 == 15) return {500, 900, random.integer(1, 40), random.integer(8300, 8600)};
  const int64_t d_sae = random.integer(1, random.integer(0, 1) == 1 ? 20 : 200);
  return {random.integer(0, 100), random.integer(1, 30), random.integer(1, 200), d_sae};
}

}  // namespace

void test_decode(uint64_t seed) {
  Random random(seed);
  const DecodeShape shape = any_shape(random, seed);
  const auto [tokens, k, d_in, d_sae] = shape;
  for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const Numbers numbers =
        random.integer(0, 3) == 0 ? Numbers::kIntegersAndSpecials : Numbers::kIntegers;
    CodeProblem problem(random, tokens, k, d_sae, random.integer(0, 1) == 1);
    if (numbers == Numbers::kIntegersAndSpecials) {
      for (float& value : problem.values) value = random.number(numbers);
    }
    const Matrix W_dec(random.numbers(d_sae * d_in, numbers), type);
    const auto b_dec = random.numbers(random.integer(0, 1) * d_in, Numbers::kIntegers);
    const auto x = random.numbers(tokens * d_in, numbers);
    const cpu::Decoder decoder{type, W_dec.data(), b_dec.empty() ? nullptr : b_dec.data(), d_sae,
                               d_in};
    const Result one = run(problem, decoder, x, one_thread());
    check(same_results(one, run(problem, decoder, x, four_threads())),
          "decoding depends on the number of threads");
    for (int64_t n = 0; n < tokens; ++n) check_token(problem, W_dec, b_dec, x, one, n, d_in);
  }
}

}  // namespace sae_fast::testing
