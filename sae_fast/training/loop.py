"""The loop over the steps of one training, or of several that go on together.

Those that share a source of activations take its batches in turn (see shared.py), one step each, so
every batch is read once. Their times are those of all of them: the clock of each runs on while the
others make their step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import torch

from sae_fast.training.checkpoint import newest_common_step
from sae_fast.training.metrics import Row
from sae_fast.training.progress import Progress
from sae_fast.training.signals import StopOnSignal

if TYPE_CHECKING:
    from sae_fast.training.trainer import Trainer


@torch.inference_mode(False)
def run_steps(trainers: Sequence[Trainer], stop: StopOnSignal, *, show_progress: bool) -> None:
    """Make all steps of all trainers, or those up to a signal, and finish their runs.

    Raises what `Trainer.train` does; the first error ends all.
    """
    try:
        for trainer in trainers:
            trainer.prunes_checkpoints = len(trainers) == 1
            trainer.begin()
        tokens = sum(trainer.total_tokens for trainer in trainers)
        done = sum(trainer.tokens for trainer in trainers)
        shown = closing(Progress(tokens, done, shown=show_progress))
        with shown as progress, torch.enable_grad():  # whatever the caller has set
            while stop.received is None and _make_one_step_each(trainers, progress):
                pass
        for trainer in trainers:
            trainer.end()
        prune_together(trainers)
    except BaseException:
        for trainer in trainers:
            trainer.abort()
        raise
    finally:
        for trainer in trainers:
            trainer.source.close()
            trainer.release()


def _make_one_step_each(trainers: Sequence[Trainer], progress: Progress) -> bool:
    """Whether any was left to make."""
    left = [trainer for trainer in trainers if trainer.step < trainer.total_steps]
    rows: list[Row] = []
    saved = [trainer.saved_step for trainer in left]
    for trainer in left:
        row = trainer.advance()
        progress.advance(trainer.tokens_per_step)
        if row:
            rows.append(row)
    if saved != [trainer.saved_step for trainer in left]:
        prune_together(trainers)
    if rows:
        last = all(trainer.step == trainer.total_steps for trainer in left)
        progress.show(rows[0] if len(rows) == 1 else _mean(rows), last=last, runs=len(rows))
    return bool(left)


def prune_together(trainers: Sequence[Trainer]) -> None:
    """Remove old checkpoints of trainings that go on together, once all have made the step.

    The newest step that has a checkpoint in all of them is kept: there they go on after a kill.
    """
    stores = [trainer.checkpoints for trainer in trainers]
    kept = [store for store in stores if store is not None]
    if len(trainers) == 1 or len(kept) < len(trainers):
        return
    step = trainers[0].step
    common = newest_common_step(kept, step)
    for store in kept:
        store.prune(step, common)


def _mean(rows: list[Row]) -> Row:
    """The figures of several trainings as one; they all tell of the same time."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    rate = sum(row.get("tokens_per_second", 0.0) for row in rows)
    return {**mean, "step": rows[0]["step"], "tokens_per_second": rate}
