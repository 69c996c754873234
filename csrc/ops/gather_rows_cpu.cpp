// CPU side of gather_rows_: check, call.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "ops/cpu.h"
#include "ops/gather_rows.h"

namespace sae_fast::ops {
namespace {

// Two threads would write a place that is there twice.
void check_different(const char* op, const int64_t* places, int64_t count, int64_t bound) {
  std::vector<bool> taken(static_cast<size_t>(bound));
  for (int64_t i = 0; i < count; ++i) {
    auto place = taken[static_cast<size_t>(places[i])];
    SAE_FAST_CHECK(!place, op, ": places must all be different, got ", places[i], " twice");
    place = true;
  }
}

void gather_rows(const Tensor& out, const OptionalTensor& places, const Tensor& source,
                 const Tensor& rows, const OptionalTensor& mean, double scale) {
  constexpr const char* kOp = "gather_rows_";
  check_gather_rows(kOp, out, places, source, rows, mean);
  const Input table(source), numbers(rows), to(places), shift(mean);
  const int64_t count = rows.size(0);
  check_range(kOp, "rows", numbers.data<int64_t>(), count, source.size(0));
  if (places.has_value()) {
    check_range(kOp, "places", to.data<int64_t>(), count, out.size(0));
    check_different(kOp, to.data<int64_t>(), count, out.size(0));
  }
  check_apart(kOp, {{"out", out}},
              {{"places", places}, {"source", source}, {"rows", rows}, {"mean", mean}});
  if (out.numel() == 0) return;
  cpu::kernels().gather_rows({dtype_of(source), table.data<void>(), numbers.data<int64_t>(),
                              to.data<int64_t>(), shift.data<float>(), static_cast<float>(scale),
                              mutable_data<float>(out), count, out.size(1)},
                             parallel());
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CPU, m) {
  SAE_FAST_IMPL(m, "gather_rows_", &sae_fast::ops::gather_rows);
}
