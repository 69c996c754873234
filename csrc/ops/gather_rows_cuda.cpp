// CUDA side of gather_rows_: check, guard, call. Numbers of rows are not checked: reading them
// would wait for the device.
#include <torch/csrc/stable/library.h>

#include "kernels/cuda/gather_rows.h"
#include "ops/cuda.h"
#include "ops/gather_rows.h"

namespace sae_fast::ops {
namespace {

void gather_rows(const Tensor& out, const OptionalTensor& places, const Tensor& source,
                 const Tensor& rows, const OptionalTensor& mean, double scale) {
  constexpr const char* kOp = "gather_rows_";
  check_gather_rows(kOp, out, places, source, rows, mean);
  check_same_device(
      kOp, {{"out", out}, {"places", places}, {"source", source}, {"rows", rows}, {"mean", mean}});
  const DeviceGuard guard(out.get_device_index());
  const Input table(source), numbers(rows), to(places), shift(mean);
  STD_CUDA_CHECK(cuda::gather_rows({table.data<void>(), dtype_of(source)}, numbers.data<int64_t>(),
                                   to.data<int64_t>(), shift.data<float>(),
                                   static_cast<float>(scale), mutable_data<float>(out),
                                   rows.size(0), out.size(1), current_stream(out)));
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CUDA, m) {
  m.impl("gather_rows_", TORCH_BOX(&sae_fast::ops::gather_rows));
}
