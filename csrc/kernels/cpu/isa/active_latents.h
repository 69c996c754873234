// The active latents of dense codes, as the sums over them and the gradient read them.
#pragma once

#include "kernels/common/correlation.h"
#include "kernels/cpu/isa/product.h"
#include "kernels/cpu/penalties.h"

namespace sae_fast::SAE_FAST_ISA {

constexpr int64_t kBlock = 4 * kPanel;  // latents that a task reads or writes together

// The numbers of the latents in [first, end) that are not silent; how many they are.
inline int64_t list_active(const float* inverse_norms, int64_t first, int64_t end,
                           int64_t* latents) {
  int64_t count = 0;
  for (int64_t j = first; j < end; ++j) {
    latents[count] = j;
    count += inverse_norms[j] != 0.0f ? 1 : 0;  // NaN is not silent
  }
  return count;
}

// Up to kBlock active latents, in ascending order, with what brings them to unit length. As many as
// make each row of h worth a visit: rows are far apart in memory.
struct Latents {
  const int64_t* at;
  int64_t count;
  double means[kBlock];
  float inverse[kBlock];

  Latents(const int64_t* latents, int64_t how_many, const double* all_means,
          const float* all_inverse)
      : at(latents), count(how_many < kBlock ? how_many : kBlock) {
    for (int64_t c = 0; c < count; ++c) {
      means[c] = all_means[at[c]];
      inverse[c] = all_inverse[at[c]];
    }
  }
  int64_t panels() const { return (count + kPanel - 1) / kPanel; }
  int64_t end_of(int64_t panel) const {
    return (panel + 1) * kPanel < count ? (panel + 1) * kPanel : count;
  }
  // Returns true if latents [first, end) of these are side by side.
  bool neighbours(int64_t first, int64_t end) const {
    return at[end - 1] - at[first] == end - 1 - first;
  }

  // The unit activations of a panel of them for one token, of which h is the row.
  void load_unit(const float* h, int64_t panel, float* to) const {
    const int64_t first = panel * kPanel;
    const int64_t end = end_of(panel);
    if (neighbours(first, end)) {
      const float* from = h + at[first];
      for (int64_t c = 0; c < end - first; ++c) {
        to[c] = centred(from[c], means[first + c]) * inverse[first + c];
      }
    } else {
      for (int64_t c = first; c < end; ++c) {
        to[c - first] = centred(h[at[c]], means[c]) * inverse[c];
      }
    }
    for (int64_t c = end - first; c < kPanel; ++c) to[c] = 0.0f;
  }
};

}  // namespace sae_fast::SAE_FAST_ISA
