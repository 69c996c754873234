"""Cases of `kernels.py`: weight gradients, the optimiser's update and the geometry of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.support.kernel_setting import Case, Setting
from sae_fast.ops.reference.moments import moment_blocks
from sae_fast.training.optimizer.row_optimizer import STATE_DTYPES
from sae_fast.training.optimizer.signum import ScheduleFreeSignum, Signum

# With these a step moves the weights by more than their rounding.
LEARNING_RATES = {"adam": 1e-3, "sgd": 1.0, "signum": 1e-3, "schedule_free_signum": 1e-3}
BETAS, EPS, CLIP = (0.9, 0.999), 1e-8, 1.0


def gradient_cases(s: Setting) -> Iterator[Case]:
    """Yield the cases of weight gradients: stored by rows, and applied without being stored."""
    w, (values, indices) = s.weights, s.code
    size = s.size
    leaf = w.W_dec.clone().requires_grad_()
    bag = F.embedding_bag(indices, leaf, per_sample_weights=values, mode="sum")

    def torch_rows() -> Tensor:
        return torch.autograd.grad(bag, leaf, s.x, retain_graph=True)[0]

    def rows() -> Tensor:
        result: Tensor = s.ops.accumulate_rows(values, indices, None, s.x, size.d_sae)[0]
        return result

    gathered = size.entries * size.d_in * 4 / s.rates.gather_tokens
    yield Case(
        "accumulate_rows",
        rows,
        torch_rows,
        gathered + 4 * size.d_sae * size.d_in / s.rates.stream,
        "N·K rows gathered, F·D written",
        lambda: (rows(), torch_rows()),
    )

    def torch_order() -> Tensor:
        latents, order = torch.sort(indices.flatten(), stable=True)
        torch.searchsorted(latents, torch.arange(size.d_sae + 1, dtype=torch.int32))
        return order

    def order() -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = s.ops.latent_major(
            values, indices, None, size.d_sae
        )
        return result

    yield Case(
        "latent_major",
        order,
        torch_order,
        size.entries * 20 / s.rates.stream,
        "values and indices read twice, 8 bytes an entry written",
        lambda: (order()[1], torch_order()[: order()[1].numel()]),
    )
    for states in STATE_DTYPES:
        yield update_case(s, order, torch_rows, "adam", states)
    for rule in ("sgd", "signum", "schedule_free_signum"):
        yield update_case(s, order, torch_rows, rule, "fp32")


def update_case(
    s: Setting,
    order: Callable[[], tuple[Tensor, Tensor, Tensor]],
    torch_rows: Callable[[], Tensor],
    rule: str,
    states: str,
) -> Case:
    """Return the case of updating W_dec: norm, clip, projection, step and unit rows.

    sae_fast does it in two passes without storing a gradient. PyTorch's moments are always float32.
    """
    size, W_dec = s.size, s.weights.W_dec
    latent_offsets, entries, tokens = order()
    coefficients = s.code[0].flatten()[entries.long()]

    rate, one = torch.tensor(LEARNING_RATES[rule], dtype=torch.float64), torch.tensor(1.0)
    steps, halted = torch.tensor(0), torch.tensor(-1)
    averages = rule == "schedule_free_signum"
    squares = torch.zeros((), dtype=torch.float64) if averages else None

    def update(W: Tensor, moments: list[Tensor | None]) -> Tensor:
        squared, sums, cached, slots = s.ops.row_gradient_norm(
            latent_offsets, tokens, coefficients, s.x, None, W, None
        )
        _, scalars = s.ops.update_scalars(
            *(squared, rate, one, steps.zero_(), halted),
            *(None if squares is None else squares.zero_(), rule),
            *(CLIP, *BETAS, EPS, 0.0, False),
        )
        s.ops.fused_update_(
            *(W, *moments, latent_offsets, tokens, coefficients, s.x, None, None),
            *(sums, cached, slots, scalars, steps),
            *(rule, True, True, None, None, None, "fp32"),
        )
        return W

    count = 2 if rule == "adam" else 1

    def fresh() -> tuple[Tensor, list[Tensor | None]]:
        moments = [torch.zeros_like(W_dec, dtype=STATE_DTYPES[states]) for _ in range(count)]
        blocks = (size.d_sae, moment_blocks(size.d_in))
        scales = [W_dec.new_zeros(blocks) if states == "8bit" else None for _ in range(count)]
        none = [None] * (2 - count)
        return W_dec.clone(), [*moments, *none, *scales, *none]

    def torch_fresh() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        W = torch.nn.Parameter(W_dec.clone())
        return W, torch_optimizer(rule, W)

    ours, theirs = fresh(), torch_fresh()
    gathered = size.entries * size.d_in * 4 / s.rates.gather_tokens
    bytes_moved = 8 + 2 * count * STATE_DTYPES[states].itemsize  # W, moments: read and written
    kept = "" if states == "fp32" else f", {states} states"
    kept = kept if rule == "adam" else f", {rule}"
    return Case(
        f"row_gradient_norm + fused_update_ (W_dec{kept})",
        lambda: update(*ours),
        lambda: torch_update(torch_rows(), *theirs),
        gathered + bytes_moved * size.d_sae * size.d_in / s.rates.stream,
        "N·K rows gathered once, W and moments read and written",
        lambda: (
            update(*fresh()) - W_dec,
            torch_update(torch_rows(), *torch_fresh()) - W_dec,
        ),
        # The first step is ±lr; where a gradient cancels to 0, the two may differ in sign.
        tolerance=1e-3 if rule == "sgd" else 2.1,
    )


def torch_optimizer(rule: str, W: torch.nn.Parameter) -> torch.optim.Optimizer:
    """Return PyTorch's fastest optimiser of a rule."""
    rate = LEARNING_RATES[rule]
    if rule == "sgd":
        return torch.optim.SGD([W], lr=rate, momentum=BETAS[0], fused=True)
    if rule == "signum":
        return Signum([W], lr=rate, momentum=BETAS[0], weight_decay=0.0)
    if rule == "schedule_free_signum":
        return ScheduleFreeSignum([W], lr=rate, momentum=BETAS[0], weight_decay=0.0)
    return torch.optim.Adam([W], lr=rate, betas=BETAS, eps=EPS, fused=True)


