"""Set the thresholds of a trained model so that held-out rows have the L0 that was asked for.

In training the L0 is the one of rows that the model has learnt from. On other rows as many latents
exceed the same thresholds only where the rows are many: with 16,384 rows of MiniLM, seen 62 times,
BatchTopK of k = 16 has an L0 of 27 on other rows; with 400,096, seen 2.6 times, 16.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from sae_fast.autoencoder import SparseAutoencoder

_PREFIX = "before_calibration."
_NEAR = 0.01  # share of the L0 by which it may be off
_MOST_PASSES = 8  # over the rows; three are usual


class Calibration:
    """The thresholds that a run is evaluated and saved with, and what they were before.

    A checkpoint holds both, so that a run which goes on from its last step continues as if it had
    not been calibrated.

    Args:
        sae: the model in training, whose thresholds are set.
    """

    def __init__(self, sae: SparseAutoencoder) -> None:
        self._sae = sae
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def calibrate_(self, model: Callable[[], SparseAutoencoder], rows: Iterable[Tensor]) -> None:
        """Raise or lower all thresholds by one number until the L0 is the one that was asked for.

        Weights stay as they are, and so does the magnitude of a latent that is still active, except
        with relu, whose threshold is its bias.

        Args:
            model: returns the model to evaluate, the one in training or an average of its weights.
            rows: batches [n, D] as captured, which can be read several times.
        """
        sae = self._sae
        wanted = sae.architecture.wanted_l0
        if wanted is None:
            return
        before = {name: v.clone() for name, v in sae.state_dict().items() if v.dim() <= 1}
        rise = error_before = 0.0
        for _ in range(_MOST_PASSES):
            l0, excess = _measure(model(), rows)
            if excess == 0 or abs(l0 / wanted - 1) <= _NEAR:
                break
            error = math.log(l0 / wanted)
            # With an exponential tail log L0 falls by 1 where thresholds rise by the mean excess. A
            # few large activations make that mean too large, as the second pass shows.
            slope = (error_before - error) / rise if rise else 0.0
            rise, error_before = error / (slope if slope > 0 else 1 / excess), error
            sae.architecture.raise_thresholds_(sae.weights, sae.W_enc.new_tensor(rise))
            sae.clamp_parameters_()
        after = sae.state_dict()
        self._before = {n: v for n, v in before.items() if not torch.equal(v, after[n])}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors from before under names of their own; none before a calibration."""
        return {_PREFIX + name: value for name, value in self._before.items()}

    def expected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the model that those from before among `tensors` must be like."""
        model = {_PREFIX + name: value for name, value in self._sae.state_dict().items()}
        return {name: model[name] for name in tensors if name in model}

    @torch.no_grad()
    def undo_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the tensors from before among `tensors` back into the model."""
        for name, now in self._sae.state_dict().items():
            if (before := tensors.get(_PREFIX + name)) is not None:
                now.copy_(before)


def _measure(sae: SparseAutoencoder, rows: Iterable[Tensor]) -> tuple[float, float]:
    """Return the L0 of rows, and by how much active latents exceed their thresholds on average."""
    device = sae.W_enc.device
    limits = sae.architecture.thresholds(sae.weights)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    count = 0
    if limits is None:
        return 0.0, 0.0
    with sae.kept_copies():
        for batch in rows:
            x = batch.to(device)
            code = sae.encode(x)
            above = (code.values - code.spread(limits)).clamp_min(0).double()
            sums += torch.stack([code.l0().double().sum(), above.sum()])
            count += len(batch)
    active, excess = sae.engine.total(sums).tolist()
    return active / count, excess / max(active, 1.0)
