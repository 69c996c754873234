// CPU side of the optimizer's ops: check, allocate, call.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>

#include "kernels/common/bookkeeping.h"
#include "ops/cpu.h"
#include "ops/encode.h"
#include "ops/gradient.h"
#include "ops/packed_encoder.h"

namespace sae_fast::ops {
namespace {

// Gradient rows kept between the norm and the update: this many for each row of the dense factor.
constexpr int64_t kCachedRowsPerToken = 3;

// The factors of a gradient, checked: lists that stay inside the dense factor, terms that fit it.
class GradientInput {
 public:
  GradientInput(const char* op, const Tensor& latent_offsets, const Tensor& rows,
                const Tensor& coefficients, const Tensor& dense, const OptionalTensor& shift,
                const OptionalTensor& project_onto, const OptionalTensor& extra_grad)
      : offsets_((check_gradient(op, latent_offsets, rows, coefficients, dense, shift, project_onto,
                                 extra_grad),
                  latent_offsets)),
        rows_(rows),
        coefficients_(coefficients),
        dense_(dense),
        shift_(shift),
        project_onto_(project_onto),
        extra_grad_(extra_grad) {
    const int64_t d_sae = latent_offsets.size(0) - 1;
    const int64_t d_in = dense.size(1);
    terms_.lists = {offsets_.data<int64_t>(), rows_.data<int32_t>(), coefficients_.data<float>(),
                    d_sae};
    terms_.factor = {dtype_of(dense), dense_.data<void>(), shift_.data<float>(), dense.size(0),
                     d_in};
    terms_.extra_grad = extra_grad_.data<float>();
    terms_.project_onto = project_onto_.data<float>();
    check_values(op, rows.size(0));
  }

  const cpu::GradientTerms& terms() const { return terms_; }

 private:
  void check_values(const char* op, int64_t entries) const {
    const cpu::LatentMajor& lists = terms_.lists;
    check_partition(op, lists.offsets, lists.d_sae, entries);
    check_entry_range(op, "rows", lists.rows, entries, terms_.factor.tokens);
  }

