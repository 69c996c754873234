// Short vectors of one row's neighbouring columns: one aligned load or store each, float32 inside.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "kernels/cuda/types.h"

namespace sae_fast::cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <typename Element>
__device__ Element round_to(float value);
template <>
__device__ inline float round_to<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 round_to<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half round_to<__half>(float value) {
  return __float2half_rn(value);
}

// 16 bytes is the widest access of one thread; two halves are used for a vector above that.
constexpr size_t kAccessBytes = 16;

constexpr size_t access_alignment(size_t bytes) {
  return bytes < kAccessBytes ? bytes : kAccessBytes;
}

template <typename Element, int kWidth>
struct alignas(access_alignment(sizeof(Element) * kWidth)) Vector {
  Element at[kWidth];
};

template <typename Element, int kWidth>
__device__ inline Vector<Element, kWidth> load(const Element* from) {
  return *reinterpret_cast<const Vector<Element, kWidth>*>(from);
}

template <typename Element, int kWidth>
__device__ inline Vector<float, kWidth> load_floats(const Element* from) {
  const Vector<Element, kWidth> raw = load<Element, kWidth>(from);
  Vector<float, kWidth> floats;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) floats.at[i] = to_float(raw.at[i]);
  return floats;
}

// Returns what was stored, as floats.
template <typename Element, int kWidth>
__device__ inline Vector<float, kWidth> store(Element* to, const Vector<float, kWidth>& floats) {
  Vector<Element, kWidth> raw;
  Vector<float, kWidth> rounded;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    raw.at[i] = round_to<Element>(floats.at[i]);
    rounded.at[i] = to_float(raw.at[i]);
  }
  *reinterpret_cast<Vector<Element, kWidth>*>(to) = raw;
  return rounded;
}

// The bytes of one access as numbers, for which the device has hints.
template <size_t kBytes>
struct Access;
template <>
struct Access<1> {
  using Bits = unsigned char;
};
template <>
struct Access<2> {
  using Bits = unsigned short;
};
template <>
struct Access<4> {
  using Bits = unsigned int;
};
template <>
struct Access<8> {
  using Bits = uint2;
};
template <>
struct Access<16> {
  using Bits = uint4;
};

// load and store of what a kernel reads or writes once: the caches give it up before other data.
template <typename Element, int kWidth>
__device__ inline Vector<Element, kWidth> load_once(const Element* from) {
  using Bits = typename Access<sizeof(Vector<Element, kWidth>)>::Bits;
  const Bits bits = __ldcs(reinterpret_cast<const Bits*>(from));
  Vector<Element, kWidth> vector;
  std::memcpy(&vector, &bits, sizeof vector);
  return vector;
}

template <typename Element, int kWidth>
__device__ inline void store_once(Element* to, const Vector<Element, kWidth>& vector) {
  using Bits = typename Access<sizeof(Vector<Element, kWidth>)>::Bits;
  Bits bits;
  std::memcpy(&bits, &vector, sizeof bits);
  __stcs(reinterpret_cast<Bits*>(to), bits);
}

// Fetches a row into L2, by all threads of the block, which do not wait for it.
template <typename Element>
__device__ inline void prefetch_row(const Element* row, int columns) {
  constexpr int kLine = 128 / static_cast<int>(sizeof(Element));
  for (int column = static_cast<int>(threadIdx.x) * kLine; column < columns;
       column += static_cast<int>(blockDim.x) * kLine) {
#ifdef SAE_FAST_EMULATED_CUDA  // csrc/tests/cuda_emulation
    emulated_cuda::prefetch(row + column);
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(row + column));
#endif
  }
}

// sum += scale * vector
template <typename Element, int kWidth>
__device__ inline void add_scaled(Vector<float, kWidth>& sum, float scale,
                                  const Vector<Element, kWidth>& vector) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum.at[i] = fmaf(scale, to_float(vector.at[i]), sum.at[i]);
}

// sum + <a, b>
template <typename Element, int kWidth>
__device__ inline float add_dot(float sum, const Vector<float, kWidth>& a,
                                const Vector<Element, kWidth>& b) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum = fmaf(a.at[i], to_float(b.at[i]), sum);
  return sum;
}

// Returns true if every row of these [*, d_in] arrays starts where a vector of `width` can be read.
inline bool vectors_fit(int64_t d_in, int width, std::initializer_list<const void*> arrays) {
  bool aligned = d_in % width == 0;
  for (const void* array : arrays) {
    aligned = aligned && reinterpret_cast<uintptr_t>(array) % kAccessBytes == 0;
  }
  return aligned;
}

// Calls call(pointer of the element type, width): vectors of up to 16 bytes and kMaxWidth elements
// where d_in and the op's other arrays allow it, single elements otherwise.
template <int kMaxWidth, typename Element, typename Call>
cudaError_t with_width(const void* rows, int64_t d_in, std::initializer_list<const void*> others,
                       Call&& call) {
  constexpr int kWidth = std::min(static_cast<int>(kAccessBytes / sizeof(Element)), kMaxWidth);
  const auto* const elements = static_cast<const Element*>(rows);
  if (vectors_fit(d_in, kWidth, {rows}) && vectors_fit(d_in, kWidth, others)) {
    return call(elements, std::integral_constant<int, kWidth>{});
  }
  return call(elements, std::integral_constant<int, 1>{});
}

template <int kMaxWidth, typename Call>
cudaError_t with_rows(TypedPointer rows, int64_t d_in, std::initializer_list<const void*> others,
                      Call&& call) {
  switch (rows.type) {
    case DType::kFloat32:
      return with_width<kMaxWidth, float>(rows.data, d_in, others, call);
    case DType::kBFloat16:
      return with_width<kMaxWidth, __nv_bfloat16>(rows.data, d_in, others, call);
    case DType::kFloat16:
      return with_width<kMaxWidth, __half>(rows.data, d_in, others, call);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace sae_fast::cuda