@torch.no_grad()
def torch_update(grad: Tensor, W: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
    """Apply projection, clip, step and unit rows in PyTorch, from a dense gradient; return W."""
    grad -= (grad * W).sum(1, keepdim=True) * W
    W.grad = grad
    torch.nn.utils.clip_grad_norm_([W], CLIP)
    optimizer.step()
    W.div_(W.norm(dim=1, keepdim=True).clamp_min(1e-12))
    return W.detach()


def weight_cases(s: Setting) -> Iterator[Case]:
    """Yield the cases that work on a weight matrix alone: unit rows and decorrelation."""
    W = s.weights.W_dec * 1.5
    ours, theirs = W.clone(), W.clone()

    def torch_normalize(matrix: Tensor) -> Tensor:
        matrix /= matrix.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return matrix

    def normalize(matrix: Tensor) -> Tensor:
        s.ops.normalize_rows_(matrix)
        return matrix

    yield Case(
        "normalize_rows_",
        lambda: normalize(ours),
        lambda: torch_normalize(theirs),
        8 * W.numel() / s.rates.stream,
        "read and written once",
        lambda: (normalize(W.clone()), torch_normalize(W.clone())),
    )
    largest = (2 if s.device.type == "cpu" else 8) * 2**30
    if 4 * s.size.d_sae**2 > largest:  # bytes of one F×F array of the naive form
        return

    def naive() -> Tensor:
        matrix = s.weights.W_dec.clone().requires_grad_()
        gram = F.normalize(matrix, dim=1) @ F.normalize(matrix, dim=1).T
        loss = gram.square().sum() - gram.diagonal().square().sum()
        return torch.autograd.grad(loss, matrix)[0]

    def decorrelation() -> Tensor:
        gradient: Tensor = s.ops.decorrelation(s.weights.W_dec)[1]
        return gradient

    flops = 3.0 * s.size.d_sae * s.size.d_in**2
    rate = s.size.product_flops / s.products["fp32"]
    yield Case(
        "decorrelation with gradient",
        decorrelation,
        naive,
        flops / rate,
        "3·F·D² operations at the rate of the fp32 product",
        lambda: (decorrelation(), naive()),
    )
