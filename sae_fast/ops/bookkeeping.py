"""The work of a training step beside the passes over the weights, in few launches."""

import torch
from torch import Tensor

from sae_fast.ops.code import SparseCode


@torch.no_grad()
def batch_statistics(
    squared_error: Tensor,  # [N]
    target: Tensor,  # [N, D]
    code: SparseCode,
    variance: Tensor | None = None,  # 0-d
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return FVU, L0 and variance of a batch, 0-d each, and which latents fired, [F] bool.

    The variance is Σ (target − mean(target))², the mean taken by column, or the given one; FVU is
    the squared errors' sum divided by it. A latent fires where its value is above 0, in a signed
    code where it is not 0; L0 is the number of such entries per token.
    """
    fvu, l0, found, fired = torch.ops.sae_fast.batch_statistics.default(
        *(squared_error, target, code.values.detach(), code.indices),
        *(variance, code.d_sae, code.signed),
    )
    return fvu, l0, found, fired


@torch.no_grad()
def add_squares_(
    total: Tensor,  # 0-d float64
    grad: Tensor,  # any shape
    second: Tensor | None = None,  # any shape
    more: Tensor | None = None,  # 0-d float64
) -> None:
    """Add `more` and the sums of the squares of one or two tensors to `total`, in float64."""
    torch.ops.sae_fast.add_squares_.default(total, grad, second, more)
    torch.autograd.graph.increment_version(total)


@torch.no_grad()
def finish_step_(
    poison: Tensor,  # 0-d
    steps: Tensor,  # 0-d int64
    metrics: Tensor,  # [M + 2]
    tokens_since_fired: Tensor,  # [F] int64
    fault: Tensor | None,  # 0-d
    losses: Tensor,  # [M]
    norm: Tensor,  # 0-d
    variance: Tensor,  # 0-d
    fired: Tensor,  # [F] bool
    n_tokens: int,
    *,
    norm_poisons: bool,
) -> None:
    """Write down a training step: its metrics, whether it failed, and how long latents are silent.

    Args:
        poison: 0, or NaN since a step that failed. Becomes NaN where `fault`, the first loss or,
            with `norm_poisons`, the norm is not finite.
        steps: grows by 1 until a step has failed, in that step too.
        metrics: become losses, norm and variance until a step has failed, in that step too.
        tokens_since_fired: becomes 0 for latents that fired, and grows by `n_tokens` for others.
        fault: NaN where the step failed in a part whose losses do not show it; None: in none.
        losses: and other metrics of the step.
        norm: of the gradient.
        variance: of the batch.
        fired: which latents fired in the step.
        n_tokens: of the step.
        norm_poisons: whether a norm that is not finite is a failure.
    """
    torch.ops.sae_fast.finish_step_.default(
        *(poison, steps, metrics, tokens_since_fired, fault, losses, norm, variance, fired),
        *(n_tokens, norm_poisons),
    )
    written = (poison, steps, metrics, tokens_since_fired)
    torch.autograd.graph.increment_version(written)
