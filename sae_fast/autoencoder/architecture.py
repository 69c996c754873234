"""The base of all architectures: how a model selects latents, and its own terms of the loss.

There is one file for each family of architectures. An architecture keeps no tensors: the model
holds the weights, the architecture's own parameters and buffers among them, and passes them with
every call. An architecture calls the ops of training through an `Engine`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from sae_fast import ops
from sae_fast.autoencoder import losses
from sae_fast.autoencoder.decoding import decode_rows
from sae_fast.autoencoder.penalties import decorrelation_loss
from sae_fast.config import SAEConfig
from sae_fast.ops.full_precision import addmm


class Weights(NamedTuple):
    """A model's tensors; rows of both matrices are latents."""

    W_enc: nn.Parameter  # [F, D]
    b_enc: nn.Parameter  # [F]
    W_dec: nn.Parameter  # [F, D], with a transcoder [F, d_out]
    b_dec: nn.Parameter  # [D], with a transcoder [d_out]
    own: dict[str, Tensor]  # the architecture's own parameters and buffers
    input_bias: Tensor  # [D], subtracted from x: b_dec, or zeros where that is not


class StepSettings(NamedTuple):
    """The settings that change from step to step of a training.

    Attributes:
        rate: the learning rate, or a 0-d float64 tensor that a CUDA graph reads it from.
        sparsity_weight: factor of the terms that make codes sparse, for their warm-up; a float or
            a 0-d float32 tensor.
        k: latents active per token while k is annealed; None: the model's k.
        k_aux: room for dead latents in AuxK, per token: at least as many as are dead, up to the
            architecture's `full_k_aux`. None: the host counts them, and waits for the device.
        reconstruction_only: whether all other terms are left out.
    """

    rate: float | Tensor = 0.0
    sparsity_weight: float | Tensor = 1.0
    k: int | None = None
    k_aux: int | None = None
    reconstruction_only: bool = False


_NO_SETTINGS = StepSettings()


# The encoders that select the latents of a code, by the name that an architecture has for them.
SELECTIONS: Mapping[str, Callable[..., ops.SparseCode]] = {
    "topk": ops.encode_topk,
    "abs_topk": ops.encode_abs_topk,
    "groupmax": ops.encode_groupmax,
    "batch_topk": ops.encode_batch_topk,
}


