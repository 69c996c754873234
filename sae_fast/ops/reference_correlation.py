"""Squared correlations between latents' activations in plain PyTorch, part of `reference.py`."""

import torch
from torch import Tensor

SILENT_ROUNDINGS = 8  # of the dtype's eps, which is two roundings


def code_correlation(
    h: Tensor,  # [N, F]
    split: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sums over i != j within the first `split` latents, and over pairs with the others.

    With z the activations less their mean, at unit length, and K = Σ z zᵀ [N, N] over a group, they
    are |K|² less the latents that are not silent, and the inner product of the groups' matrices.
    """
    n_tokens, d_sae = h.shape
    means = h.sum(0, dtype=torch.float64) / max(n_tokens, 1)
    centred = h - means
    norms = torch.linalg.vector_norm(centred, dim=0)
    # |h|, from both of its parts.
    whole = (norms.square() + n_tokens * means.square()).sqrt()
    limits = torch.finfo(h.dtype)
    silent = (norms <= SILENT_ROUNDINGS * limits.eps * whole) | (norms < limits.tiny)
    inverse_norms = torch.where(silent, 0.0, norms.reciprocal()).to(h.dtype)
    unit = centred.to(h.dtype).mul_(inverse_norms)
    groups = (unit[:, :split], unit[:, split:])[: 1 if split == d_sae else 2]
    gram = torch.stack([group @ group.t() for group in groups])
    n_active = torch.stack([(~part).sum() for part in (silent[:split], silent[split:])])
    wide = gram.double()
    within = wide[0].square().sum() - n_active[0]
    between = (wide[0] * wide[-1]).sum() if len(groups) == 2 else torch.zeros_like(within)
    return within.to(h.dtype), between.to(h.dtype), n_active, means, inverse_norms, gram


def code_correlation_backward(
    grad_within: Tensor | None,  # []
    grad_between: Tensor | None,  # []
    h: Tensor,  # [N, F]
    split: int,
    means: Tensor,  # [F] float64
    inverse_norms: Tensor,  # [F]
    gram: Tensor,  # [G, N, N]
) -> Tensor:
    """grad_h: (p - (p·z) z) / |h - mean| with p = 4 K_A z + 2 K_B z, or 2 K_A z for the others."""
    unit = (h - means).to(h.dtype).mul_(inverse_norms)
    grad_h = torch.zeros_like(unit)
    if grad_within is not None:
        grad_h[:, :split] += 4 * grad_within * (gram[0] @ unit[:, :split])
    if grad_between is not None and len(gram) == 2:
        grad_h[:, :split] += 2 * grad_between * (gram[1] @ unit[:, :split])
        grad_h[:, split:] += 2 * grad_between * (gram[0] @ unit[:, split:])
    along = (grad_h * unit).sum(0)
    grad_h = grad_h.sub_(along * unit).mul_(inverse_norms)
    return grad_h.masked_fill_(inverse_norms == 0, 0.0)
