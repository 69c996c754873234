"""Callbacks: code of one's own that a training calls at its start, after steps, and at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sae_fast.training.failure import TrainingError, intact
from sae_fast.training.metrics import Row

if TYPE_CHECKING:
    from sae_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Callback:
    """Base of callbacks, whose methods do nothing; a class of one's own defines some of them.

    They are called without recording gradients, in the order in which `Trainer` was given the
    callbacks. On a GPU, reading a tensor waits for the steps before it. `trainer.stop()` ends the
    training after the current step. An error in a method ends the training with a TrainingError;
    the checkpoints written before are intact.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Prepare: model, data and directory are ready, `trainer.step` says where the run is."""

    def on_step(self, trainer: Trainer, row: Row) -> None:
        """Look at a step that was made, with its row of metrics, empty where none was due."""

    def on_evaluation(self, trainer: Trainer, figures: dict[str, float]) -> None:
        """Look at what `Trainer.evaluate` has measured after a step; comes before `on_step`."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """Use a checkpoint that was written; it can be read by `from_pretrained`."""

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Finish; `error` has ended the training, and is None where it ended as it should."""


class Callbacks:
    """The callbacks of one training, called one after another.

    Raises ValueError for an object that is no `Callback`.
    """

    def __init__(self, trainer: Trainer, callbacks: Sequence[object]) -> None:
        checked = []
        for callback in callbacks:
            if not isinstance(callback, Callback):
                found = callback if isinstance(callback, type) else type(callback)
                hint = ", not the class" if isinstance(callback, type) else ""
                raise ValueError(
                    "callbacks must be objects of classes derived from sae_fast.Callback"
                    f"{hint}, got {found.__name__}"
                )
            checked.append(callback)
        self._trainer = trainer
        self._callbacks = tuple(checked)
        self._has_begun = False

    def start(self) -> None:
        """Call `on_start` of all."""
        self._has_begun = True
        self._call("on_start", lambda callback: callback.on_start(self._trainer))

    def step(self, row: Row) -> None:
        """Call `on_step` of all."""
        self._call("on_step", lambda callback: callback.on_step(self._trainer, dict(row)))

    def evaluation(self, figures: dict[str, float]) -> None:
        """Call `on_evaluation` of all."""
        call = "on_evaluation"
        self._call(call, lambda callback: callback.on_evaluation(self._trainer, dict(figures)))

    def checkpoint(self, path: Path) -> None:
        """Call `on_checkpoint` of all."""
        self._call("on_checkpoint", lambda callback: callback.on_checkpoint(self._trainer, path))

    def end(self, error: BaseException | None) -> None:
        """Call `on_end` of all, once for each start; after an error another one is only logged."""
        if not self._has_begun:
            return
        self._has_begun = False
        failure: TrainingError | None = None
        for callback in self._callbacks:
            try:
                self._call_one("on_end", callback, lambda one: one.on_end(self._trainer, error))
            except TrainingError as further:
                if error is not None or failure is not None:
                    logger.error("%s", further)
                else:
                    failure = further
        if failure is not None:
            raise failure

    def _call(self, method: str, call: Callable[[Callback], None]) -> None:
        for callback in self._callbacks:
            self._call_one(method, callback, call)

    def _call_one(self, method: str, callback: Callback, call: Callable[[Callback], None]) -> None:
        try:
            with torch.no_grad():
                call(callback)
        except Exception as error:
            reason = " ".join(str(error).split())
            what = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
            store = self._trainer.checkpoints
            newest = None if store is None else store.newest()
            raise TrainingError(
                f"step {self._trainer.step}: {type(callback).__name__}.{method} failed with {what}"
                f"{intact(newest)}"
            ) from error
