"""BatchTopK: the N·k largest pre-activations of a batch, at inference a fixed threshold.

arXiv:2412.06410. A token may have more latents or fewer, k on average. What a token's code is must
not depend on the batch it comes in once training is over: then the latents above `threshold` are
active, which is the mean of the least active value in the batches trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder.architecture import Mode, Weights
from sae_fast.autoencoder.topk import TopK
from sae_fast.config import SAEConfig

# The mean is of all batches so far, and from so many on exponential, since the model moves.
_WINDOW = 100


class BatchTopK(TopK):
    """How a BatchTopK model selects latents; AuxK is that of TopK."""

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        self.select = ops.encode_batch_topk

    def buffers(self) -> dict[str, Tensor]:
        """`threshold`, and how many batches have set it; both 0-d."""
        return {
            "threshold": torch.zeros(()),
            "threshold_updates": torch.zeros((), dtype=torch.int64),
        }

    def infer(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        mode: Mode,
    ) -> ops.SparseCode:
        """The latents above the threshold; those of the batch while no batch has set one."""
        if int(weights.own["threshold_updates"]) == 0:
            return self.encode(weights, x, mode)
        threshold = weights.own["threshold"].expand(len(weights.W_enc))
        return ops.encode_threshold(
            x,
            *weights[:2],
            weights.input_bias,
            threshold,
            precision=mode.precision,
            dense_grad=mode.dense_grad,
        )

    def follow_(self, weights: Weights, code: ops.Code) -> None:
        """Move the threshold towards the least active value of `code`, if it has any."""
        threshold, updates = weights.own["threshold"], weights.own["threshold_updates"]
        values = code.values.detach()
        least = torch.where(values > 0, values, torch.inf).amin()
        found = torch.isfinite(least)
        updates.add_(found)
        rate = updates.clamp(1, _WINDOW).reciprocal()
        threshold.add_(torch.where(found, rate * (least - threshold), 0.0))

    def rescale_(self, weights: Weights, factor: Tensor) -> None:
        """Follow a change of the units that the code's values are in."""
        weights.own["threshold"].mul_(factor)
