"""Cases of `kernels.py`: the correlations of latents' activations over a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.support.kernel_setting import Case, Setting

SLOTS, RELATIONS, BATCH, TOP_K = 100_006, 6, 64, 32  # the largest training of supervised slots
MOST_TOKENS = 512


def correlation_cases(s: Setting) -> Iterator[Case]:
    """Yield the cases of code_correlation: for the size's latents and for supervised slots.

    PyTorch goes over tokens, and for the size's latents also over all pairs of latents if their
    matrices fit in memory.
    """
    n_tokens, d_sae = min(s.size.n_tokens, MOST_TOKENS), s.size.d_sae
    largest = (2 if s.device.type == "cpu" else 8) * 2**30
    if 4 * 4 * d_sae**2 <= largest:  # float32: the pairs, their squares, the gradients of both
        yield correlation_case(s, (n_tokens, d_sae, d_sae // 2), PAIRS)
    yield correlation_case(s, (n_tokens, d_sae, d_sae // 2), TOKENS)
    slots = (BATCH, SLOTS, SLOTS - RELATIONS)
    yield correlation_case(s, slots, TOKENS)
    yield correlation_case(s, slots, TOKENS, active=TOP_K)


def correlation_case(
    s: Setting,
    shape: tuple[int, int, int],  # N, F and the first latent of the second group
    form: Form,
    active: int | None = None,  # active latents a token, by default half of all
) -> Case:
    """Return the case of both sums and the gradient of their total."""
    n_tokens, d_sae, split = shape
    name, of_unit = form
    generator = torch.Generator(s.device).manual_seed(4)
    h = torch.randn(n_tokens, d_sae, generator=generator, device=s.device).relu_()
    if active is not None:
        top = h.topk(active)
        h = torch.zeros_like(h).scatter_(1, top.indices, top.values)
    one = torch.ones((), device=s.device)

    def ours() -> Tensor:
        saved = s.ops.code_correlation(h, split)[3:]
        gradient: Tensor = s.ops.code_correlation_backward(one, one, h, split, *saved)
        return gradient

    def theirs() -> Tensor:
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            centred = leaf - leaf.mean(0)
            unit = centred / torch.linalg.vector_norm(centred, dim=0).clamp_min(1e-12)
            within, between = of_unit(unit, split)
            return torch.autograd.grad(within + between, leaf)[0]

    latents = int((h != 0).any(0).sum())
    sparse = "" if active is None else f", {active} a token"
    flops = 3.0 * n_tokens**2 * latents
    rate = s.size.product_flops / s.products["fp32"]
    return Case(
        f"code_correlation with gradient {n_tokens}×{d_sae}{sparse}, PyTorch over {name}",
        ours,
        theirs,
        flops / rate + 4 * 3 * h.numel() / s.rates.stream,
        "3·N²·F operations at the rate of the fp32 product with F active latents, "
        "codes read twice, gradient written",
        lambda: (ours(), theirs()),
    )


def over_pairs(
    unit: Tensor,  # [N, F]
    split: int,
) -> tuple[Tensor, Tensor]:
    """Return both sums by their definition, from an F×F matrix."""
    squares = (unit.t() @ unit).square()
    return squares[:split, :split].sum(), squares[:split, split:].sum()


def over_tokens(
    unit: Tensor,  # [N, F]
    split: int,
) -> tuple[Tensor, Tensor]:
    """Return both sums from N×N Gram matrices, as sae_fast's op computes them."""
    first, second = (part @ part.t() for part in (unit[:, :split], unit[:, split:]))
    return first.square().sum(), (first * second).sum()


Form = tuple[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]]
PAIRS: Form = ("all pairs", over_pairs)
TOKENS: Form = ("tokens", over_tokens)
