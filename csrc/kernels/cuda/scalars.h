// The optimiser's step beside the weight rows: its numbers, which never leave the device, and the
// parameters that have a dense gradient.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/common/update_rule.h"

namespace sae_fast::cuda {

// As update_scalars in common/update_rule.h; every pointer is to one number.
struct StepPointers {
  const double* squared_norm;
  const double* lr;
  const float* loss_scale;
  const float* fault;   // or null; NaN, as a first loss: no update
  const float* losses;  // or null
  int64_t* step_count;
  int64_t* halted;
  double* lr_squares;  // or null
  float* norm;
  UpdateScalars* scalars;
};
cudaError_t compute_update_scalars(const UpdateSettings& settings, const StepPointers& step,
                                   cudaStream_t stream);

struct VectorState {
  const float* grad;  // [size], or null for zeros
  float* w;           // [size]
  float* exp_avg;     // [size]
  float* exp_avg_sq;  // [size], or null where the rule has none
  int64_t size;
};

// The rule's step of both; nothing where the scale is not finite.
cudaError_t update_vectors(UpdateRule rule, const UpdateScalars* scalars, const VectorState& first,
                           const VectorState& second, cudaStream_t stream);

}  // namespace sae_fast::cuda