class Engine(NamedTuple):
    """The encoders and decoders that architectures are made of, called in one way.

    Attributes:
        precision: mode of the encoder's product, as `ops.encode_topk` takes it.
        dense_grad: whether backward leaves dense gradients or row factors for `RowOptimizer`.
        selections: the encoders of `encode_topk` by name, perhaps of several processes.
    """

    precision: str = "screened"
    dense_grad: bool = True
    selections: Mapping[str, Callable[..., ops.SparseCode]] = SELECTIONS

    @property
    def has_all_latents(self) -> bool:
        """Whether the codes have all latents, or only some, with the others in other processes."""
        return True

    def count_latents(self, mask: Tensor) -> Tensor:
        """Return how many latents are in a mask [F], 0-d.

        Where each of several processes holds a part of the latents, all are counted.
        """
        return mask.sum()

    def total(self, part: Tensor) -> Tensor:
        """Return a sum over the latents, given what was computed of the latents at hand.

        With one process that is the sum. Its gradient is the gradient of each part.
        """
        return part

    def mean(self, per_latent: Tensor) -> Tensor:
        """Return the mean of a number of each latent [F], 0-d, over all latents."""
        return per_latent.mean()

    def joined(self, per_latent: Tensor) -> Tensor:
        """Return a number of each latent [F], of all latents, given the latents at hand."""
        return per_latent

    def mean_squared_cosine(
        self,
        W_dec: Tensor,  # [F, D], the rows at hand
    ) -> Tensor:
        """Return the mean of (ŵ_i·ŵ_j)² over pairs of different decoder rows, 0-d; 0 of one row."""
        return decorrelation_loss(W_dec.detach(), "gram_mean", None, 0)

    def encode_topk(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        k: int,
        *,
        selection: str = "topk",
        dead_mask: Tensor | None = None,  # [F] bool
        k_aux: int = 0,
    ) -> ops.SparseCode:
        """Return k latents per token, and in `aux` k_aux dead ones.

        `selection` is how they are chosen, a name in `selections`.
        """
        return self.selections[selection](
            x,
            weights.W_enc,
            weights.b_enc,
            weights.input_bias,
            k,
            precision=self.precision,
            dead_mask=dead_mask if k_aux else None,
            k_aux=k_aux,
            dense_grad=self.dense_grad,
        )

    def encode_threshold(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        threshold: Tensor | None = None,  # [F]; None: 0
        *,
        b_enc: Tensor | None = None,  # [F]; None: the model's
    ) -> ops.SparseCode:
        """Return all latents whose pre-activation is above their threshold."""
        b_enc = weights.b_enc if b_enc is None else b_enc
        if threshold is None:
            threshold = b_enc.new_zeros(len(b_enc))
        return ops.encode_threshold(
            x,
            weights.W_enc,
            b_enc,
            weights.input_bias,
            threshold,
            precision=self.precision,
            dense_grad=self.dense_grad,
        )

    def encode_dense(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        *,
        b_enc: Tensor | None = None,  # [F]; None: the model's
        relu: bool = True,
    ) -> ops.DenseCode:
        """Return all latents of every token, [N, F], after ReLU or without it."""
        b_enc = weights.b_enc if b_enc is None else b_enc
        arguments = (x, weights.W_enc, b_enc, weights.input_bias)
        return ops.encode_dense(*arguments, precision=self.precision, relu=relu)

    def encode_last(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        count: int,
    ) -> Tensor:
        """Return the pre-activations [N, count] of the last `count` latents."""
        return ops.encode_last(
            x,
            weights.W_enc,
            weights.b_enc,
            weights.input_bias,
            count,
            precision=self.precision,
            dense_grad=self.dense_grad,
        )

    def decode(
        self,
        code: ops.SparseCode | Tensor,  # a tensor: [N, F]
        W_dec: Tensor,  # [F, D]
        b_dec: Tensor,  # [D]
    ) -> Tensor:
        """Return Σ value · W_dec[index] + b_dec, [N, D], over all latents, outside training."""
        if isinstance(code, Tensor):
            return addmm(b_dec.to(code.dtype), code, W_dec.to(code.dtype))
        return decode_rows(code, W_dec, b_dec, dense_grad=self.dense_grad)

    def reconstruct(
        self,
        code: ops.Code,
        W_dec: Tensor,  # [F, D]
        b_dec: Tensor | None,  # [D]
        target: Tensor,  # [N, D]
    ) -> ops.Reconstruction:
        """Return the residual x̂ − target [N, D] and its squares' sum per token [N]."""
        return ops.reconstruct(code, W_dec, b_dec, target, dense_grad=self.dense_grad)

    def reconstruct_prefixes(
        self,
        code: ops.SparseCode,
        W_dec: Tensor,  # [F, D]
        b_dec: Tensor,  # [D]
        target: Tensor,  # [N, D]
        prefixes: tuple[int, ...],
    ) -> ops.PrefixReconstruction:
        """Return the whole reconstruction's residual and the squared errors [N, G] of prefixes."""
        return ops.reconstruct_prefixes(
            code, W_dec, b_dec, target, prefixes, dense_grad=self.dense_grad
        )


