"""Metrics of a code and of a reconstruction that are at hand, and their loss by term.

The penalties come from the architecture: `Architecture.penalty` is what the training minimises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder import losses
from sae_fast.config import SAEConfig

Code = ops.SparseCode | Tensor  # a dense code is [..., F]


def reconstruction_term(
    config: SAEConfig,
    error: Tensor,  # [N, D], x̂ − x in normalised units
    x: Tensor,  # [N, D], in normalised units
) -> Tensor:
    """Return the error as the term of the loss that `loss_fn` names, with its coefficient."""
    squared = losses.deterministic_sum(error.square())
    if config.loss_fn == "fvu":
        return config.reconstruction_coeff * (
            squared * losses.inverse_variance(x, losses.total_variance(x))
        )
    return config.reconstruction_coeff * (squared / len(error))


def as_code(config: SAEConfig, h: Code, n_tokens: int) -> ops.Code:
    """Return a code given in either form as ops take it, signed where the model's codes are.

    Raises ValueError where it is not one of `n_tokens` tokens or has another number of latents.
    """
    values, found = _values(h, config.d_sae)
    if found != n_tokens:
        raise ValueError(f"h must be the code of {n_tokens} tokens, got {found}")
    signed = config.has_signed_codes
    if isinstance(h, ops.SparseCode):
        h = h.flatten()
        return h if h.signed == signed else replace(h, signed=signed)
    dense = values.reshape(-1, config.d_sae)
    return ops.DenseCode(dense, torch.full((), dense.numel(), device=h.device), signed=signed)


def weighted_sum(terms: Mapping[str, float | Tensor], like: Tensor) -> dict[str, float | Tensor]:
    """Return the terms and `total_loss`, their sum, as numbers; `total_loss_tensor` has its graph.

    Args:
        terms: 0-d each, with their coefficients.
        like: a tensor of the dtype and device to add them up in.
    """
    tensors = {
        name: torch.as_tensor(term, dtype=like.dtype, device=like.device)
        for name, term in terms.items()
    }
    total = torch.stack(list(tensors.values())).sum()
    numbers = torch.stack([*tensors.values(), total]).detach().tolist()
    return {
        **dict(zip([*tensors, "total_loss"], numbers, strict=True)),
        "total_loss_tensor": total,
    }


@torch.no_grad()
def activation_stats(
    config: SAEConfig,
    h: Code,
    dead_mask: Tensor,  # [F] bool
) -> dict[str, float]:
    """Return how active the latents are, see `SparseAutoencoder.get_activation_stats`."""
    d_sae = config.d_sae
    values, n_tokens = _values(h, d_sae)
    if config.has_signed_codes:
        values = values.abs()
    active = values > 0
    fired = h.fired() if isinstance(h, ops.SparseCode) else active.reshape(-1, d_sae).any(0)
    n_active = active.sum()
    largest = values.amax() if values.numel() else values.new_zeros(())
    return _numbers(
        {
            "l0": losses.ratio(n_active, n_tokens),
            "activation_fraction": losses.ratio(n_active, n_tokens * d_sae),
            "mean_activation": torch.where(active, values, 0.0).sum() / n_active.clamp_min(1),
            "max_activation": largest.clamp_min(0),
            "silent_fraction": 1 - fired.double().mean(),
            "dead_fraction": dead_mask.double().mean(),
        }
    )


@torch.no_grad()
def reconstruction_error(
    x: Tensor,  # [N, D]
    x_hat: Tensor,  # [N, D]
) -> dict[str, float]:
    """Return how far x̂ is from x, see `SparseAutoencoder.get_reconstruction_error`."""
    wide, wide_hat = x.double(), x_hat.double()
    squared = (wide_hat - wide).square().sum()
    fvu = squared / (wide - wide.mean(0)).square().sum()
    return _numbers(
        {
            "squared_error": squared / len(x),
            "mse": squared / x.numel(),
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "explained_variance_overall": 1 - squared / x.numel() / wide.var(),
            "relative_error": (squared / wide.square().sum()).sqrt(),
            "cosine": torch.cosine_similarity(wide, wide_hat, dim=1).mean(),
        }
    )


def _values(h: Code, d_sae: int) -> tuple[Tensor, int]:
    """Return the values of a code and its number of tokens; ValueError for another width."""
    if isinstance(h, ops.SparseCode):
        width, values, n_tokens = h.d_sae, h.values, h.n_rows
    else:
        width, values, n_tokens = h.shape[-1], h, h.shape[:-1].numel()
    if width != d_sae:
        raise ValueError(f"h must be a code of d_sae = {d_sae} latents, got {width}")
    return values, n_tokens


def _numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    values: list[float] = torch.stack([value.double() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))
