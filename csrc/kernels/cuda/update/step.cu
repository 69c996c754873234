#include "kernels/cuda/update/step.cuh"

#include "kernels/cuda/update/row.cuh"

namespace sae_fast::cuda {

cudaError_t row_update_max_d_in(UpdateRule rule, DType moments, int64_t* d_in) {
  int bytes = 0;
  const cudaError_t error = device_attribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const auto fixed = static_cast<int64_t>(kRowWarps * (sizeof(float) + sizeof(double)));
  const int64_t rows = with_rule(rule, [&](auto known_rule) {
    constexpr UpdateRule kRule = decltype(known_rule)::value;
    switch (moments) {
      case DType::kBFloat16:
        return kUpdateRows<kRule, DType::kBFloat16>;
      case DType::kUInt8:
        return kUpdateRows<kRule, DType::kUInt8>;
      default:
        return kUpdateRows<kRule, DType::kFloat32>;
    }
  });
  *d_in = (bytes - fixed) / static_cast<int64_t>(row_bytes(rows, 1));
  return error;
}

cudaError_t fused_update(const GradientFactors& factors, const RowState& state, const float* cached,
                         const int32_t* cache_slots, UpdateRule rule, const UpdateScalars* scalars,
                         bool project, bool unit_norm, cudaStream_t stream) {
  const RowUpdate update = {factors, state, cached, cache_slots, scalars, project, unit_norm};
  return with_rule(rule, [&](auto known_rule) {
    constexpr UpdateRule kRule = decltype(known_rule)::value;
    switch (state.moments.type) {
      case DType::kBFloat16:
        return update_rows<kRule, DType::kBFloat16>(update, stream);
      case DType::kUInt8:
        return update_rows<kRule, DType::kUInt8>(update, stream);
      default:
        return update_rows<kRule, DType::kFloat32>(update, stream);
    }
  });
}

}  // namespace sae_fast::cuda
