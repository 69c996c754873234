#pragma once

#include "kernels/common/half.h"

struct __nv_bfloat16 {
  sae_fast::BFloat16 value;
};

inline float __bfloat162float(__nv_bfloat16 number) { return sae_fast::to_float(number.value); }
inline __nv_bfloat16 __float2bfloat16_rn(float number) {
  return {sae_fast::round_to_bfloat16(number)};
}