@dataclass(frozen=True)
class WholeStep:
    """Sums over an optimiser step, for a batch that is one of several parts of it.

    Attributes:
        n_parts: how many batches of one size the step's loss is the mean of.
        variance: 0-d, Σ (y − mean(y))² over the targets of all parts.
        l0: 0-d, the L0 of all parts, for a loss term that is no mean over tokens; else None.
        residual_variance: 0-d, Σ (e − mean(e))² over the residuals of all parts, for a loss term
            that is a share of it; else None.
    """

    n_parts: int
    variance: Tensor
    l0: Tensor | None = None
    residual_variance: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """The tokens that a training loss is computed of, and how.

    Attributes:
        x: [N, D], normalised.
        target: what the code models: x, or of a transcoder [N, d_out], perhaps with a gradient.
        dead_mask: [F] bool, the latents that have been silent for `dead_after_tokens`; None for a
            step of which `reads_dead_mask` is False.
        columns: labels [N] and other columns by name, see `activations.Rows`.
        settings: of the step.
        error_weight: 0-d factor of squared errors averaged over tokens; None: 1.
        downstream: the loss, 0-d, of the model that continues from a reconstruction [N, D],
            normalised; it takes the place of the squared error. None: the squared error counts.
        whole: the optimiser step that the batch is a part of; None: the batch is all of it.
    """

    x: Tensor
    target: Tensor
    dead_mask: Tensor | None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    settings: StepSettings = _NO_SETTINGS
    error_weight: Tensor | None = None
    downstream: Callable[[Tensor], Tensor] | None = None
    whole: WholeStep | None = None

    def error_term(
        self,
        squared_error: Tensor,  # [N]
    ) -> Tensor:
        """Return the weighted mean over tokens, 0-d: a term of the loss."""
        mean = losses.deterministic_mean(squared_error)
        return mean if self.error_weight is None else self.error_weight * mean


