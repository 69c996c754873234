"""The device's part of an optimiser step: the host decides nothing in it and waits for nothing.

A loss or gradient norm that is not finite is noticed when the host next reads the metrics, on a
GPU many steps later. Until then `_poison`, 0 in a healthy run, is NaN: it makes the norm of every
later step NaN, and an optimiser makes no update with such a norm. So the parameters stay what they
were before the bad step, and the metrics stay the bad step's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.activations import Rows
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.architecture import StepSettings, WholeStep
from sae_fast.autoencoder.loss_terms import LossTerm
from sae_fast.autoencoder.losses import TrainingLoss
from sae_fast.autoencoder.training_loss import batch_loss, whole_step
from sae_fast.distributed.ranks import ALONE, Ranks
from sae_fast.ops import Code
from sae_fast.own_code import call
from sae_fast.training.divided_selection import divided_selections
from sae_fast.training.downstream import DownstreamModel
from sae_fast.training.exchange import GradientExchange, Part
from sae_fast.training.metrics import fetch
from sae_fast.training.optimizer.loss_scaler import LossScaler
from sae_fast.training.optimizer.row_optimizer import SparseOptimizer
from sae_fast.training.optimizer.weight_average import WeightAverage
from sae_fast.training.profiling import marked

LOSS = "loss"
GRAD_NORM = "grad_norm"
_VARIANCE = "variance"


@dataclass(frozen=True)
class Reading:
    """The metrics of a step, and whether a step since the last reading has failed.

    Attributes:
        metrics: of the last step; of the bad step, once there was one.
        extra: what was asked for besides.
        bad_step: number of the step, from 1 in this process, whose loss or norm was not finite.
        variance: of the same step's last batch, Σ (x − mean(x))²; NaN where it is not finite.
    """

    metrics: dict[str, float]
    extra: dict[str, float]
    bad_step: int | None
    variance: float


class TrainingStep:
    """Losses, backward, update, counters and metrics of one optimiser step.

    Args:
        sae: the model.
        optimizer: updates its parameters, and has the latents that this process holds.
        scaler: scales the loss; where it is enabled, a norm that is not finite is an overflow.
        precision: mode of the encoder's product.
        average: of the weights, if there is to be one.
        downstream: for loss_fn ce and kl, the model that continues from the reconstruction.
        loss_terms: added to the terms of the model.
        ranks: the processes that make a step together, each some of its batches.

    Attributes:
        codes: of the batches of the last step, before its update; None: they are not kept.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        optimizer: SparseOptimizer,
        scaler: LossScaler,
        precision: str,
        average: WeightAverage | None = None,
        downstream: DownstreamModel | None = None,
        loss_terms: Sequence[LossTerm] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self.sae = sae
        self.ranks = ranks
        self.rows = optimizer.latent_rows
        # A step that is not divided is made by each rank as a whole.
        apart = ALONE if sae.architecture.selects_from_step else ranks
        self._exchange = GradientExchange(sae, optimizer.names, apart)
        self.downstream = downstream
        self.loss_terms = loss_terms
        self.optimizer = optimizer
        self.scaler = scaler
        self.precision = precision
        selections = divided_selections(ranks)
        self.engine = self.rows.engine(precision, optimizer.dense_grad, selections)
        self.average = average
        self.codes: list[Code] | None = None
        self._copy_session = object()
        self.term_names = (*sae.term_names, *(term.name for term in loss_terms))
        own = [f"arch {sae.config.arch}"] if sae.config.registered_by else []
        own += [f"loss term {term.name}" for term in loss_terms]
        self._own_code = ", ".join(own)  # which an error of backward may come from
        self._components = (*self.term_names, *sae.metric_names)
        self._names = (LOSS, *self._components, GRAD_NORM, _VARIANCE)
        device = sae.W_enc.device
        self._poison = torch.zeros((), dtype=torch.float32, device=device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)  # with the bad one, no more
        self._metrics = torch.zeros(len(self._names), dtype=torch.float32, device=device)

    def run(self, batches: Sequence[Rows], settings: StepSettings) -> None:
        """Make one optimiser step over the mean loss of the batches.

        Args:
            batches: of N rows each, normalised.
            settings: of the step. Rate and sparsity weight may be 0-d tensors on the device, which
                a CUDA graph of this step reads when it is replayed.
        """
        with self.kept_copies():
            self._run(batches, settings)

    def kept_copies(self) -> AbstractContextManager[None]:
        """Keep the weights' working copies from one step to the next, see `ops.kept_copies`."""
        return self.sae.kept_copies(session=self._copy_session)

    def _run(self, batches: Sequence[Rows], settings: StepSettings) -> None:
        if self.sae.config.normalizes_tokens:  # which sources do not
            batches = [Rows(self.sae.normalize(x), columns) for x, columns in batches]
        if self.sae.architecture.selects_from_step:
            batches = _joined(batches, self.ranks)
        exchange = self._exchange
        n_parts = len(batches) * exchange.ranks.size
        whole = None
        if n_parts > 1:
            whole = whole_step(
                self.sae, batches, settings, self.engine, gathered=exchange.ranks.parts
            )
        share = 1 / n_parts
        weight = self.scaler.factor if n_parts == 1 else share * self.scaler.factor
        mean: Tensor | float = 0.0  # of the metrics of the batches
        # Where there are several parts, becomes NaN if a loss of one is not finite.
        fault = None if n_parts == 1 else self._poison
        parts: list[Part] = []
        if self.codes is not None:
            self.codes = []
        for batch in batches:
            with exchange.part(batch.x):
                loss = self._accumulate(batch, weight, settings, whole)
            observed = self.rows.observed(self.sae.observe(loss.code))
            own = Part(self._values(loss), loss.variance, loss.fired, observed)
            if self.codes is not None:
                self.codes.append(loss.code.detach())
            for part in exchange.gather(own, loss.code):
                if fault is not None:
                    fault = torch.addcmul(fault, part.values[0], self._poison)
                mean = part.values if n_parts == 1 else mean + share * part.values
                parts.append(part)
        n_tokens = n_parts * len(batches[0].x)
        losses = torch.as_tensor(mean)
        with marked("update"):
            norm = self.optimizer.step(
                settings.rate,
                self.scaler.factor,
                fault=self._poison if fault is None else fault,
                losses=losses,
                await_decoder=exchange.finish,
            )
        with marked("bookkeeping"):
            ops.finish_step_(
                *(self._poison, self._steps, self._metrics, self.sae.tokens_since_fired),
                # The scale is not among these: one that overflows is no fault.
                fault,
                *(losses, norm, parts[-1].variance, _fired_in_any(parts)),
                n_tokens,
                norm_poisons=not self.scaler.enabled,
            )
            # An architecture may move parameters too, and must not after a bad step.
            sparsity_weight = settings.sparsity_weight
            if self.sae.architecture.acts_after_step:
                sparsity_weight = sparsity_weight + self._poison
            code = loss.code  # of the last part
            if self.sae.architecture.selects_from_step:
                code = self.rows.of_all(code)
            self.sae.after_step_(code, sparsity_weight, _summed(parts))
            self.sae.clamp_parameters_()
            self.optimizer.zero_grad()
            if self.average is not None:
                self.average.update()
            self.scaler.update(norm)

    def _accumulate(
        self,
        batch: Rows,
        weight: Tensor,  # 0-d
        settings: StepSettings,
        whole: WholeStep | None,
    ) -> TrainingLoss:
        """Compute a batch's loss, call backward on `weight` times it, and return it."""
        with marked("forward"):
            loss = batch_loss(
                self.sae,
                batch,
                settings,
                self.engine,
                downstream=self._downstream_loss(batch.columns),
                whole=whole,
                loss_terms=self.loss_terms,
            )
        with marked("backward"):
            if self._own_code:
                call(f"backward through {self._own_code}", loss.total.backward, weight)
            else:
                loss.total.backward(weight)  # type: ignore[no-untyped-call]
        return loss

    def _values(self, loss: TrainingLoss) -> Tensor:
        """Return the metrics [M] of a batch, in the order of the names."""
        terms = [loss.components[name] for name in self._components]
        return torch.stack([loss.total.detach(), *terms]).float()

    def _downstream_loss(self, columns: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor] | None:
        """Return the loss of a batch's reconstruction where the downstream model gives it."""
        downstream = self.downstream
        if downstream is None:
            return None
        return lambda x_hat: downstream.loss(self.sae.denormalize(x_hat), columns)

    def is_poisoned(self) -> bool:
        """Return whether there was a bad step; waits for the device."""
        return math.isnan(float(self._poison))

    def read(self, extra: dict[str, Tensor]) -> Reading:
        """Read the metrics and the 0-d tensors of `extra` in one transfer; waits for the device."""
        own = dict(zip(self._names, self._metrics.unbind(), strict=True))
        state = {"poison": self._poison, "steps": self._steps}
        values = fetch({**own, **{f"extra {name}": t for name, t in extra.items()}, **state})
        bad_step = int(values["steps"]) if math.isnan(values["poison"]) else None
        return Reading(
            {name: values[name] for name in self._names if name != _VARIANCE},
            {name: values[f"extra {name}"] for name in extra},
            bad_step,
            values[_VARIANCE],
        )


def _fired_in_any(parts: Sequence[Part]) -> Tensor:
    """Return which latents fired in any part of a step, [F] bool."""
    fired = parts[0].fired
    for part in parts[1:]:
        fired = fired | part.fired
    return fired


def _summed(parts: Sequence[Part]) -> dict[str, Tensor]:
    """Return the sums over the parts of a step of what the architecture observed."""
    observed = parts[0].observed
    for part in parts[1:]:
        observed = {name: value + part.observed[name] for name, value in observed.items()}
    return observed


def _joined(batches: Sequence[Rows], ranks: Ranks) -> Sequence[Rows]:
    """Return one batch, joined of those that all ranks have."""
    if len(batches) * ranks.size == 1:
        return batches
    names = batches[0].columns
    own = [[batch.x, *(batch.columns[name] for name in names)] for batch in batches]
    x, *columns = (torch.cat(parts) for parts in zip(*ranks.parts(own), strict=True))
    return [Rows(x, dict(zip(names, columns, strict=True)))]
