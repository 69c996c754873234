"""An architecture of one's own: TopK whose latents have a trained gain.

    python -m sae_fast.train --plugin examples/gained_topk.py --arch gained_topk --gain-decay 0.1 …

f_j = g_j · TopK((x − b_dec) W_encᵀ + b_enc)_j. The k latents are chosen before the gain, so that it
changes how strongly a latent acts and not whether it is active.
"""

import torch
from torch import Tensor

from sae_fast import ops, register_architecture
from sae_fast.autoencoder.architecture import (
    Architecture,
    ArchitectureLoss,
    Batch,
    Engine,
    Weights,
)
from sae_fast.config.setting import setting


@register_architecture
class GainedTopK(Architecture):
    """Select the k largest latents of a token and multiply each by its gain."""

    name = "gained_topk"
    shared = ("k",)  # settings of other architectures that this one has as well
    compares_latents = True
    term_names = ("gain_loss",)
    metric_names = ("mean_gain",)

    class Settings:
        """The settings that this architecture adds to SAEConfig."""

        gain_decay: float = setting(0.0, at_least=0)
        """Weight of the penalty (g − 1)² on the gains, a mean over latents."""

    def parameters(self) -> dict[str, Tensor]:
        """Return the gains [F], which start at 1."""
        return {"gain": torch.ones(self.config.d_sae)}

    def infer(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        engine: Engine,
    ) -> ops.SparseCode:
        """Return the code of every token."""
        selected = engine.encode_topk(weights, x, self.config.k)
        return selected.with_values(selected.values * selected.spread(weights.own["gain"]))

    def loss(self, weights: Weights, batch: Batch, engine: Engine) -> ArchitectureLoss:
        """Return the squared error and the penalty on the gains."""
        code = self.infer(weights, batch.x, engine)
        modelled, recon_loss = self.reconstruct(weights, code, batch, engine)
        gain = weights.own["gain"]
        terms = {"gain_loss": self.config.gain_decay * (gain - 1).square().mean()}
        metrics = {"mean_gain": gain.detach().mean()}
        return ArchitectureLoss(code, *modelled, recon_loss, terms, metrics)

    def clamp_parameters_(self, weights: Weights) -> None:
        """Keep the gains at 0 or above: codes are not negative."""
        weights.own["gain"].clamp_min_(0)
