"""BatchTopK: the N·k largest pre-activations of a batch, at inference a fixed threshold.

arXiv:2412.06410. A token may have more latents or fewer, k on average. What a token's code is must
not depend on the batch it comes in once training is over: then the latents above `threshold` are
active, which is the mean of the least active value in the batches trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sae_fast import ops
from sae_fast.autoencoder.topk import Buffers, TopK

# The mean is of all batches so far, and from so many on exponential, since the model moves.
_WINDOW = 100


class BatchTopK(TopK):
    """How a BatchTopK model selects latents; AuxK is that of TopK."""

    select = staticmethod(ops.encode_batch_topk)

    def buffers(self) -> Buffers:
        """`threshold`, and how many batches have set it; both 0-d."""
        return {
            "threshold": torch.zeros(()),
            "threshold_updates": torch.zeros((), dtype=torch.int64),
        }

    def infer(
        self,
        x: Tensor,  # [N, D], normalised
        W_enc: nn.Parameter,  # [F, D]
        b_enc: nn.Parameter,  # [F]
        b_dec: nn.Parameter,  # [D]
        buffers: Buffers,
        *,
        precision: str,
        dense_grad: bool,
    ) -> ops.SparseCode:
        """The latents above the threshold; those of the batch while no batch has set one."""
        if int(buffers["threshold_updates"]) == 0:
            return self.encode(x, W_enc, b_enc, b_dec, precision=precision, dense_grad=dense_grad)
        threshold = buffers["threshold"].expand(W_enc.shape[0])
        return ops.encode_threshold(
            x, W_enc, b_enc, b_dec, threshold, precision=precision, dense_grad=dense_grad
        )

    def follow_(self, buffers: Buffers, code: ops.SparseCode) -> None:
        """Move the threshold towards the least active value of `code`, if it has any."""
        threshold, updates = buffers["threshold"], buffers["threshold_updates"]
        values = code.values.detach()
        least = torch.where(values > 0, values, torch.inf).amin()
        found = torch.isfinite(least)
        updates.add_(found)
        rate = updates.clamp(1, _WINDOW).reciprocal()
        threshold.add_(torch.where(found, rate * (least - threshold), 0.0))

    def rescale_(self, buffers: Buffers, factor: Tensor) -> None:
        """Follow a change of the units that the code's values are in."""
        buffers["threshold"].mul_(factor)
