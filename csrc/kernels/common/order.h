// The one order of candidates: value descending, NaN before everything, equal values (and the two
// zeros) by ascending index. It is total, so every kernel that finds the same set of candidates
// returns the same bits, in whatever order it found them.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/common/host_device.h"

namespace sae_fast {

constexpr int32_t kNanKey = INT32_MAX;

// An integer in the same order as the value: a < b as floats gives ordered_key(a) < ordered_key(b),
// -0 and +0 share the key 0, and every NaN, of either sign, has the largest key.
SAE_FAST_HOST_DEVICE inline int32_t ordered_key(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const int32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return kNanKey;
  return bits < 0 ? -magnitude : magnitude;
}

// Returns true if candidate a comes before candidate b.
SAE_FAST_HOST_DEVICE inline bool better(float value_a, int32_t index_a, float value_b,
                                        int32_t index_b) {
  const int32_t key_a = ordered_key(value_a);
  const int32_t key_b = ordered_key(value_b);
  return key_a != key_b ? key_a > key_b : index_a < index_b;
}

}  // namespace sae_fast
