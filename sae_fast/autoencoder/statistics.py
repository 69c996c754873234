"""What a code and a reconstruction are like, and what they cost, from tensors that are at hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder import losses
from sae_fast.config import SAEConfig

Code = ops.SparseCode | Tensor  # a dense code is [..., F]


def loss_components(
    config: SAEConfig,
    W_dec: Tensor,  # [F, D]
    error: Tensor,  # [N, D], x̂ − x in normalised units
    x: Tensor,  # [N, D], likewise
    h: Code,
    decorr_loss: Tensor,  # 0-d
    further: Mapping[str, float | Tensor],
) -> dict[str, float | Tensor]:
    """The terms that these determine and the `further` ones as numbers, their sum also a tensor."""
    values, n_tokens = _values(h, config.d_sae)
    if n_tokens != len(error):
        raise ValueError(f"h must be the code of {len(error)} tokens, got {n_tokens}")
    squared = losses.steady_sum(error.square())
    if config.loss_fn == "fvu":
        recon_loss = squared * losses.one_by_variance(x, losses.total_variance(x))
    else:
        recon_loss = squared / n_tokens
    terms = {
        "recon_loss": config.reconstruction_coeff * recon_loss,
        "l1_loss": (config.l1_penalty_coeff or 0.0) * _lp_loss(config, W_dec, h, values, n_tokens),
        "decorr_loss": decorr_loss,
    }
    for name, term in further.items():
        terms[name] = torch.as_tensor(term, dtype=error.dtype, device=error.device)
    total = torch.stack(list(terms.values())).sum()
    numbers = torch.stack([*terms.values(), total]).detach().tolist()
    return {
        **dict(zip([*terms, "total_loss"], numbers, strict=True)),
        "total_loss_tensor": total,
    }


def _lp_loss(config: SAEConfig, W_dec: Tensor, h: Code, values: Tensor, n_tokens: int) -> Tensor:
    """The L1 or Lp penalty without its coefficient, of the latents that the architecture has in it.

    A latent is weighted by the norm of its row where rows are free; relation slots are left out.
    """
    weights = None
    if config.decoder_norm == "free":
        weights = torch.linalg.vector_norm(W_dec, dim=1)
    if config.arch == "slots":
        is_free = torch.arange(config.d_sae, device=W_dec.device) < config.group_split
        weights = is_free.to(W_dec.dtype) if weights is None else weights * is_free
        if config.slots_l1_mean:
            weights = weights / config.group_split
    amounts = values.abs() if config.has_signed_codes else values
    if weights is not None:
        amounts = amounts * (h.spread(weights) if isinstance(h, ops.SparseCode) else weights)
    return losses.l1_loss(losses.lp_amounts(amounts, config.sparsity_norm_p), n_tokens)


@torch.no_grad()
def activation_stats(
    config: SAEConfig,
    h: Code,
    dead_mask: Tensor,  # [F] bool
) -> dict[str, float]:
    """See `SparseAutoencoder.get_activation_stats`."""
    d_sae = config.d_sae
    values, n_tokens = _values(h, d_sae)
    if config.has_signed_codes:
        values = values.abs()
    active = values > 0
    fired = h.fired() if isinstance(h, ops.SparseCode) else active.reshape(-1, d_sae).any(0)
    n_active = active.sum()
    largest = values.amax() if values.numel() else values.new_zeros(())
    figures = {
        "l0": losses.ratio(n_active, n_tokens),
        "activation_fraction": losses.ratio(n_active, n_tokens * d_sae),
        "mean_activation": torch.where(active, values, 0.0).sum() / n_active.clamp_min(1),
        "max_activation": largest.clamp_min(0),
        "silent_fraction": 1 - fired.double().mean(),
        "dead_fraction": dead_mask.double().mean(),
    }
    return _numbers(figures)


@torch.no_grad()
def reconstruction_error(
    x: Tensor,  # [N, D]
    x_hat: Tensor,  # [N, D]
) -> dict[str, float]:
    """See `SparseAutoencoder.get_reconstruction_error`."""
    wide, wide_hat = x.double(), x_hat.double()
    squared = (wide_hat - wide).square().sum()
    fvu = squared / (wide - wide.mean(0)).square().sum()
    figures = {
        "squared_error": squared / len(x),
        "mse": squared / x.numel(),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "explained_variance_overall": 1 - squared / x.numel() / wide.var(),
        "relative_error": (squared / wide.square().sum()).sqrt(),
        "cosine": torch.cosine_similarity(wide, wide_hat, dim=1).mean(),
    }
    return _numbers(figures)


def _values(h: Code, d_sae: int) -> tuple[Tensor, int]:
    """The values of a code, and of how many tokens they are; ValueError for another width."""
    if isinstance(h, ops.SparseCode):
        width, values, n_tokens = h.d_sae, h.values, h.n_rows
    else:
        width, values, n_tokens = h.shape[-1], h, h.shape[:-1].numel()
    if width != d_sae:
        raise ValueError(f"h must be a code of d_sae = {d_sae} latents, got {width}")
    return values, n_tokens


def _numbers(figures: dict[str, Tensor]) -> dict[str, float]:
    values: list[float] = torch.stack([value.double() for value in figures.values()]).tolist()
    return dict(zip(figures, values, strict=True))
