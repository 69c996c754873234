#pragma once

#include "kernels/common/half.h"

struct __half {
  sae_fast::Float16 value;
};

inline float __half2float(__half number) { return sae_fast::to_float(number.value); }
inline __half __float2half_rn(float number) { return {sae_fast::round_to_float16(number)}; }
