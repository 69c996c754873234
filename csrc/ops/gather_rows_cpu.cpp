// CPU side of gather_rows_: check, call.
#include <torch/csrc/stable/library.h>

#include "ops/cpu.h"
#include "ops/gather_rows.h"

namespace sae_fast::ops {
namespace {

void gather_rows(const Tensor& out, const OptionalTensor& places, const Tensor& source,
                 const Tensor& rows, const OptionalTensor& mean, double scale) {
  constexpr const char* kOp = "gather_rows_";
  check_gather_rows(kOp, out, places, source, rows, mean);
  const Input table(source), numbers(rows), to(places), shift(mean);
  const int64_t count = rows.size(0);
  check_range(kOp, "rows", numbers.data<int64_t>(), count, source.size(0));
  if (places.has_value()) check_range(kOp, "places", to.data<int64_t>(), count, out.size(0));
  cpu::kernels().gather_rows({rows_type(source), table.data<void>(), numbers.data<int64_t>(),
                              to.data<int64_t>(), shift.data<float>(), static_cast<float>(scale),
                              mutable_data<float>(out), count, out.size(1)},
                             parallel());
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CPU, m) {
  m.impl("gather_rows_", TORCH_BOX(&sae_fast::ops::gather_rows));
}
