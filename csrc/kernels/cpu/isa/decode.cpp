// Decoder kernels at one instruction set. One task a run of tokens; a token's rows of W_dec are
// gathered once and, for the gradient, read again while they are in the cache.
#include "kernels/cpu/isa/gather.h"
#include "kernels/cpu/isa/kernels.h"
#include "kernels/cpu/isa/token_strips.h"

namespace sae_fast::SAE_FAST_ISA {
namespace {

constexpr int64_t kTokensPerTask = 32;

template <class Function>
void for_each_token(int64_t tokens, const cpu::Parallel& parallel, Function&& function) {
  const int64_t tasks = (tokens + kTokensPerTask - 1) / kTokensPerTask;
  parallel.for_each(tasks, [&](int64_t task) {
    const int64_t end = (task + 1) * kTokensPerTask;
    for (int64_t token = task * kTokensPerTask; token < (end < tokens ? end : tokens); ++token) {
      function(token);
    }
  });
}

template <class T>
void decode_token(const cpu::Code& code, const cpu::Decoder& decoder, int64_t token, float* to) {
  const int64_t begin = code.begin(token);
  gather_sum(static_cast<const T*>(decoder.W_dec), decoder.d_in, code.indices + begin,
             code.values + begin, code.end(token) - begin, decoder.b_dec, to);
}

// dots[i] = <row, W_dec[indices[i]]> for the entries of a token.
template <class T>
void entry_dots(const cpu::Code& code, const cpu::Decoder& decoder, int64_t token, const float* row,
                float* dots) {
  const auto* W_dec = static_cast<const T*>(decoder.W_dec);
  const int64_t d_in = decoder.d_in;
  const int64_t end = code.end(token);
  for (int64_t i = code.begin(token); i < end; ++i) {
    if (i + 1 < end) {
      prefetch_row(W_dec + code.indices[i + 1] * d_in, d_in * static_cast<int64_t>(sizeof(T)));
    }
    dots[i] = dot(row, W_dec + code.indices[i] * d_in, d_in);
  }
}

// row becomes row - x; returns the sum of its squares.
float subtract(float* row, const float* x, int64_t d_in) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + kLanes <= d_in; i += kLanes) {
    const Vec residual = load(row + i) - load(x + i);
    squares += residual * residual;
    store(row + i, residual);
  }
  if (i < d_in) {
    const Vec residual = load_tail(row + i, d_in - i) - load_tail(x + i, d_in - i);
    squares += residual * residual;
    store_tail(row + i, residual, d_in - i);
  }
  return reduce_add(squares);
}

template <class T>
bool reconstruct_as(const cpu::Code& code, const cpu::Decoder& decoder,
                    const cpu::Reconstruction& to, const cpu::Parallel& parallel) {
  const int64_t d_in = decoder.d_in;
  const int64_t tasks = (code.tokens + kTokensPerTask - 1) / kTokensPerTask;
  // float residuals are built in place, 16-bit ones in a row of scratch first.
  Scratch scratch(std::is_same_v<T, float> ? 0 : tasks * d_in * 4);
  if (!scratch) return false;
  for_each_token(code.tokens, parallel, [&](int64_t token) {
    auto* residual = static_cast<T*>(to.residual) + token * d_in;
    float* row = scratch.as<float>() + (token / kTokensPerTask) * d_in;
    if constexpr (std::is_same_v<T, float>) row = residual;
    decode_token<T>(code, decoder, token, row);
    to.squared_error[token] = subtract(row, to.x + token * d_in, d_in);
    entry_dots<T>(code, decoder, token, row, to.residual_dot);
    if constexpr (!std::is_same_v<T, float>) store_rounded(residual, row, d_in);
  });
  return true;
}

template <TokenWork kWork>
bool in_strips(const cpu::Code& code, const cpu::Decoder& decoder, const TokenRows& to,
               const cpu::Parallel& parallel) {
  const StripPlan plan(decoder.d_sae, decoder.d_in);
  return with_element(decoder.type, [&](auto element) {
    return with_strip_width(plan, [&](auto width) {
      return TokenStrips<kWork, decltype(width)::value, decltype(element)>(code, decoder, to, plan)
          .run(parallel);
    });
  });
}

}  // namespace

bool decode(const cpu::Code& code, const cpu::Decoder& decoder, float* x_hat,
            const cpu::Parallel& parallel) {
  if (strips_pay(TokenWork::kDecode, code, decoder)) {
    return in_strips<TokenWork::kDecode>(code, decoder, {nullptr, x_hat, nullptr, nullptr},
                                         parallel);
  }
  return with_element(decoder.type, [&](auto element) {
    for_each_token(code.tokens, parallel, [&](int64_t token) {
      decode_token<decltype(element)>(code, decoder, token, x_hat + token * decoder.d_in);
    });
    return true;
  });
}

bool decode_backward(const cpu::Code& code, const cpu::Decoder& decoder, const float* grad,
                     float* grad_values, const cpu::Parallel& parallel) {
  if (strips_pay(TokenWork::kDecodeBackward, code, decoder)) {
    return in_strips<TokenWork::kDecodeBackward>(code, decoder,
                                                 {grad, nullptr, nullptr, grad_values}, parallel);
  }
  return with_element(decoder.type, [&](auto element) {
    for_each_token(code.tokens, parallel, [&](int64_t token) {
      entry_dots<decltype(element)>(code, decoder, token, grad + token * decoder.d_in, grad_values);
    });
    return true;
  });
}

bool reconstruct(const cpu::Code& code, const cpu::Decoder& decoder,
                 const cpu::Reconstruction& reconstruction, const cpu::Parallel& parallel) {
  if (code.tokens == 0) return true;
  if (strips_pay(TokenWork::kReconstruct, code, decoder)) {
    return in_strips<TokenWork::kReconstruct>(
        code, decoder,
        {reconstruction.x, reconstruction.residual, reconstruction.squared_error,
         reconstruction.residual_dot},
        parallel);
  }
  return with_element(decoder.type, [&](auto element) {
    return reconstruct_as<decltype(element)>(code, decoder, reconstruction, parallel);
  });
}

}  // namespace sae_fast::SAE_FAST_ISA
