"""BatchTopK: the N·k largest pre-activations of a batch, at inference a fixed threshold.

arXiv:2412.06410. A token may have more latents or fewer, k on average. What a token's code is must
not depend on the batch it comes in once training is over: then the latents above `threshold` are
active, which is an average of the least active value among the N·k largest of the batches trained
on, of the latest above all: the model moves, and fastest at the start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder.architecture import Mode, Weights
from sae_fast.autoencoder.topk import TopK
from sae_fast.config import SAEConfig

# Batch t has the weight min(1, 16 / t) in the average, at least 1 / 100: at first only the latest
# counts, then about a sixteenth of all, and in the end 100. With a plain mean of the first 100 the
# threshold lags: held-out L0 after 50 steps (lr 3e-3, batches of 64 to 4096) is 0.16 to 0.42 of k.
_FORGETTING = 16
_WINDOW = 100


class BatchTopK(TopK):
    """How a BatchTopK model selects latents; AuxK is that of TopK."""

    selects_from_step = True

    def __init__(self, config: SAEConfig):
        super().__init__(config)
        self.select = ops.encode_batch_topk

    def buffers(self) -> dict[str, Tensor]:
        """`threshold`, and how many batches have set it; both 0-d."""
        return {
            "threshold": torch.zeros((), dtype=torch.float32),
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
        """Move the threshold towards the least active value of `code`, if it has any.

        While k is annealed the code has more than N·k entries; the largest N·k count.
        """
        threshold, updates = weights.own["threshold"], weights.own["threshold_updates"]
        values, wanted = code.values.detach().flatten(), code.n_rows * self.k
        if len(values) > wanted:
            values = values.sort(descending=True).values[:wanted]
        least = torch.where(values > 0, values, torch.inf).amin()
        found = torch.isfinite(least)
        updates.add_(found)
        rate = (_FORGETTING / updates.clamp_min(1).float()).clamp(1 / _WINDOW, 1.0)
        threshold.add_(torch.where(found, rate * (least - threshold), 0.0))

    def rescale_(self, weights: Weights, factor: Tensor) -> None:
        """Follow a change of the units that the code's values are in."""
        weights.own["threshold"].mul_(factor)
