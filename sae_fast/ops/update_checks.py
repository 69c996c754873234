"""The argument checks of the optimiser's ops; checks.py has the list of their messages."""

import torch
from torch import Tensor

from sae_fast.ops.call import GATHERED, MASTER, Call
from sae_fast.ops.moments import MOMENT_DTYPES, moment_blocks

UPDATE_SCALARS = 11  # of update_scalars
RULES = ("adam", "sgd", "signum", "schedule_free_signum")


def _factors(
    op: Call,
    latent_offsets: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    dense: Tensor,
    shift: Tensor | None,
) -> tuple[int, int]:
    """Checks a factored gradient; returns its shape [d_sae, d_in]."""
    d_sae = op.latents(latent_offsets)
    op.tensor("rows", rows, (None,), (torch.int32,))
    op.tensor("coefficients", coefficients, (rows.size(0),), MASTER)
    op.tensor("dense", dense, (None, None), GATHERED)
    if shift is not None:
        op.tensor("shift", shift, (dense.size(1),), MASTER)
    return d_sae, dense.size(1)


def row_gradient_norm(  # noqa: D103
    latent_offsets: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    dense: Tensor,
    shift: Tensor | None,
    project_onto: Tensor | None,
    extra_grad: Tensor | None,
) -> None:
    op = Call("row_gradient_norm", "dense", dense)
    shape = _factors(op, latent_offsets, rows, coefficients, dense, shift)
    if project_onto is not None:
        op.tensor("project_onto", project_onto, shape, MASTER)
    if extra_grad is not None:
        op.tensor("extra_grad", extra_grad, shape, MASTER)


def update_scalars(  # noqa: D103
    squared_norm: Tensor,
    lr: Tensor,
    loss_scale: Tensor,
    step_count: Tensor,
    halted: Tensor,
    lr_squares: Tensor | None,
    rule: str,
    grad_clip: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    skip_overflow: bool,
) -> None:
    op = Call("update_scalars", "squared_norm", squared_norm)
    op.tensor("squared_norm", squared_norm, (), (torch.float64,))
    op.tensor("lr", lr, (), (torch.float64,))
    op.tensor("loss_scale", loss_scale, (), MASTER)
    op.tensor("step_count", step_count, (), (torch.int64,))
    op.tensor("halted", halted, (), (torch.int64,))
    _rule(op, rule)
    _of_rule(op, "lr_squares", lr_squares, rule, rule == "schedule_free_signum")
    if lr_squares is not None:
        op.tensor("lr_squares", lr_squares, (), (torch.float64,))


def _rule(op: Call, rule: str) -> None:
    must = "rule must be adam, sgd, signum or schedule_free_signum"
    op.require(rule in RULES, must, rule)


def _of_rule(op: Call, name: str, tensor: Tensor | None, rule: str, wanted: bool) -> None:
    must = f"{name} must be given where rule is {rule}"
    op.require(tensor is not None or not wanted, must, "none")
    must = f"{name} must be none where rule is {rule}"
    op.require(tensor is None or wanted, must, "a tensor")


def _rule_and_squares(op: Call, rule: str, exp_avg_sq: Tensor | None) -> None:
    _rule(op, rule)
    _of_rule(op, "exp_avg_sq", exp_avg_sq, rule, rule == "adam")


def _moments(
    op: Call,
    rule: str,
    exp_avg: Tensor,
    exp_avg_sq: Tensor | None,
    exp_avg_scale: Tensor | None,
    exp_avg_sq_scale: Tensor | None,
    step_count: Tensor | None,
    shape: tuple[int, int],
) -> None:
    _rule_and_squares(op, rule, exp_avg_sq)
    # In float64 a step is the reference's own, as in every other op.
    exact = exp_avg.dtype == torch.float64
    op.tensor("exp_avg", exp_avg, shape, MASTER if exact else MOMENT_DTYPES)
    if exp_avg_sq is not None:
        op.tensor("exp_avg_sq", exp_avg_sq, shape, MASTER if exact else (exp_avg.dtype,))
    else:
        must = f"exp_avg_sq_scale must be none where rule is {rule}"
        op.require(exp_avg_sq_scale is None, must, "a tensor")
    _scale(op, "exp_avg_scale", exp_avg_scale, exp_avg, shape)
    if exp_avg_sq is not None:
        _scale(op, "exp_avg_sq_scale", exp_avg_sq_scale, exp_avg, shape)
    is_random = exp_avg.dtype in (torch.bfloat16, torch.uint8)
    must = f"step_count must be given where exp_avg is {_name(exp_avg.dtype)}"
    op.require(step_count is not None or not is_random, must, "none")
    if step_count is not None:
        op.tensor("step_count", step_count, (), (torch.int64,))


def _scale(
    op: Call, name: str, scale: Tensor | None, exp_avg: Tensor, shape: tuple[int, int]
) -> None:
    in_blocks, dtype = exp_avg.dtype == torch.uint8, _name(exp_avg.dtype)
    must = f"{name} must be none where exp_avg is {dtype}"
    op.require(in_blocks or scale is None, must, "a tensor")
    must = f"{name} must be given where exp_avg is {dtype}"
    op.require(scale is not None or not in_blocks, must, "none")
    if scale is not None:
        op.tensor(name, scale, (shape[0], moment_blocks(shape[1])), MASTER)
        op.in_place(name, scale)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fused_update_(  # noqa: D103
    W: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor | None,
    exp_avg_scale: Tensor | None,
    exp_avg_sq_scale: Tensor | None,
    latent_offsets: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    dense: Tensor,
    shift: Tensor | None,
    extra_grad: Tensor | None,
    sums: Tensor,
    cached: Tensor,
    cache_slots: Tensor,
    scalars: Tensor,
    step_count: Tensor | None,
    rule: str,
    project: bool,
    unit_norm: bool,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
    precision: str,
) -> None:
    op = Call("fused_update_", "W", W)
    shape = _factors(op, latent_offsets, rows, coefficients, dense, shift)
    if extra_grad is not None:
        op.tensor("extra_grad", extra_grad, shape, MASTER)
    op.tensor("W", W, shape, MASTER)
    scales = (exp_avg_scale, exp_avg_sq_scale)
    _moments(op, rule, exp_avg, exp_avg_sq, *scales, step_count, shape)
    op.tensor("sums", sums, shape[:1], MASTER)
    op.tensor("cached", cached, (None, shape[1]), MASTER)
    op.tensor("cache_slots", cache_slots, shape[:1], (torch.int32,))
    op.tensor("scalars", scalars, (UPDATE_SCALARS,), MASTER)
    written = {"W": W, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    copies = {"packed": packed, "stats": stats, "rounded": rounded}
    for name, tensor in (*written.items(), *copies.items()):
        if tensor is not None:
            op.in_place(name, tensor)
    op.precision(precision)


def update_vector_(  # noqa: D103
    w: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor | None,
    grad: Tensor | None,
    scalars: Tensor,
    rule: str,
) -> None:
    op = Call("update_vector_", "w", w)
    _rule_and_squares(op, rule, exp_avg_sq)
    written = {"w": w, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in {**written, "grad": grad}.items():
        if tensor is not None:
            op.same_shape(name, tensor, "w", w)
            op.dtype(name, tensor, MASTER)
            op.same_device(name, tensor)
    op.tensor("scalars", scalars, (UPDATE_SCALARS,), MASTER)
    for name, tensor in written.items():
        if tensor is not None:
            op.in_place(name, tensor)
