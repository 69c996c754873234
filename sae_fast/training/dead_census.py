"""How many latents AuxK must have room for, known without waiting for the device at every step."""

from __future__ import annotations

from torch import Tensor

from sae_fast.autoencoder import SparseAutoencoder


class DeadCensus:
    """Counts, when the host reads the device anyway, who can be dead before it reads again.

    A latent grows silent by no more tokens than are trained on, so the count bounds the number of
    dead latents from above, and room for more than there are changes no result. Rounded up to a
    power of two it changes rarely, and with it the CUDA graph of the step.

    Args:
        sae: the model.
        tokens_per_step: tokens of an optimiser step.
    """

    def __init__(self, sae: SparseAutoencoder, tokens_per_step: int) -> None:
        self._sae = sae
        self._tokens_per_step = tokens_per_step
        self._limit = min(sae.architecture.full_k_aux, sae.config.d_sae)
        self.k_aux = 0

    def count(self, steps: int) -> Tensor:
        """How many latents can be dead within the next `steps` steps, 0-d on the device."""
        silent_for = self._sae.config.dead_after_tokens - steps * self._tokens_per_step
        return (self._sae.tokens_since_fired >= silent_for).sum()

    def take(self, count: float) -> None:
        """Sets `k_aux` for the steps that `count` was made for."""
        whole = int(count)
        self.k_aux = min(self._limit, 1 << (whole - 1).bit_length()) if whole else 0
