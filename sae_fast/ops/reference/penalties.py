"""The penalties on weights and codes in plain PyTorch."""

import torch
from torch import Tensor

from sae_fast.ops.reference.update import row_norms

_SILENT_ROUNDINGS = 8  # of the dtype's eps, which is two roundings


def decorrelation(W: Tensor) -> tuple[Tensor, Tensor]:  # [F, D]
    """Return the sum over i != j of (ŵ_i·ŵ_j)² and its gradient, by the D×D Gram matrix.

    With S = ŴᵀŴ the sum over all pairs is |S|², from which the diagonal |ŵ_j|⁴ is subtracted.
    """
    norms = row_norms(W)
    unit = W / norms
    gram = unit.t() @ unit
    squared = unit.square().sum(1, keepdim=True)
    # Both terms are near F²/D; their difference needs the wider sum.
    loss = gram.double().square().sum() - squared.double().square().sum()
    grad = (unit @ gram).sub_(squared * unit).mul_(4)
    along = (grad * unit).sum(1, keepdim=True)
    return loss.to(W.dtype), grad.sub_(along * unit).div_(norms)


def code_correlation(
    h: Tensor,  # [N, F]
    split: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return squared correlations summed within the first `split` latents and across the split.

    With z the activations less their mean, at unit length, and K = Σ z zᵀ [N, N] over a group, they
    are |K|² less the number of latents that are not silent, and the inner product of both K.
    """
    n_tokens, d_sae = h.shape
    means = h.sum(0, dtype=torch.float64) / max(n_tokens, 1)
    centred = h - means
    norms = torch.linalg.vector_norm(centred, dim=0)
    # |h|, from its mean and the rest.
    whole = (norms.square() + n_tokens * means.square()).sqrt()
    limits = torch.finfo(h.dtype)
    silent = (norms <= _SILENT_ROUNDINGS * limits.eps * whole) | (norms < limits.tiny)
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
    """Return grad_h [N, F]: (p - (p·z) z) / |h - mean|.

    p is 4 K_A z + 2 K_B z for latents before the split, 2 K_A z for the others, each term times
    the gradient of its sum.
    """
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
