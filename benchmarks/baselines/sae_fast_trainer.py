"""One training step of sae_fast, made of the calls its own trainer makes."""

from __future__ import annotations

from torch import Tensor

from benchmarks.support.problem import Weights
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.training.optimizer import RowAdam


class SaeFastTrainer:
    """Same interface as the baselines."""

    def __init__(self, weights: Weights, k: int, lr: float, *, precision: str = "screened") -> None:
        d_sae, d_in = weights.W_enc.shape
        config = SAEConfig(d_in=d_in, d_sae=d_sae, k=k, normalize_activations="none")
        self.sae = SparseAutoencoder(config)
        self.sae.load_state_dict(vars(weights), strict=False)
        self.precision = precision
        self.learning_rate = lr
        self.optimizer = RowAdam(self.sae, grad_clip=1.0, precision=precision)

    def step(self, x: Tensor) -> Tensor:
        """One whole training step on x [N, D]; returns the loss."""
        loss = self.sae.training_loss(x, precision=self.precision, dense_grad=False)
        loss.total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(self.learning_rate)
        self.optimizer.zero_grad()
        self.sae.update_fired_(loss.code, len(x))
        return loss.total.detach()
