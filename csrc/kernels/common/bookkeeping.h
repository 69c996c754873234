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

// The record of a step, each a pointer to one number but for the metrics.
struct StepRecord {
  float* poison;   // 0; NaN since a step that failed
  int64_t* steps;  // made until the one that failed, with it
  float* metrics;  // [count + 2]: of the last step that began healthy
};
struct StepResults {
  const float* loss_scale;  // of the step; NaN where a loss is not finite or the poison was NaN
  const float* losses;      // [count]
  const float* norm;        // of the gradient
  const float* variance;    // of the batch
  int64_t count;
  bool norm_poisons;  // whether a norm that is not finite ends the run
};

SAE_FAST_HOST_DEVICE inline void finish_step(const StepRecord& record, const StepResults& results) {
  const bool was_healthy = *record.poison == *record.poison;
  const float norm = *results.norm;
  const float fault = 0.0f * *results.loss_scale;
  *record.poison = results.norm_poisons ? fault + 0.0f * norm : fault;
  if (!was_healthy) return;
  ++*record.steps;
  for (int64_t i = 0; i < results.count; ++i) record.metrics[i] = results.losses[i];
  record.metrics[results.count] = norm;
  record.metrics[results.count + 1] = *results.variance;
}

}  // namespace sae_fast
