"""What an architecture is: how a model selects latents, and the loss terms that only it has.

There is one file for each architecture. It keeps no tensors: the model holds the weights, the
architecture's own parameters and buffers among them, and hands them over with every call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from sae_fast import ops
from sae_fast.autoencoder import losses
from sae_fast.config import SAEConfig


class Weights(NamedTuple):
    """A model's tensors; rows of both matrices are latents."""

    W_enc: nn.Parameter  # [F, D]
    b_enc: nn.Parameter  # [F]
    W_dec: nn.Parameter  # [F, D], with a transcoder [F, d_out]
    b_dec: nn.Parameter  # [D], with a transcoder [d_out]
    own: dict[str, Tensor]  # the architecture's own parameters and buffers
    input_bias: Tensor  # [D], subtracted from x: b_dec, or zeros where that is not


class Mode(NamedTuple):
    """How the ops are called."""

    precision: str = "screened"  # of the encoder's product
    dense_grad: bool = True  # whether backward leaves dense gradients or row factors


@dataclass(frozen=True)
class WholeStep:
    """What a batch must know of an optimiser step that it is one of several parts of.

    Attributes:
        n_parts: how many batches of one size the step's loss is the mean of.
        variance: 0-d, Σ (y − mean(y))² over the targets of all parts.
        l0: 0-d, the L0 of all parts, where a term of the loss is no mean over tokens of it.
    """

    n_parts: int
    variance: Tensor
    l0: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What a training loss is of.

    Attributes:
        x: [N, D], normalised.
        target: what the code models: x, or of a transcoder [N, d_out], perhaps with a gradient.
        dead_mask: [F] bool, the latents that have been silent for long.
        k_aux: room for dead latents per token, at least as many as are dead, up to the
            architecture's; None: the host counts them, and waits for that.
        sparsity_weight: what the terms that make codes sparse are multiplied by, for a warm-up.
        k: latents active per token in place of the model's, while it is annealed.
        reconstruction_only: whether the other terms are left out.
        error_weight: what squared errors averaged over tokens are multiplied by, 0-d; None: 1.
        relations: [N] int64, labels of arch slots, -1: none.
        answers: [N] int64, likewise.
        behind: of a reconstruction [N, D], normalised, the loss of what comes behind it, 0-d, which
            takes the place of the squared error.
        whole: the optimiser step that the batch is a part of; None: it is all of it.
    """

    x: Tensor
    target: Tensor
    dead_mask: Tensor
    k_aux: int | None = None
    sparsity_weight: float | Tensor = 1.0
    k: int | None = None
    reconstruction_only: bool = False
    error_weight: Tensor | None = None
    relations: Tensor | None = None
    answers: Tensor | None = None
    behind: Callable[[Tensor], Tensor] | None = None
    whole: WholeStep | None = None

    def error_term(
        self,
        squared_error: Tensor,  # [N]
    ) -> Tensor:
        """The mean over tokens, weighted: a term of the loss."""
        mean = losses.steady_sum(squared_error) / len(self.x)
        return mean if self.error_weight is None else self.error_weight * mean


@dataclass(frozen=True)
class ArchitectureLoss:
    """An architecture's part of the training loss.

    Attributes:
        code: of the batch, for statistics.
        squared_error: [N], Σ_d (x̂ − x)², of a transcoder Σ_d (ŷ − y)².
        recon_loss: 0-d, the batch's `error_term` of it; or what the architecture has in its place.
        terms: its other terms by name, 0-d, with their coefficients.
        figures: what else is to be logged, 0-d.
    """

    code: ops.Code
    squared_error: Tensor
    recon_loss: Tensor
    terms: dict[str, Tensor]
    figures: dict[str, Tensor] = field(default_factory=dict)


class Architecture(ABC):
    """Base of the architectures.

    Attributes:
        unit_norm: whether decoder rows are kept at unit length, their gradients projected.
        compares_latents: whether it compares values of different latents to choose among them.
        full_k_aux: the most dead latents per token that AuxK takes; 0: there is no AuxK.
        waits: whether the host waits for the device within a step, which then cannot be captured.
        selects_from_step: whether latents are selected from all tokens of a step, which therefore
            cannot be divided into parts.
        needs_step_l0: whether the loss of a part of a step needs the L0 of all parts.
        term_names: names of the terms of `loss`, always the same.
        figure_names: names of its figures, likewise.
    """

    unit_norm = True
    compares_latents = False
    full_k_aux = 0
    waits = False
    selects_from_step = False
    needs_step_l0 = False
    term_names: tuple[str, ...] = ()
    figure_names: tuple[str, ...] = ()

    def __init__(self, config: SAEConfig):
        self.config = config

    def parameters(self) -> dict[str, Tensor]:
        """Start values of the parameters beside the four that all have: none."""
        return {}

    def trained(self) -> tuple[str, ...] | None:
        """Names of the parameters that are trained; None: all."""
        return None

    def learning_rates(self) -> dict[str, float]:
        """What the learning rate is multiplied by, for those of its parameters where not 1."""
        return {}

    def buffers(self) -> dict[str, Tensor]:
        """Start values of the tensors that are kept but not trained: none."""
        return {}

    @abstractmethod
    def loss(self, weights: Weights, batch: Batch, mode: Mode) -> ArchitectureLoss:
        """The architecture's part of the loss of a batch."""

    @abstractmethod
    def infer(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        mode: Mode,
    ) -> ops.SparseCode:
        """The code of every token outside training."""

    def follow_(self, weights: Weights, code: ops.Code) -> None:  # noqa: B027
        """Learn from a code of training what inference needs: nothing."""

    def observe(self, code: ops.Code) -> dict[str, Tensor]:
        """Return sums over the tokens of a code, 0-d, that `steer_` needs: none.

        Those of the parts of a step are added up.
        """
        return {}

    def steer_(  # noqa: B027
        self, weights: Weights, observed: dict[str, Tensor], sparsity_weight: float | Tensor
    ) -> None:
        """Learn what the next step needs from a step's sums: nothing."""

    def count_active(self, weights: Weights, batch: Batch, mode: Mode) -> Tensor:
        """Return how many latents of a batch are active, 0-d; where `needs_step_l0`."""
        raise NotImplementedError

    def constrain_(self, weights: Weights) -> None:  # noqa: B027
        """Put parameters of its own back to where they may be, after an update: anywhere."""

    def warning(self, figures: dict[str, float]) -> str | None:
        """What the logged figures say that the user should know: nothing."""
        return None

    def rescale_(self, weights: Weights, factor: Tensor) -> None:  # noqa: B027
        """Follow values that were multiplied by `factor`, 0-d or [F]: nothing in their units."""

    def rebase_(self, weights: Weights, moved: Tensor) -> None:  # noqa: B027
        """Follow b_enc having given up `moved` [F], which the encoder's product now has in it."""

    def reconstruct(
        self, weights: Weights, code: ops.Code, batch: Batch, mode: Mode
    ) -> tuple[ops.Reconstruction, Tensor]:
        """The reconstruction of the batch, and its squared error as a term of the loss."""
        modelled = ops.reconstruct(
            code, weights.W_dec, weights.b_dec, batch.target, dense_grad=mode.dense_grad
        )
        if batch.behind is None:
            return modelled, batch.error_term(modelled.squared_error)
        return modelled, batch.behind(batch.target + modelled.residual.to(batch.target.dtype))
