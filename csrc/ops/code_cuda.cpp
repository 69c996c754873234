// CUDA side of the ops on codes by latent: check, guard, allocate, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "kernels/cuda/rows.h"
#include "ops/cuda.h"
#include "ops/gradient.h"

namespace sae_fast::ops {
namespace {

// entries and rows have room for every entry of the code, since only the device knows how many
// count. From latent_offsets[F] on are the entries with value 0, which belong to no latent.
std::tuple<Tensor, Tensor, Tensor> latent_major(const Tensor& values, const Tensor& indices,
                                                const OptionalTensor& offsets, int64_t d_sae) {
  constexpr const char* kOp = "latent_major";
  check_d_sae(kOp, d_sae);
  check_same_device(kOp, {{"values", values}, {"indices", indices}, {"offsets", offsets}});
  const DeviceGuard guard(values.get_device_index());
  const CudaCode code(kOp, values, indices, offsets);
  const int64_t count = code.rows().entries;
  const Tensor latent_offsets = torch::stable::new_empty(values, {d_sae + 1}, ScalarType::Long);
  const Tensor entries = torch::stable::new_empty(values, {count}, ScalarType::Int);
  const Tensor rows = torch::stable::new_empty(values, {count}, ScalarType::Int);
  size_t bytes = 0;
  STD_CUDA_CHECK(cuda::latent_major_scratch_bytes(count, d_sae, &bytes));
  const Tensor scratch = new_scratch(values, bytes);
  STD_CUDA_CHECK(cuda::latent_major(code.values(), code.indices(), code.rows(),
                                    mutable_data<int64_t>(latent_offsets),
                                    mutable_data<int32_t>(entries), mutable_data<int32_t>(rows),
                                    d_sae, scratch.mutable_data_ptr(), current_stream(values)));
  return {latent_offsets, entries, rows};
}

std::tuple<Tensor, Tensor> accumulate_rows(const Tensor& coefficients, const Tensor& indices,
                                           const OptionalTensor& offsets, const Tensor& dense,
                                           int64_t d_sae) {
  constexpr const char* kOp = "accumulate_rows";
  check_d_sae(kOp, d_sae);
  check_same_device(kOp, {{"coefficients", coefficients},
                          {"indices", indices},
                          {"offsets", offsets},
                          {"dense", dense}});
  const DeviceGuard guard(coefficients.get_device_index());
  const CudaCode code(kOp, coefficients, indices, offsets, "coefficients");
  check_shape(kOp, "dense", dense, {code.rows().rows, kAnySize});
  check_floating(kOp, "dense", dense);
  const int64_t d_in = dense.size(1);
  const Input table(dense);
  const Tensor rows = torch::stable::new_empty(coefficients, {d_sae, d_in});
  const Tensor sums = torch::stable::new_empty(coefficients, {d_sae});
  size_t bytes = 0;
  STD_CUDA_CHECK(cuda::accumulate_rows_scratch_bytes(code.rows().entries, d_sae, d_in, &bytes));
  const Tensor scratch = new_scratch(coefficients, bytes);
  STD_CUDA_CHECK(cuda::accumulate_rows(
      code.values(), code.indices(), code.rows(), {table.data<void>(), dtype_of(dense)},
      mutable_data<float>(rows), mutable_data<float>(sums), d_sae, d_in, scratch.mutable_data_ptr(),
      current_stream(coefficients)));
  return {rows, sums};
}

Tensor gather_entries(const Tensor& source, const Tensor& entries) {
  constexpr const char* kOp = "gather_entries";
  check_entries(kOp, entries, "source", source);
  check_same_device(kOp, {{"source", source}, {"entries", entries}});
  const DeviceGuard guard(source.get_device_index());
  const Input from(source), positions(entries);
  const Tensor ordered = torch::stable::new_empty(source, {entries.size(0)});
  STD_CUDA_CHECK(cuda::gather_entries(from.data<float>(), positions.data<int32_t>(),
                                      entries.size(0), mutable_data<float>(ordered),
                                      current_stream(source)));
  return ordered;
}

// The lists may have more room than latent_offsets[F] of it in use.
Tensor latent_sums(const Tensor& latent_offsets, const Tensor& entries,
                   const Tensor& coefficients) {
  constexpr const char* kOp = "latent_sums";
  check_latent_offsets(kOp, latent_offsets);
  check_entries(kOp, entries, "coefficients", coefficients);
  check_same_device(
      kOp,
      {{"coefficients", coefficients}, {"latent_offsets", latent_offsets}, {"entries", entries}});
  const DeviceGuard guard(coefficients.get_device_index());
  const Input offsets(latent_offsets), positions(entries), from(coefficients);
  const int64_t d_sae = latent_offsets.size(0) - 1;
  const Tensor sums = torch::stable::new_empty(coefficients, {d_sae});
  STD_CUDA_CHECK(cuda::latent_sums(offsets.data<int64_t>(), positions.data<int32_t>(),
                                   from.data<float>(), d_sae, mutable_data<float>(sums),
                                   current_stream(coefficients)));
  return sums;
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("latent_major", TORCH_BOX(&sae_fast::ops::latent_major));
  m.impl("gather_entries", TORCH_BOX(&sae_fast::ops::gather_entries));
  m.impl("latent_sums", TORCH_BOX(&sae_fast::ops::latent_sums));
  m.impl("accumulate_rows", TORCH_BOX(&sae_fast::ops::accumulate_rows));
}