@dataclass(frozen=True)
class ArchitectureLoss:
    """An architecture's part of the training loss.

    Attributes:
        code: of the batch, for statistics.
        residual: [N, D], x̂ − x, of a transcoder ŷ − y, with its gradient.
        squared_error: [N], Σ_d (x̂ − x)², of a transcoder Σ_d (ŷ − y)².
        recon_loss: 0-d, the batch's `error_term` of it; or what the architecture has in its place.
        terms: its other terms by name, 0-d, with their coefficients.
        metrics: other numbers for the log, 0-d.
    """

    code: ops.Code
    residual: Tensor
    squared_error: Tensor
    recon_loss: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Architecture(ABC):
    """Base of the architectures.

    Attributes:
        name: of an architecture outside of the package, as `arch` names it.
        Settings: of such an architecture, a class with the settings that it adds to SAEConfig.
        shared: of such an architecture, settings of others that it has as well, such as "k".
        unit_norm: whether decoder rows are kept at unit length, their gradients projected.
        compares_latents: whether it compares values of different latents to choose among them.
        full_k_aux: the most dead latents per token that AuxK takes; 0: there is no AuxK.
        needs_host_sync: whether the host waits for the device within a step, which then cannot be
            captured in a CUDA graph.
        selects_from_step: whether latents are selected from all tokens of a step, which therefore
            cannot be divided into parts.
        needs_step_l0: whether the loss of a part of a step needs the L0 of all parts.
        has_aux_k: whether the loss has AuxK, which needs the variance of all parts' residuals.
        term_names: names of the terms of `loss`, in every step the same.
        metric_names: names of the metrics of `loss`, in every step the same.
    """

    class Settings:
        """No settings beside those in SAEConfig."""

    name: str = ""
    shared: tuple[str, ...] = ()
    unit_norm = True
    compares_latents = False
    full_k_aux = 0
    needs_host_sync = False
    selects_from_step = False
    needs_step_l0 = False
    has_aux_k = False
    term_names: tuple[str, ...] = ()
    metric_names: tuple[str, ...] = ()

    def __init__(self, config: SAEConfig):
        self.config = config

    def parameters(self) -> dict[str, Tensor]:
        """Return the start values of parameters beside the four that all models have; here none."""
        return {}

    def trained(self) -> tuple[str, ...] | None:
        """Return the names of the parameters that are trained; None: all."""
        return None

    def learning_rates(self) -> dict[str, float]:
        """Return per-parameter factors of the learning rate; parameters not listed use 1."""
        return {}

    def buffers(self) -> dict[str, Tensor]:
        """Return the start values of tensors that are kept but not trained; here none."""
        return {}

    @abstractmethod
    def loss(self, weights: Weights, batch: Batch, engine: Engine) -> ArchitectureLoss:
        """Return the architecture's part of the loss of a batch."""

    @abstractmethod
    def infer(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        engine: Engine,
    ) -> ops.SparseCode:
        """Return the code of every token outside training."""

    def thresholds(self, weights: Weights) -> Tensor | None:
        """Return for every latent the code value that it exceeds where it is active, [F].

        None: latents are active by comparison with others, or always.
        """
        return None

    @property
    def wanted_l0(self) -> float | None:
        """The L0 that inference should have, where one is asked for and thresholds decide it."""
        return None

    def raise_thresholds_(  # noqa: B027
        self,
        weights: Weights,
        rise: Tensor,  # 0-d
    ) -> None:
        """Raise what `thresholds` returns by `rise`, with W_enc as it is; here nothing."""

    def penalty(self, weights: Weights, code: ops.Code) -> Tensor:
        """Return the L1 penalty of a code without its coefficient: Σ_j |f_j|, a mean over tokens.

        Both the training loss and `SparseAutoencoder.compute_loss_components` use it.
        """
        return losses.lp_loss(code, 1.0)

    def observe(self, code: ops.Code) -> dict[str, Tensor]:
        """Return sums over the tokens of a code, 0-d, that `after_step_` needs; here none.

        The caller adds them up over the parts of a step.
        """
        return {}

    def observe_excess(self, weights: Weights, code: ops.Code) -> dict[str, Tensor]:
        """Return further such sums, of how far a code is above its thresholds; here none.

        Args:
            weights: the ones that the code was made with.
            code: of a batch.
        """
        return {}

    def reads_dead_mask(self, settings: StepSettings) -> bool:
        """Return whether the loss of a step needs to know which latents are dead."""
        return True

    @property
    def acts_after_step(self) -> bool:
        """Whether `after_step_` does anything."""
        return type(self).after_step_ is not Architecture.after_step_

    def after_step_(  # noqa: B027
        self,
        weights: Weights,
        code: ops.Code,
        observed: dict[str, Tensor],
        sparsity_weight: float | Tensor,
    ) -> None:
        """Update the buffers after a step: what inference and later steps need; here nothing.

        Args:
            weights: the model's tensors.
            code: of the step's last part.
            observed: sums of `observe` and `observe_excess` over the parts of the step.
            sparsity_weight: of the step.
        """

    def count_active(self, weights: Weights, batch: Batch, engine: Engine) -> Tensor:
        """Return how many latents of a batch are active, 0-d; called where `needs_step_l0`."""
        raise NotImplementedError

    def residual(self, weights: Weights, batch: Batch, engine: Engine) -> Tensor:
        """Return x̂ − x of a batch, [N, D], as `loss` computes it; called where `has_aux_k`."""
        raise NotImplementedError

    def clamp_parameters_(self, weights: Weights) -> None:  # noqa: B027
        """Put own parameters back into their range after an update; here nothing."""

    def warning(self, metrics: dict[str, float]) -> str | None:
        """Return what logged metrics mean that the user should know; here None."""
        return None

    def rescale_(self, weights: Weights, factor: Tensor) -> None:  # noqa: B027
        """Change own tensors to fit code values that were multiplied by `factor`, 0-d or [F]."""

    def rebase_(self, weights: Weights, moved: Tensor) -> None:  # noqa: B027
        """Change own tensors to fit a b_enc from which `moved` [F] was subtracted.

        The encoder's product now contains it.
        """

    def reconstruct(
        self, weights: Weights, code: ops.Code, batch: Batch, engine: Engine
    ) -> tuple[ops.Reconstruction, Tensor]:
        """Return the reconstruction of a batch and its error, 0-d, as a term of the loss."""
        modelled = engine.reconstruct(code, weights.W_dec, weights.b_dec, batch.target)
        if batch.downstream is None:
            return modelled, batch.error_term(modelled.squared_error)
        return modelled, batch.downstream(batch.target + modelled.residual.to(batch.target.dtype))
