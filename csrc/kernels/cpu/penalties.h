// The penalties on weights and codes: sums over pairs of latents, and their gradients.
#pragma once

#include <cstdint>

#include "kernels/cpu/parallel.h"

namespace sae_fast::cpu {

// Sum over pairs of squared cosines between rows of W, and its gradient [d_sae][d_in].
using Decorrelation = bool (*)(const float* W, int64_t d_sae, int64_t d_in, double* loss,
                               float* grad, const Parallel&);

// Dense codes [tokens][d_sae]: latents [0, split) are the first group, the others the second.
struct GroupedCodes {
  const float* h;
  int64_t tokens, d_sae, split;
  // Without a second group there is one Gram matrix.
  int64_t groups() const { return split < d_sae ? 2 : 1; }
};

// With z the activations less their mean, at unit length: what the sums leave for the gradient.
struct Correlation {
  double* means;         // [d_sae]
  float* inverse_norms;  // [d_sae]: 1 / |h - mean|, 0 for a silent latent
  float* gram;           // [groups][tokens][tokens]: sum over a group's latents of z zᵀ
  int64_t* n_active;     // [2]
  double within = 0.0, between = 0.0;
};
using CodeCorrelation = bool (*)(const GroupedCodes&, Correlation&, const Parallel&);

struct CorrelationGradient {
  GroupedCodes codes;
  const double* means;
  const float* inverse_norms;
  const float* gram;
  // Of the loss with respect to the two sums; null where it does not depend on one.
  const float* grad_within;
  const float* grad_between;
};
// grad_h [tokens][d_sae].
using CodeCorrelationBackward = bool (*)(const CorrelationGradient&, float* grad_h,
                                         const Parallel&);

}  // namespace sae_fast::cpu
