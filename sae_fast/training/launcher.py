"""Launch one step after another, and find out, at once or later, whether they went well.

On the CPU a step that went wrong is noticed at once. On a GPU the host runs ahead, by two steps at
most (see batches.py), and asks only when it reads the metrics. Parameters and metrics
are not changed by later steps then (see step.py), so that the bad step can be named and nothing is
lost.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.activations import TARGETS, Rows
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.architecture import StepSettings
from sae_fast.config import TrainConfig
from sae_fast.ops import Code
from sae_fast.ops.native import build_info
from sae_fast.training.batches import StepBatches
from sae_fast.training.cuda_graph import GraphedStep, GraphRecorder
from sae_fast.training.failure import divergence
from sae_fast.training.profiling import marked
from sae_fast.training.step import Reading, TrainingStep

logger = logging.getLogger(__name__)

# A step that went wrong is noticed within so many steps, however rarely metrics are due.
NOTICED_WITHIN = 128


def wants_graph(config: TrainConfig) -> bool:
    """Return whether the settings and the backend let steps on a GPU be captured.

    The reference's ops and the dense optimiser ask the device in the middle of a step.
    """
    return config.cuda_graph and config.fused and build_info()["backend"] == "native"


def explain_no_graph(step: TrainingStep) -> str | None:
    """Return why a step cannot be captured in a CUDA graph; None where it can."""
    if step.sae.architecture.needs_host_sync:
        return (
            f"arch {step.sae.config.arch}: the host waits in every step for the number of active "
            "latents, which sizes the code"
        )
    if step.downstream is not None:
        return f"loss_fn {step.sae.config.loss_fn}: the model runs in it"
    if step.ranks.size > 1 or not step.rows.has_all:
        return "mesh: the host exchanges numbers in it"
    if step.loss_terms:
        return "loss_terms: what their functions do on the host would not be repeated"
    return None


class Launcher:
    """Launch the steps of a run.

    Args:
        step: the device's part of a step.
        batches: hands out what each step trains on.
        config: of the training.
        made: how many steps of the run were made before.
        newest_checkpoint: returns the last checkpoint written, for errors.
        ahead: whether the host launches steps ahead of the device, as on a GPU; if not, it waits
            for every step and counts the dead latents itself.
        recorder: captures the steps in CUDA graphs; None: they are launched kernel by kernel.
    """

    def __init__(
        self,
        step: TrainingStep,
        batches: StepBatches,
        config: TrainConfig,
        made: int,
        newest_checkpoint: Callable[[], Path | None],
        *,
        ahead: bool,
        recorder: GraphRecorder | None = None,
    ) -> None:
        self._step = step
        self._batches = batches
        self._log_every = config.log_every
        self._first = self._made = made
        self._newest_checkpoint = newest_checkpoint
        self._recent: deque[tuple[int, list[Path]]] = deque(maxlen=NOTICED_WITHIN)
        self._run = step.run if recorder is None else GraphedStep(step, recorder).run
        self._census: DeadCensus | None = None
        if ahead and step.rows.has_all:
            self._census = DeadCensus(step.sae, config.tokens_per_step)
            self._census.take(float(self._census.count(self._steps_to_reading())))
        # Steps of the run before it was resumed, and other trainings of the process, do not count.
        self._full_before: Tensor | None = None
        if step.sae.W_enc.is_cuda and step.sae.architecture.selects_from_step:
            self._full_before = ops.full_batches(step.sae.W_enc)

    def launch(self, settings: StepSettings) -> None:
        """Launch the next step; where the host is ahead the device may make it later.

        Raises:
            TrainingError: when its loss is not finite and that is known already.
        """
        with marked("batches"):
            batches = self._batches.take()
        if self._census is not None:
            settings = settings._replace(k_aux=self._census.k_aux)
        self._run(batches, settings)
        self._made += 1
        if self._census is not None:
            self._recent.append((self._made, self._batches.current_shards()))
            self._batches.prefetch()
        elif self._step.is_poisoned():
            bad_rows = sum(self._step.ranks.values(sum(map(_count_bad, batches))))
            shards = self._batches.current_shards()
            newest = self._newest_checkpoint()
            raise divergence(
                self._step.read({}), self._made, shards, bad_rows, newest, self._step.term_names
            )

    @property
    def codes(self) -> list[Code]:
        """The codes of the batches of the last step, before its update; empty unless kept."""
        return self._step.codes or []

    def keep_codes(self) -> None:
        """Keep the codes of each step from the next one on."""
        self._step.codes = []

    def kept_copies(self) -> AbstractContextManager[None]:
        """Keep the working copies that the steps made, for what the host does between them."""
        return self._step.kept_copies()

    def is_reading_due(self) -> bool:
        """Return whether `read` must be called now, to notice a bad step in time."""
        return self._made % NOTICED_WITHIN == 0

    def read(self, silent_tokens: int = 1) -> dict[str, float]:
        """Return the metrics of the last step, when the device has made it.

        silent_fraction is the share of latents that have not fired for `silent_tokens`; on a GPU
        full_batches is the number of selections from a batch that computed every score.

        Raises:
            TrainingError: when a step since the last reading went wrong, naming it.
        """
        sae = self._step.sae
        silent = sae.tokens_since_fired >= silent_tokens
        extra = {
            "dead_fraction": self._step.engine.mean(sae.dead_mask().double()),
            "silent_fraction": self._step.engine.mean(silent.double()),
        }
        if self._census is not None:
            extra["may_die"] = self._census.count(self._steps_to_reading())
        shown = ["dead_fraction", "silent_fraction"]
        if self._full_before is not None:
            extra["full_batches"] = ops.full_batches(sae.W_enc) - self._full_before
            shown.append("full_batches")
        reading = self._step.read(extra)
        if reading.bad_step is not None:
            raise self._late_divergence(reading, reading.bad_step)
        if self._census is not None:
            self._census.take(reading.extra["may_die"])
        return {**reading.metrics, **{name: reading.extra[name] for name in shown}}

    def _late_divergence(self, reading: Reading, bad_step: int) -> Exception:
        step = self._first + bad_step
        shards = dict(self._recent).get(step, [])
        newest = self._newest_checkpoint()
        return divergence(reading, step, shards, None, newest, self._step.term_names)

    def _steps_to_reading(self) -> int:
        """Return after how many steps the host reads the device again, at the latest."""
        return min(n - self._made % n for n in (self._log_every, NOTICED_WITHIN))


def _count_bad(rows: Rows) -> int:
    """Count the rows of a batch that are not finite, or whose target is not."""
    bad = ~torch.isfinite(rows.x).all(dim=1)
    for name, column in rows.columns.items():
        if name == TARGETS and column.ndim == 2:
            bad |= ~torch.isfinite(column).all(dim=1)
    return int(bad.sum())


class DeadCensus:
    """Count how many latents can be dead before the host reads the device again.

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
        """Return how many latents can be dead within the next `steps` steps, 0-d on the device."""
        silent_for = self._sae.config.kept_dead_after_tokens - steps * self._tokens_per_step
        return (self._sae.tokens_since_fired >= silent_for).sum()

    def take(self, count: float) -> None:
        """Set `k_aux` for the steps that `count` was made for."""
        whole = int(count)
        self.k_aux = min(self._limit, 1 << (whole - 1).bit_length()) if whole else 0
