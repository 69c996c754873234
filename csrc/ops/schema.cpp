// The one list of operators. The comment above each schema is its contract: N tokens, D = d_in,
// F = d_sae, K = k; rows of both weight matrices are latents; indices are int32; everything else is
// float32 unless said. Every op is deterministic and, but for dense_product, independent of
// the number of threads.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sae_fast, m) {
  // The encoder as the product reads it: panels of two bytes an entry, 16-bit integers or bfloat16
  // tiles (float panels for precision "fp32"), per latent scale and error bounds, and W_enc rounded
  // for "bf16" and "fp16". Opaque to callers:
  //   packed  int16 [ceil(F/64), 16 ceil(D/32), 64, 2] or float32 [ceil(F/64), D, 64]
  //   stats   [4, 64 * ceil(F/64)]
  //   rounded [F, D] bfloat16 or float16, else [0, D]
  // On CUDA, where "screened" and "fp32" are one path, packed is [0], stats [2, F] bounds each
  // row's length and its rounding error's length, and rounded is float16 for "fp16", else bfloat16.
  m.def(
      "pack_encoder(Tensor W_enc, str precision) -> (Tensor packed, Tensor stats, Tensor rounded)");

  // Per row the k largest of (x - b_dec) W_encᵀ + b_enc, then ReLU. values [N, K] descending, equal
  // values by ascending index, NaN first; indices [N, K]. "screened" and "fp32" give the exact
  // float32 result and the same bits; "bf16" and "fp16" round x - b_dec and W_enc first. With a
  // dead mask [F], aux_* [N, k_aux] are the best among the dead latents, (0, 0) where there are too
  // few. packed, stats, rounded: of pack_encoder for this W_enc and precision; built here if
  // absent.
  m.def(
      "encode_topk(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, int k, str precision, "
      "Tensor? dead_mask, int k_aux, Tensor? packed, Tensor? stats, Tensor? rounded) -> "
      "(Tensor values, Tensor indices, Tensor aux_values, Tensor aux_indices)");

  // The N*K largest positive entries of the whole batch, NaN largest of all, equal values in order
  // of their tokens, then indices. CSR by row, ascending index: values [N*K], indices [N*K],
  // offsets int64 [N + 1]. Where fewer are positive the last row ends in entries of value 0 and
  // index 0. aux_* and the other arguments as for encode_topk.
  m.def(
      "encode_batch_topk(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, int k, str precision, "
      "Tensor? dead_mask, int k_aux, Tensor? packed, Tensor? stats, Tensor? rounded) -> "
      "(Tensor values, Tensor indices, Tensor offsets, Tensor aux_values, Tensor aux_indices)");

  // The number of calls of encode_batch_topk in this process that have computed every score of a
  // batch, on the device of like (float32), because their list of candidates had no room or a bound
  // proved wrong: int64 []. Always 0 on a CPU.
  m.def("full_batches(Tensor like) -> Tensor count");

  // Entries above threshold [F] and above 0, and every NaN: CSR by row, ascending index.
  // values [nnz], indices [nnz], offsets int64 [N + 1].
  m.def(
      "encode_threshold(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_dec, Tensor threshold, "
      "str precision, Tensor? packed, Tensor? stats, Tensor? rounded) -> "
      "(Tensor values, Tensor indices, Tensor offsets)");

  // Sum of value * W_dec[index] + b_dec: [N, D]. W_dec float32, bfloat16 or float16. Without
  // offsets the code is [N, K], with them CSR; so for all ops below.
  m.def(
      "decode(Tensor values, Tensor indices, Tensor? offsets, Tensor W_dec, Tensor? b_dec) -> "
      "Tensor x_hat");

  // <grad[n], W_dec[index]> for every entry.
  m.def(
      "decode_backward(Tensor grad, Tensor indices, Tensor? offsets, Tensor W_dec) -> "
      "Tensor grad_values");

  // One pass over the active rows for a squared error and its gradient: residual = decode - x
  // [N, D] in W_dec's dtype, squared_error [N], residual_dot = <residual[n], W_dec[index]>.
  m.def(
      "reconstruct(Tensor values, Tensor indices, Tensor? offsets, Tensor W_dec, Tensor? b_dec, "
      "Tensor x) -> (Tensor residual, Tensor squared_error, Tensor residual_dot)");

  // rows [F, D] = sum over a latent's entries of coefficient * dense[n]; sums [F] of coefficients.
  m.def(
      "accumulate_rows(Tensor coefficients, Tensor indices, Tensor? offsets, Tensor dense, "
      "int d_sae) -> (Tensor rows, Tensor sums)");

  // The entries with value != 0 by latent, then by position: latent_offsets int64 [F + 1], entries
  // int32 (flat position in values), rows int32 (token). On CUDA, where only the device knows how
  // many there are, both have room for every entry: entries of value 0 follow and have no latent.
  m.def(
      "latent_major(Tensor values, Tensor indices, Tensor? offsets, int d_sae) -> "
      "(Tensor latent_offsets, Tensor entries, Tensor rows)");

  // source's numbers by flat position: [M] in the order of entries int32 [M].
  m.def("gather_entries(Tensor source, Tensor entries) -> Tensor ordered");

  // Per latent the sum of coefficients[entries[p]] over its entries, [F]; both lists as
  // latent_major gives them, coefficients by flat position.
  m.def("latent_sums(Tensor latent_offsets, Tensor entries, Tensor coefficients) -> Tensor sums");

  // Gradient row j: g_j = sum of coefficients[p] * (dense[rows[p]] - shift) + extra_grad[j],
  // less its part along project_onto[j]. squared_norm: float64 scalar, of all of it; sums [F] of
  // coefficients; cached, cache_slots: rows kept for fused_update_, at most 3 N of them.
  m.def(
      "row_gradient_norm(Tensor latent_offsets, Tensor rows, Tensor coefficients, Tensor dense, "
      "Tensor? shift, Tensor? project_onto, Tensor? extra_grad) -> "
      "(Tensor squared_norm, Tensor sums, Tensor cached, Tensor cache_slots)");

  // The numbers of a step that depend on the whole gradient; all tensors are scalars. squared_norm
  // float64 belongs to the gradients of loss_scale * loss; lr float64, step_count and halted int64.
  // norm = sqrt(squared_norm) / loss_scale. Where it is finite and halted < 0, step_count goes up
  // by one and scalars [11] are: grad_scale = min(1, grad_clip / (norm + 1e-6)) / loss_scale
  // (grad_clip 0: no clip), and the numbers of UpdateStep in common/update_rule.h. Otherwise they
  // are NaN, which makes an update change nothing; and unless skip_overflow, halted becomes
  // step_count if it was negative: no later step changes anything. rule is adam (AdamW), sgd,
  // signum or schedule_free_signum; beta1 is the momentum of all but adam, which ignore beta2 and
  // eps. lr_squares float64, for schedule_free_signum alone, goes up by lr^2 with step_count. Where
  // fault [] or the first of losses [M] is given and not finite, norm is NaN.
  m.def(
      "update_scalars(Tensor squared_norm, Tensor lr, Tensor loss_scale, Tensor(a!) step_count, "
      "Tensor(b!) halted, Tensor(c!)? lr_squares, str rule, float grad_clip, float beta1, float "
      "beta2, float eps, "
      "float weight_decay, bool skip_overflow, Tensor? fault=None, Tensor? losses=None) -> "
      "(Tensor norm, Tensor scalars)");

  // One pass over W: the same g_j times scalars' grad_scale, the step of the rule that scalars are
  // of, then unit rows where asked, and fresh low-precision copies of the rows where given. adam is
  // torch.optim.AdamW; sgd torch.optim.SGD, with its momentum in exp_avg; signum W -= lr
  // (weight_decay W + sign(exp_avg)), exp_avg as adam's; schedule_free_signum has z - W in exp_avg,
  // as common/update_rule.h says, divided with the row; all three without exp_avg_sq. Nothing is
  // written where grad_scale is not finite. Moments are float32, bfloat16 or uint8 (exp_avg's dtype
  // decides): the last two are read as float32, and rounded at random when written, by a hash of
  // step_count (of update_scalars, after it), row and column; the new weights do not depend on that
  // rounding. uint8 are codes as common/moments.h says, whose scales [F, ceil(D / 256)] are
  // float32.
  m.def(
      "fused_update_(Tensor(a!) W, Tensor(b!) exp_avg, Tensor(c!)? exp_avg_sq, "
      "Tensor(d!)? exp_avg_scale, Tensor(e!)? exp_avg_sq_scale, "
      "Tensor latent_offsets, Tensor rows, Tensor coefficients, Tensor dense, Tensor? shift, "
      "Tensor? extra_grad, Tensor sums, Tensor cached, Tensor cache_slots, Tensor scalars, "
      "Tensor? step_count, str rule, bool project, bool unit_norm, Tensor(f!)? packed, "
      "Tensor(g!)? stats, Tensor(h!)? rounded, str precision) -> ()");

  // The step of fused_update_ for a parameter of any shape with a dense gradient; none means zeros.
  // With second_w also for a second one, in one launch.
  m.def(
      "update_vector_(Tensor(a!) w, Tensor(b!) exp_avg, Tensor(c!)? exp_avg_sq, Tensor? grad, "
      "Tensor scalars, str rule, Tensor(d!)? second_w=None, Tensor(e!)? second_exp_avg=None, "
      "Tensor(f!)? second_exp_avg_sq=None, Tensor? second_grad=None) -> ()");

  // total float64 [] += more float64 [], then the sum of squares of grad, then of second, both of
  // any shape; second and more may be missing.
  m.def(
      "add_squares_(Tensor(a!) total, Tensor grad, Tensor? second=None, Tensor? more=None) -> ()");

  // Rows to unit L2 norm: w / max(|w|, 1e-12).
  m.def("normalize_rows_(Tensor(a!) W) -> ()");

  // Of a batch: fvu = sum of squared_error [N] / variance, l0 = number of entries that fire / N,
  // total_variance = sum of (target - mean(target))^2 over target [N, D], the mean taken by column
  // (a given variance [] takes its place), all scalars; and fired bool [F]. An entry fires where
  // its value is above 0, or is_signed and not 0; NaN does not. values have the shape of indices.
  m.def(
      "batch_statistics(Tensor squared_error, Tensor target, Tensor values, Tensor indices, "
      "Tensor? variance, int d_sae, bool is_signed) -> (Tensor fvu, Tensor l0, "
      "Tensor total_variance, Tensor fired)");

  // The results of the gradient grad_error [N] of squared_error for a code [N, K]: scale [N] =
  // 2 grad_error, grad_values [N, K] = residual_dot * scale, coefficients [N, K] = values * scale.
  m.def(
      "code_gradients(Tensor residual_dot, Tensor values, Tensor grad_error) -> "
      "(Tensor grad_values, Tensor coefficients, Tensor scale)");

  // sum [D] = factor times the sum over m of weights[m] * matrix[m], matrix [M, D] float32,
  // bfloat16 or float16.
  m.def("weighted_row_sum(Tensor weights, Tensor matrix, float factor) -> Tensor sum");

  // The end of a training step. poison [] is NaN since a step that failed, else 0. Where it is 0,
  // steps int64 [] goes up by one and metrics [M + 2] become losses [M], norm [] and variance [].
  // Then it grows by 0 times fault [], if given, the first loss and, with norm_poisons, the norm:
  // it becomes NaN where one is not finite. tokens_since_fired int64 [F] becomes 0 where fired bool
  // [F], else it grows by n_tokens.
  m.def(
      "finish_step_(Tensor(a!) poison, Tensor(b!) steps, Tensor(c!) metrics, "
      "Tensor(d!) tokens_since_fired, Tensor? fault, Tensor losses, Tensor norm, Tensor variance, "
      "Tensor fired, int n_tokens, bool norm_poisons) -> ()");

  // out [M, D] float32: row places[i], or i without places, becomes (source[rows[i]] - mean) *
  // scale; no mean is zeros. source [., D] float32, bfloat16 or float16; rows and places int64
  // [N], places all different. This is how batches are made of rows as they are
  // stored.
  m.def(
      "gather_rows_(Tensor(a!) out, Tensor? places, Tensor source, Tensor rows, Tensor? mean, "
      "float scale) -> ()");

  // left [M, K] times right [K, P] plus bias [P], and of that ReLU, [M, P]: "screened" and "fp32"
  // alike in float32 precision, "bf16" and "fp16" with both rounded first. Torch's product, which
  // follows the number of threads; but on CPUs with AMX bfloat16 tiles, or for float32 8-bit
  // integers, see isa/sliced_tiles.h, so that an error is in proportion to the largest numbers of a
  // row of left and a column of right.
  m.def(
      "dense_product(Tensor left, Tensor right, Tensor? bias, bool relu, str precision) -> "
      "Tensor product");

  // Sum over i != j of (ŵ_i·ŵ_j)², ŵ unit rows, by the D x D Gram matrix; loss [] and its gradient.
  m.def("decorrelation(Tensor W) -> (Tensor loss, Tensor grad)");

  // Squared correlations between latents' activations h [N, F] over the batch, by N x N Gram
  // matrices: within [] is the sum over i != j of latents [0, split), between [] that over pairs of
  // these with the others. A latent is silent where |h - mean| <= 2^-20 |h| and counts nothing;
  // n_active int64 [2] counts the others of each group. For the backward: means float64 [F],
  // inverse_norms [F] = 1 / |h - mean|, 0 where silent, and gram [G, N, N], the sum of z zᵀ over a
  // group's z = (h - mean) / |h - mean|; G is 1 where split = F, else 2.
  m.def(
      "code_correlation(Tensor h, int split) -> (Tensor within, Tensor between, Tensor n_active, "
      "Tensor means, Tensor inverse_norms, Tensor gram)");

  // grad_h [N, F] from the gradients [] of both sums; one that is absent is 0.
  m.def(
      "code_correlation_backward(Tensor? grad_within, Tensor? grad_between, Tensor h, int split, "
      "Tensor means, Tensor inverse_norms, Tensor gram) -> Tensor grad_h");
}