  Input offsets_, rows_, coefficients_, dense_, shift_, project_onto_, extra_grad_;
  cpu::GradientTerms terms_{};
};

std::tuple<Tensor, Tensor, Tensor, Tensor> row_gradient_norm(
    const Tensor& latent_offsets, const Tensor& rows, const Tensor& coefficients,
    const Tensor& dense, const OptionalTensor& shift, const OptionalTensor& project_onto,
    const OptionalTensor& extra_grad) {
  constexpr const char* kOp = "row_gradient_norm";
  const GradientInput input(kOp, latent_offsets, rows, coefficients, dense, shift, project_onto,
                            extra_grad);
  const cpu::GradientTerms& terms = input.terms();
  const int64_t d_sae = terms.lists.d_sae;
  const Tensor squared_norm = torch::stable::new_empty(dense, {}, ScalarType::Double);
  const Tensor sums = torch::stable::new_empty(dense, {d_sae}, ScalarType::Float);
  const Tensor slots = torch::stable::new_empty(dense, {d_sae}, ScalarType::Int);
  const int64_t kept =
      cpu::plan_cache(terms.lists.offsets, d_sae, kCachedRowsPerToken * terms.factor.tokens,
                      mutable_data<int32_t>(slots));
  const Tensor cached =
      torch::stable::new_empty(dense, {kept, terms.factor.d_in}, ScalarType::Float);
  check_memory(kOp, cpu::kernels().gradient_norm(
                        terms, {mutable_data<float>(cached), mutable_data<int32_t>(slots)},
                        mutable_data<float>(sums), mutable_data<double>(squared_norm), parallel()));
  return {squared_norm, sums, cached, slots};
}

// The copies that the update refreshes: the packed encoder, or W_dec rounded alone.
cpu::PackedEncoder copies(const char* op, const Tensor& W, const std::string& precision,
                          const OptionalTensor& packed, const OptionalTensor& stats,
                          const OptionalTensor& rounded) {
  check_precision(op, precision);
  cpu::PackedEncoder encoder{};
  if (packed.has_value() && stats.has_value() && rounded.has_value()) {
    check_packed(op, W, precision, *packed, *stats, *rounded);
    encoder = packed_encoder(W, precision, *packed, *stats, *rounded);
  } else {
    SAE_FAST_CHECK(!packed.has_value() && !stats.has_value(), op,
                   ": packed and stats must be given with each other and rounded");
  }
  if (!packed.has_value() && rounded.has_value()) {
    SAE_FAST_CHECK(precision == "bf16" || precision == "fp16", op,
                   ": precision must be bf16 or fp16 where rounded is given alone, got ",
                   precision);
    check_shape(op, "rounded", *rounded, {W.size(0), W.size(1)});
    check_rounded_dtype(op, precision, *rounded);
    check_contiguous(op, "rounded", *rounded);
    encoder.type = dtype_of(*rounded);
    encoder.rounded = rounded->mutable_data_ptr();
  }
  encoder.d_sae = W.size(0);
  encoder.d_in = W.size(1);
  encoder.W_enc = mutable_data<float>(W);
  return encoder;
}

// Rows of the cache, or -1 for a latent that has none.
void check_slots(const char* op, const int32_t* slots, int64_t count, int64_t bound) {
  const auto [lowest, highest] = std::minmax_element(slots, slots + count);
  SAE_FAST_CHECK(*lowest >= -1 && *highest < bound, op, ": cache_slots must be in [-1, ", bound,
                 "), got ", *lowest < -1 ? *lowest : *highest);
}

UpdateScalars read_scalars(const Tensor& scalars) {
  const Input numbers(scalars);
  UpdateScalars result{};
  std::memcpy(&result, numbers.data<float>(), sizeof result);
  return result;
}

void fused_update(const Tensor& W, const Tensor& exp_avg, const OptionalTensor& exp_avg_sq,
                  const OptionalTensor& exp_avg_scale, const OptionalTensor& exp_avg_sq_scale,
                  const Tensor& latent_offsets, const Tensor& rows, const Tensor& coefficients,
                  const Tensor& dense, const OptionalTensor& shift,
                  const OptionalTensor& extra_grad, const Tensor& sums, const Tensor& cached,
                  const Tensor& cache_slots, const Tensor& scalars,
                  const OptionalTensor& step_count, const std::string& rule, bool project,
                  bool unit_norm, const OptionalTensor& packed, const OptionalTensor& stats,
                  const OptionalTensor& rounded, const std::string& precision) {
  constexpr const char* kOp = "fused_update_";
  const GradientInput input(kOp, latent_offsets, rows, coefficients, dense, shift, std::nullopt,
                            extra_grad);
  const int64_t d_sae = input.terms().lists.d_sae;
  const int64_t d_in = input.terms().factor.d_in;
  check_weights(kOp, W, d_sae, d_in);
  const Moments moments = checked_moments(kOp, rule, exp_avg, exp_avg_sq, exp_avg_scale,
                                          exp_avg_sq_scale, step_count, d_sae, d_in);
  check_cache(kOp, sums, cached, cache_slots, scalars, d_sae, d_in);
  const Input kept(cached), slots(cache_slots);
  check_slots(kOp, slots.data<int32_t>(), d_sae, cached.size(0));
  check_apart(kOp,
              {{"W", W},
               {"exp_avg", exp_avg},
               {"exp_avg_sq", exp_avg_sq},
               {"exp_avg_scale", exp_avg_scale},
               {"exp_avg_sq_scale", exp_avg_sq_scale},
               {"packed", packed},
               {"stats", stats},
               {"rounded", rounded}},
              {{"latent_offsets", latent_offsets},
               {"rows", rows},
               {"coefficients", coefficients},
               {"dense", dense},
               {"shift", shift},
               {"extra_grad", extra_grad},
               {"cached", cached},
               {"cache_slots", cache_slots},
               {"step_count", step_count}});
  cpu::RowUpdate update{};
  update.rule = checked_rule(kOp, rule);
  update.scalars = read_scalars(scalars);
  update.gradient = input.terms();
  update.gradient.project_onto = project ? mutable_data<float>(W) : nullptr;
  // The kernel only reads them; the cache is shared with the op that fills it.
  update.cache = {const_cast<float*>(kept.data<float>()),
                  const_cast<int32_t*>(slots.data<int32_t>())};
  update.unit_norm = unit_norm;
  update.W = mutable_data<float>(W);
  update.moments = moments;
  update.encoder = copies(kOp, W, precision, packed, stats, rounded);
  if (!is_finite(update.scalars.grad_scale)) return;
  check_memory(kOp, cpu::kernels().fused_update(update, parallel()));
}

std::tuple<Tensor, Tensor> compute_update_scalars(
    const Tensor& squared_norm, const Tensor& lr, const Tensor& loss_scale,
    const Tensor& step_count, const Tensor& halted, const OptionalTensor& lr_squares,
    const std::string& rule, double grad_clip, double beta1, double beta2, double eps,
    double weight_decay, bool skip_overflow, const OptionalTensor& fault,
    const OptionalTensor& losses) {
  constexpr const char* kOp = "update_scalars";
  check_update_scalars(kOp, squared_norm, lr, loss_scale, step_count, halted, lr_squares, rule,
                       fault, losses);
  check_apart(kOp, {{"step_count", step_count}, {"halted", halted}, {"lr_squares", lr_squares}},
              {{"squared_norm", squared_norm},
               {"lr", lr},
               {"loss_scale", loss_scale},
               {"fault", fault},
               {"losses", losses}});
  const UpdateSettings settings{
      checked_rule(kOp, rule), grad_clip, beta1, beta2, eps, weight_decay, skip_overflow};
  const UpdateInputs inputs{
      *squared_norm.const_data_ptr<double>(), *lr.const_data_ptr<double>(),
      *loss_scale.const_data_ptr<float>() + fault_of(first_number(fault), first_number(losses))};
  const Tensor norm = torch::stable::new_empty(loss_scale, {});
  const Tensor scalars = torch::stable::new_empty(loss_scale, {kUpdateScalars});
  UpdateScalars result{};
  *mutable_data<float>(norm) = update_scalars(
      settings, inputs, *mutable_data<int64_t>(step_count), *mutable_data<int64_t>(halted),
      lr_squares.has_value() ? mutable_data<double>(*lr_squares) : nullptr, result);
  std::memcpy(mutable_data<float>(scalars), &result, sizeof result);
  return {norm, scalars};
}

// The step of one vector; `w` and its moments have passed the checks.
void update_one(UpdateRule rule, const UpdateScalars& step, const Tensor& w, const Tensor& exp_avg,
                const OptionalTensor& exp_avg_sq, const OptionalTensor& grad) {
  const Input gradient(grad);
  cpu::kernels().update_vector(
      {rule, &step, gradient.data<float>(), mutable_data<float>(w), mutable_data<float>(exp_avg),
       exp_avg_sq.has_value() ? mutable_data<float>(*exp_avg_sq) : nullptr, w.numel()},
      parallel());
}

void update_vector(const Tensor& w, const Tensor& exp_avg, const OptionalTensor& exp_avg_sq,
                   const OptionalTensor& grad, const Tensor& scalars, const std::string& rule,
                   const OptionalTensor& second_w, const OptionalTensor& second_exp_avg,
                   const OptionalTensor& second_exp_avg_sq, const OptionalTensor& second_grad) {
  constexpr const char* kOp = "update_vector_";
  check_update_vector(kOp, rule, w, exp_avg, exp_avg_sq, grad, scalars);
  check_second_vector(kOp, rule, {second_w, second_exp_avg, second_exp_avg_sq, second_grad});
  check_apart(kOp,
              {{"w", w},
               {"exp_avg", exp_avg},
               {"exp_avg_sq", exp_avg_sq},
               {"second_w", second_w},
               {"second_exp_avg", second_exp_avg},
               {"second_exp_avg_sq", second_exp_avg_sq}},
              {{"grad", grad}, {"second_grad", second_grad}, {"scalars", scalars}});
  const UpdateScalars step = read_scalars(scalars);
  if (!is_finite(step.grad_scale)) return;
  const UpdateRule known_rule = checked_rule(kOp, rule);
  update_one(known_rule, step, w, exp_avg, exp_avg_sq, grad);
  if (!second_w.has_value()) return;
  update_one(known_rule, step, *second_w, *second_exp_avg, second_exp_avg_sq, second_grad);
}

void normalize_rows(const Tensor& W) {
  constexpr const char* kOp = "normalize_rows_";
  check_float(kOp, "W", W, {kAnySize, kAnySize});
  check_contiguous(kOp, "W", W);
  if (W.numel() == 0) return;
  cpu::kernels().normalize_rows(mutable_data<float>(W), W.size(0), W.size(1), parallel());
}

}  // namespace
}  // namespace sae_fast::ops

STABLE_TORCH_LIBRARY_IMPL(sae_fast, CPU, m) {
  SAE_FAST_IMPL(m, "row_gradient_norm", &sae_fast::ops::row_gradient_norm);
  SAE_FAST_IMPL(m, "update_scalars", &sae_fast::ops::compute_update_scalars);
  SAE_FAST_IMPL(m, "fused_update_", &sae_fast::ops::fused_update);
  SAE_FAST_IMPL(m, "update_vector_", &sae_fast::ops::update_vector);
  SAE_FAST_IMPL(m, "normalize_rows_", &sae_fast::ops::normalize_rows);
}
