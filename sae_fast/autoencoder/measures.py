"""`Measures`: how good and how sparse a code is, for whoever has it and its reconstruction."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from sae_fast import ops
from sae_fast.autoencoder import statistics
from sae_fast.autoencoder.units import Units, require_tensor


class Measures(Units):
    """Base of the model: what it can tell of a code and a reconstruction that are at hand."""

    W_dec: nn.Parameter  # [F, D]

    @abstractmethod
    def dead_mask(self) -> Tensor:
        """Which latents [F] have been silent for `dead_after_tokens`."""

    @abstractmethod
    def _decorr_loss(self) -> Tensor:
        """The decorrelation of the decoder's rows, with its coefficient."""

    @abstractmethod
    def _correlation_terms(
        self,
        dense: Tensor,  # [N, F]
    ) -> dict[str, Tensor]:
        """By name the terms on pairs of latents, with their coefficients, where these are not 0."""

    def compute_loss_components(
        self,
        x: Tensor,  # [..., D], activations as they are
        x_hat: Tensor,  # in the shape of x
        h: ops.SparseCode | Tensor,  # the code of x; dense, [..., F]
        probe_loss: Tensor | None = None,
        temporal_loss: Tensor | None = None,
        **further_terms: Tensor,
    ) -> dict[str, float | Tensor]:
        """The loss of a reconstruction as numbers by term, and its sum to call backward on.

        recon_loss, l1_loss, decorr_loss, probe_loss and temporal_loss carry the coefficients of the
        configuration and add up, with independence_loss and orthogonality_loss where the model has
        them and with the terms given besides, to total_loss; total_loss_tensor is the same with its
        graph. recon_loss is of x_hat alone and l1_loss of h alone: of matryoshka the smaller
        dictionaries are left out, of gated the gates that are not h.

        Args:
            x: the activations; of a transcoder the targets, [..., d_out].
            x_hat: their reconstruction, as `decode` and `forward` give it.
            h: their code, as `encode` gives it, or as a dense tensor.
            probe_loss: 0-d, without its coefficient; None: 0.
            temporal_loss: likewise.
            **further_terms: 0-d, already weighted: what h does not determine, as AuxK or the
                gradient of jumprelu's penalty.
        """
        rows, rows_hat = self._rows_of_both(x, x_hat)
        error = rows_hat - rows
        if self.config.normalize_activations != "none":
            error = error * self.output_scale
            rows = (rows - self.output_mean) * self.output_scale
        config = self.config
        guided: dict[str, float | Tensor] = {
            "probe_loss": 0.0 if probe_loss is None else config.probe_loss_coeff * probe_loss,
            "temporal_loss": 0.0
            if temporal_loss is None
            else config.temporal_smoothness_coeff * temporal_loss,
        }
        further: dict[str, float | Tensor] = {**guided, **further_terms}
        if config.independence_coeff or config.orthogonality_coeff:
            dense = h.dense() if isinstance(h, ops.SparseCode) else h.reshape(-1, h.shape[-1])
            further = {**self._correlation_terms(dense), **further}
        return statistics.loss_components(
            config, self.W_dec, error, rows, h, self._decorr_loss(), further
        )

    def get_activation_stats(
        self,
        h: ops.SparseCode | Tensor,  # dense: [..., F]
    ) -> dict[str, float]:
        """How active the latents are in a code.

        l0: latents that fire, per token; activation_fraction: their share of d_sae;
        mean_activation, max_activation: of the values of those that fire, of abs_topk of their
        magnitudes, 0 if none does;
        silent_fraction: share of the latents that fire for no token of `h`; dead_fraction: share
        that has been silent for dead_after_tokens of training.
        """
        return statistics.activation_stats(self.config, h, self.dead_mask())

    def get_reconstruction_error(
        self,
        x: Tensor,  # [..., D], activations as they are
        x_hat: Tensor,  # in the shape of x
    ) -> dict[str, float]:
        """How far a reconstruction is from the activations, in their units, sums in float64.

        Of a transcoder x are the targets.

        squared_error: Σ_d (x̂ − x)², averaged over tokens; mse: the same per number; fvu: Σ (x̂ − x)²
        by Σ (x − mean(x))² over all tokens; explained_variance: 1 − fvu;
        explained_variance_overall: 1 − mse / x.var(), with one variance of all numbers;
        relative_error: |x̂ − x| / |x|, the norms over all tokens; cosine: of x and x̂, averaged over
        tokens.
        """
        return statistics.reconstruction_error(*self._rows_of_both(x, x_hat))

    def _rows_of_both(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        require_tensor(x, "x")
        require_tensor(x_hat, "x_hat")
        if x.shape != x_hat.shape:
            shapes = tuple(x.shape), tuple(x_hat.shape)
            raise ValueError(f"x_hat must have the shape of x, {shapes[0]}, got {shapes[1]}")
        return self._output_rows(x, "x"), self._output_rows(x_hat, "x_hat")
