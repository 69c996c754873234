"""Terms that every architecture can have: of labels, of tokens in order, of pairs of latents."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sae_fast import ops
from sae_fast.activations import STARTS
from sae_fast.autoencoder.penalties import correlation_losses, temporal_smoothness_loss
from sae_fast.autoencoder.probe import Probe
from sae_fast.config import SAEConfig


class Guidance:
    """The guided terms that a configuration asks for.

    Attributes:
        probe: None where there is none.
        term_names: names of the terms.
        metric_names: names of what is measured besides.
    """

    def __init__(self, config: SAEConfig):
        self.config = config
        self.probe = Probe(config) if config.has_probe else None
        self.is_smooth = config.temporal_smoothness_coeff > 0
        # By name, the coefficients of the terms on pairs of latents.
        self.correlations = {
            name: coefficient
            for name, coefficient in (
                ("independence_loss", config.independence_coeff),
                ("orthogonality_loss", config.orthogonality_coeff),
            )
            if coefficient
        }
        self.term_names = (
            *(("probe_loss",) if self.probe else ()),
            *(("temporal_loss",) if self.is_smooth else ()),
            *self.correlations,
        )
        self.metric_names = (self.probe.quality_name,) if self.probe else ()

    def parameters(self) -> dict[str, Tensor]:
        """Start values of what is trained for these terms beside the autoencoder."""
        return self.probe.parameters() if self.probe else {}

    def terms(
        self,
        own: dict[str, Tensor],  # the parameters, by name
        code: ops.Code,
        columns: Mapping[str, Tensor],  # [N]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the terms with their coefficients, and the metrics, 0-d each by name.

        Raises ValueError where a column that a term needs is missing or has another shape."""
        terms, metrics = {}, {}
        if self.probe:
            labels = columns.get(self.config.probe_labels or "")
            labels = _one_a_token("labels", labels, code, "probe_loss_coeff")
            loss, metrics[self.probe.quality_name] = self.probe.loss(own, code, labels)
            terms["probe_loss"] = self.config.probe_loss_coeff * loss
        if self.is_smooth:
            starts = _one_a_token("starts", columns.get(STARTS), code, "temporal_smoothness_coeff")
            loss = temporal_smoothness_loss(code, starts)
            terms["temporal_loss"] = self.config.temporal_smoothness_coeff * loss
        if self.correlations:
            terms |= self.correlation_terms(code.dense())
        return terms, metrics

    def nothing(self, like: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the terms, all 0, and the metrics, NaN because nothing was predicted."""
        none = like.new_zeros(())
        metrics = dict.fromkeys(self.metric_names, none + float("nan"))
        return dict.fromkeys(self.term_names, none), metrics

    def correlation_terms(
        self,
        dense: Tensor,  # [N, F]
    ) -> dict[str, Tensor]:
        """Return the terms on pairs of latents, with their coefficients."""
        config = self.config
        how = config.correlation_pairs or "scaled"
        found = correlation_losses(dense, config.group_split, reduction=how)
        unit = config.error_of_the_mean if how == "scaled" else 1.0
        both = {"independence_loss": found.independence, "orthogonality_loss": found.orthogonality}
        return {name: weight * unit * both[name] for name, weight in self.correlations.items()}

    def rescale_(self, own: dict[str, Tensor], factor: Tensor) -> None:
        """Change the probe to fit code values that were multiplied by `factor`, 0-d or [F]."""
        if self.probe:
            self.probe.rescale_(own, factor)


def _one_a_token(name: str, given: Tensor | None, code: ops.Code, why: str) -> Tensor:
    if given is None:
        raise ValueError(f"{name} must be given with {why} above 0")
    if given.shape != (code.n_rows,):
        raise ValueError(f"{name} must have shape ({code.n_rows},), got {tuple(given.shape)}")
    return given
