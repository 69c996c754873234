// The numbers of a training step that host and device compute alike.
#pragma once

#include <cstdint>

#include "kernels/common/host_device.h"

namespace sae_fast {

// Of a batch, from sums in double; a variance that rounding has made negative is 0.
struct BatchSums {
  double squared_error, variance;
  int64_t active, rows;
};
struct BatchStatistics {
  float fvu, l0, variance;
};

SAE_FAST_HOST_DEVICE inline BatchStatistics batch_statistics(const BatchSums& sums) {
  return {static_cast<float>(sums.squared_error / sums.variance),
          static_cast<float>(sums.active) / static_cast<float>(sums.rows),
          static_cast<float>(sums.variance)};
}

// Of each entry of a code [rows, k] twice the row's gradient times residual_dot and times the
// value.
struct CodeGradients {
  const float* values;        // [rows, k]
  const float* residual_dot;  // [rows, k]
  const float* grad_error;    // [rows], `grad_stride` numbers apart
  int64_t grad_stride;
  float* grad_values;   // [rows, k]
  float* coefficients;  // [rows, k]
  float* scale;         // [rows]
  int64_t rows, k;      // rows * k is below 2^31
};

// The record of a step, each a pointer to one number but for the metrics.
struct StepRecord {
  float* poison;   // 0; NaN since a step that failed
  int64_t* steps;  // made until the one that failed, with it
  float* metrics;  // [count + 2]: of the last step that began healthy
};
struct StepResults {
  const float* fault;     // or null; NaN: the step has failed
  const float* losses;    // [count], the first of which must be finite
  const float* norm;      // of the gradient
  const float* variance;  // of the batch
  int64_t count;
  bool norm_poisons;  // whether a norm that is not finite ends the run
};

// Returns 0, or NaN where a number of the step is not finite. Each may be null.
SAE_FAST_HOST_DEVICE inline float fault_of(const float* fault, const float* losses) {
  const float found = fault != nullptr ? 0.0f * *fault : 0.0f;
  return losses != nullptr ? found + 0.0f * *losses : found;
}

SAE_FAST_HOST_DEVICE inline void finish_step(const StepRecord& record, const StepResults& results) {
  const bool was_healthy = *record.poison == *record.poison;
  const float norm = *results.norm;
  const float* const losses = results.count > 0 ? results.losses : nullptr;
  const float fault = 0.0f * *record.poison + fault_of(results.fault, losses);
  *record.poison = results.norm_poisons ? fault + 0.0f * norm : fault;
  if (!was_healthy) return;
  ++*record.steps;
  for (int64_t i = 0; i < results.count; ++i) record.metrics[i] = results.losses[i];
  record.metrics[results.count] = norm;
  record.metrics[results.count + 1] = *results.variance;
}

}  // namespace sae_fast
