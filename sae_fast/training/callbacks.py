"""Callbacks: code of one's own that a training calls at its start, after steps, and at its end."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sae_fast.own_code import failed
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

    Attributes:
        is_running: whether one of them is being called; the training cannot continue meanwhile.

    Raises ValueError for an object that is no `Callback`, or has a method that would not be called
    or cannot be called as it is.
    """

    def __init__(self, trainer: Trainer, callbacks: object) -> None:
        checked = []
        if isinstance(callbacks, str) or not isinstance(callbacks, Iterable):
            raise ValueError(
                f"callbacks must be a list of callbacks, got {type(callbacks).__name__}"
            )
        for callback in callbacks:
            if not isinstance(callback, Callback):
                found = callback if isinstance(callback, type) else type(callback)
                hint = ", not the class" if isinstance(callback, type) else ""
                raise ValueError(
                    "callbacks must be objects of classes derived from sae_fast.Callback"
                    f"{hint}, got {found.__name__}"
                )
            _check_methods(type(callback))
            checked.append(callback)
        self._trainer = trainer
        self._callbacks = tuple(checked)
        self._has_begun = False
        self.is_running = False

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._callbacks)

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
        before, self.is_running = self.is_running, True
        try:
            with torch.no_grad():
                call(callback)
        except Exception as error:
            store = self._trainer.checkpoints
            newest = None if store is None else store.newest()
            what = failed(f"{type(callback).__name__}.{method}", error)
            raise TrainingError(f"step {self._trainer.step}: {what}{intact(newest)}") from error
        finally:
            self.is_running = before


def _check_methods(kind: type[Callback]) -> None:
    """Raise ValueError for a method that `Callback` lacks, or that takes other arguments."""
    known = {name for name in vars(Callback) if name.startswith("on_")}
    for name in dir(kind):
        if not name.startswith("on_"):
            continue
        method = getattr(kind, name)
        if name not in known:
            if near := difflib.get_close_matches(name, known, n=1):
                raise ValueError(
                    f"callbacks: {kind.__name__}.{name} is never called (did you mean {near[0]}?)"
                )
            continue
        if not callable(method):
            raise ValueError(
                f"callbacks: {kind.__name__}.{name} must be a method, got {type(method).__name__}"
            )
        expected = [*inspect.signature(getattr(Callback, name)).parameters]
        is_bound = not inspect.isfunction(inspect.getattr_static(kind, name))
        try:
            inspect.signature(method).bind(*expected[is_bound:])
        except TypeError:
            raise ValueError(
                f"callbacks: {kind.__name__}.{name} must take ({', '.join(expected)}), got "
                f"({', '.join(inspect.signature(method).parameters)})"
            ) from None
