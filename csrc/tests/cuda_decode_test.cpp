// decode, decode_backward and reconstruct, compiled for the host.
#include "kernels/cuda/decode.cu"

#include "tests/cuda_nodes.h"

namespace sae_fast::testing {
namespace {

// Small integers: every sum is exact in every order, so results are compared bit for bit.
struct DecodeProblem {
  DecodeProblem(Random& random, int64_t k)
      : d_in(std::vector<int64_t>{1, 6, 8, 100, 128, 257,
                                  520}[static_cast<size_t>(random.integer(0, 6))]),
        d_sae(random.integer(1, 30)),
        code(random, random.integer(0, 4), k, d_sae, random.integer(0, 1) == 1),
        W_dec(random.numbers(d_sae * d_in, Numbers::kIntegers), any_type(random)),
        b_dec(random.numbers(d_in, Numbers::kIntegers)),
        x(random.numbers(code.tokens * d_in, Numbers::kIntegers)),
        bias(random.integer(0, 1) == 1 ? b_dec.data() : nullptr),
        tokens(tokens_of(code)) {}

  double weight(int64_t entry, int64_t column) const {
    return W_dec
        .values[static_cast<size_t>(code.indices[static_cast<size_t>(entry)] * d_in + column)];
  }

  std::vector<double> decoded() const {
    std::vector<double> x_hat(static_cast<size_t>(code.tokens * d_in));
    for (size_t i = 0; i < x_hat.size(); ++i) {
      x_hat[i] = bias != nullptr ? bias[i % static_cast<size_t>(d_in)] : 0.0;
    }
    for (int64_t entry = 0; entry < code.entries(); ++entry) {
      const int64_t row = tokens[static_cast<size_t>(entry)] * d_in;
      for (int64_t column = 0; column < d_in; ++column) {
        x_hat[static_cast<size_t>(row + column)] +=
            code.values[static_cast<size_t>(entry)] * weight(entry, column);
      }
    }
    return x_hat;
  }

  // <dense[n], W_dec[index]> of an entry.
  template <class Number>
  double product(const std::vector<Number>& dense, int64_t entry) const {
    double sum = 0.0;
    const int64_t row = tokens[static_cast<size_t>(entry)] * d_in;
    for (int64_t column = 0; column < d_in; ++column) {
      sum += dense[static_cast<size_t>(row + column)] * weight(entry, column);
    }
    return sum;
  }

  int64_t d_in, d_sae;
  CodeProblem code;
  Matrix W_dec;
  std::vector<float> b_dec, x;
  const float* bias;
  std::vector<int64_t> tokens;
};

void test_decode_and_backward(const DecodeProblem& problem) {
  auto x_hat = stale(problem.code.tokens * problem.d_in, 777.0f);
  check_nodes("decode", [&] {
    return cuda::decode(problem.code.values.data(), problem.code.indices.data(),
                        rows_of(problem.code), typed(problem.W_dec), problem.bias, x_hat.data(),
                        problem.d_in, nullptr);
  });
  const std::vector<double> wanted = problem.decoded();
  for (size_t i = 0; i < wanted.size(); ++i) check_near("decode", x_hat[i], wanted[i], 0.0);

  auto grad_values = stale(problem.code.entries(), 777.0f);
  check_success(
      cuda::decode_backward(problem.x.data(), problem.code.indices.data(), rows_of(problem.code),
                            typed(problem.W_dec), grad_values.data(), problem.d_in, nullptr),
      "decode_backward");
  for (int64_t entry = 0; entry < problem.code.entries(); ++entry) {
    check_near("decode_backward", grad_values[static_cast<size_t>(entry)],
               problem.product(problem.x, entry), 0.0);
  }
}

void test_reconstruct(const DecodeProblem& problem) {
  const int64_t elements = problem.code.tokens * problem.d_in;
  auto residual = stale(elements, 777.0f);  // room for any type
  auto squared_error = stale(problem.code.tokens, 777.0f);
  auto residual_dot = stale(problem.code.entries(), 777.0f);
  check_nodes("reconstruct", [&] {
    return cuda::reconstruct(problem.code.values.data(), problem.code.indices.data(),
                             rows_of(problem.code), typed(problem.W_dec), problem.bias,
                             problem.x.data(), residual.data(), squared_error.data(),
                             residual_dot.data(), problem.d_in, nullptr);
  });
  std::vector<double> wanted = problem.decoded();
  auto wanted_error = stale(problem.code.tokens, 0.0);
  const DType type = problem.W_dec.type;
  for (size_t i = 0; i < wanted.size(); ++i) {
    wanted[i] -= problem.x[i];
    wanted_error[i / static_cast<size_t>(problem.d_in)] += wanted[i] * wanted[i];
    float got = residual[i];
    if (type != DType::kFloat32) {
      uint16_t bits = 0;
      std::memcpy(&bits, reinterpret_cast<const char*>(residual.data()) + i * sizeof bits,
                  sizeof bits);
      got = from_bits(bits, type);
    }
    wanted[i] = rounded(static_cast<float>(wanted[i]), type);
    check_near("reconstruct: residual", got, wanted[i], 0.0);
  }
  for (size_t n = 0; n < wanted_error.size(); ++n) {
    check_near("reconstruct: squared_error", squared_error[n], wanted_error[n], 1e-6);
  }
  for (int64_t entry = 0; entry < problem.code.entries(); ++entry) {
    check_near("reconstruct: residual_dot", residual_dot[static_cast<size_t>(entry)],
               problem.product(wanted, entry), 1e-6);
  }
}

}  // namespace

void test_cuda_decode(uint64_t seed) {
  Random random(seed);
  const int64_t k = random.integer(0, 1) == 0 ? random.integer(0, 5) : random.integer(20, 60);
  const DecodeProblem problem(random, k);
  test_decode_and_backward(problem);
  test_reconstruct(problem);
}

}  // namespace sae_fast::testing
