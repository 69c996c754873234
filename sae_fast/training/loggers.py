"""The loggers of metrics beside metrics.jsonl: Weights & Biases and TensorBoard.

Each is imported only where a run asks for it. One that fails on the way is given up, with a warning
in one line; metrics.jsonl has all rows in any case. After a kill and a resume the steps that were
lost are made again: neither logger shows a step twice or goes back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sae_fast.activations.errors import one_line
from sae_fast.atomic_files import replacing
from sae_fast.config import TrainConfig
from sae_fast.config.train import DEFAULT_PROJECT
from sae_fast.json_files import is_integer, read_json
from sae_fast.training.metrics import STEP, Row

logger = logging.getLogger(__name__)

DENSITIES = "heldout_log10_density"
PROGRESS = "wandb.json"
_BINS = 64

LogDensities = npt.NDArray[np.float64]  # [n], of the latents that fire


class Logger(Protocol):
    """Takes the rows of a run."""

    def write(self, row: Row, densities: LogDensities | None) -> None:
        """Log a row, and a histogram of the densities where they are given."""

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        """Log the summary of the run, and close the logger."""


class Loggers:
    """The loggers of one run; what one of them raises ends that logger only.

    Args:
        opened: by name, as warnings have it.
    """

    def __init__(self, opened: Mapping[str, Logger]) -> None:
        self._working = dict(opened)

    def write(self, row: Row, rates: Tensor | None) -> None:
        """Log a row, without the metrics that are null.

        Args:
            row: of metrics.
            rates: the share of the held-out rows on which each latent fires, [F]; None: no
                evaluation belongs to the row.
        """
        densities = None if rates is None else log_densities(rates)
        known = {name: value for name, value in row.items() if value is not None}
        self._attempt(lambda each: each.write(known, densities))

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        """Log the summary, and close all loggers."""
        self._attempt(lambda each: each.finish(summary, failed=failed))
        self._working.clear()

    def _attempt(self, work: Callable[[Logger], None]) -> None:
        for name, each in list(self._working.items()):
            try:
                work(each)
            except Exception as error:
                del self._working[name]
                logger.warning("%s fails and gets no more rows: %s", name, _reason(error))


def open_loggers(
    config: TrainConfig,
    settings: dict[str, Any],
    directory: Path | None,
    *,
    name: str | None,
    step: int,
    wandb_id: str | None,
    quiet: bool = False,
) -> tuple[Loggers, str | None]:
    """Open the loggers that a run asks for; return them, and the id of its run on W&B.

    Args:
        config: says which loggers, and how the run is called there.
        settings: all settings of the run, which the loggers show.
        directory: of the run; None: it has none, and W&B keeps its files in the working directory.
        name: of the run, where the configuration gives none.
        step: of the checkpoint that the run was resumed from, -1 for a new run.
        wandb_id: of the run on W&B to continue; None: a new one.
        quiet: whether W&B prints no more than where the run is.

    Raises:
        ValueError: in one line, where a logger is not installed or does not start.
    """
    opened: dict[str, Logger] = {}
    if "wandb" in config.loggers:
        wandb_log = WandbLog(config, settings, directory, name=name, run_id=wandb_id, quiet=quiet)
        opened["Weights & Biases"], wandb_id = wandb_log, wandb_log.run_id
    if "tensorboard" in config.loggers:
        if directory is None:
            raise ValueError("logger tensorboard needs checkpoint_dir, where its files lie")
        opened["TensorBoard"] = TensorboardLog(directory / "tensorboard", settings, step)
    return Loggers(opened), wandb_id


def log_densities(rates: Tensor) -> LogDensities:
    """Return log10 of the share of rows on which each latent fires, without those that never do.

    Args:
        rates: [F].
    """
    found: LogDensities = rates[rates > 0].double().log10().cpu().numpy()
    return found


class WandbLog:
    """A run on Weights & Biases.

    Its rows have `step` as their axis. Of a run that is resumed, the steps that W&B has already are
    left out: wandb.json in the run's directory says which one was the last, also after a kill.

    Args:
        config: project, entity, name, group and tags.
        settings: shown as the configuration of the run.
        directory: where it keeps its files (`WANDB_MODE=offline` leaves them all there).
        name: of the run, where the configuration gives none.
        run_id: the run to continue; None for a new one.
        quiet: whether W&B prints no more than where the run is.
    """

    def __init__(
        self,
        config: TrainConfig,
        settings: dict[str, Any],
        directory: Path | None,
        *,
        name: str | None,
        run_id: str | None,
        quiet: bool = False,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            remedy = "install it (pip install 'sae_fast[wandb]') or pass --no-wandb"
            raise ValueError(f"{_asked_for(config)} needs wandb: {remedy}") from error
        self._histogram: Any = wandb.Histogram
        place = Path.cwd() if directory is None else directory
        try:
            self._run: Any = wandb.init(
                project=config.wandb_project or DEFAULT_PROJECT,
                entity=config.wandb_entity,
                name=config.wandb_name or name,
                group=config.wandb_group,
                tags=list(config.wandb_tags) or None,
                dir=str(place.resolve()),  # its service keeps the working directory it began in
                config=settings,
                id=run_id,
                resume="allow",
                reinit="create_new",  # a sweep has several at a time
                # Without a key, a silent one would log offline.
                settings=wandb.Settings(quiet=True) if quiet else None,
            )
            self._run.define_metric(STEP)
            self._run.define_metric("*", step_metric=STEP)
            summary: Any = self._run.summary
            known = None if run_id is None else summary.get(STEP)
        except Exception as error:  # without a key, a network, or with settings that it refuses
            raise ValueError(
                f"{_asked_for(config)}: Weights & Biases does not start ({_reason(error)}); "
                f"WANDB_MODE=offline keeps the log in {place}, --no-wandb does without"
            ) from error
        self.run_id: str | None = self._run.id
        self._progress = None if directory is None else directory / PROGRESS
        self._last = max(self._noted_step(), known if isinstance(known, int) else -1)
        if self._last >= 0:
            logger.info("Weights & Biases has the steps up to %d and gets those after", self._last)

    def write(self, row: Row, densities: LogDensities | None) -> None:
        """Log a row, unless W&B has its step already."""
        if row[STEP] <= self._last:
            return
        if densities is not None and densities.size:
            histogram = self._histogram(np_histogram=np.histogram(densities, _BINS))
            row = {**row, DENSITIES: histogram}
        self._run.log(row)
        self._last = row[STEP]
        self._note_step()

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        """Record the summary, and close the run, as failed or not."""
        try:
            self._run.summary.update(dict(summary))
        finally:
            self._run.finish(exit_code=1 if failed else 0)

    def _noted_step(self) -> int:
        """Return the last step that this run is known to have on W&B; -1: none."""
        try:
            noted = read_json(self._progress) if self._progress is not None else {}
            step = noted[STEP] if noted["id"] == self.run_id else -1
        except (OSError, ValueError, LookupError, TypeError):
            return -1
        return int(step) if is_integer(step) else -1

    def _note_step(self) -> None:
        if self._progress is not None:
            note = json.dumps({"id": self.run_id, STEP: self._last})
            with replacing(self._progress, flush=False) as temporary:  # with every row
                temporary.write_text(note, encoding="utf-8")


class TensorboardLog:
    """The files of TensorBoard.

    Args:
        directory: where they lie.
        settings: shown as a text.
        step: of the checkpoint that the run was resumed from, after which nothing of an earlier
            process is shown; -1 for a new run.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            remedy = "install it (pip install 'sae_fast[tensorboard]')"
            raise ValueError(f"logger tensorboard needs tensorboard: {remedy}") from error
        try:
            purged = step + 1 if step >= 0 else None
            self._writer: Any = SummaryWriter(str(directory), purge_step=purged)
        except OSError as error:
            raise ValueError(f"logger tensorboard: {directory}: {error.strerror}") from error
        if step < 0:
            self._writer.add_text("settings", f"```json\n{json.dumps(settings, indent=1)}\n```", 0)

    def write(self, row: Row, densities: LogDensities | None) -> None:
        """Log a row at its step."""
        step = row[STEP]
        for name, value in row.items():
            if name != STEP:
                self._writer.add_scalar(name, value, step)
        if densities is not None and densities.size:
            self._writer.add_histogram(DENSITIES, densities, step, bins="auto")
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        """Close the files; TensorBoard has no summary of a run."""
        self._writer.close()


def _asked_for(config: TrainConfig) -> str:
    """Return the setting that asks for W&B, as an error names it."""
    if config.wandb_project is None:
        return "logger wandb"
    return f"wandb_project = {config.wandb_project!r}"


def _reason(error: Exception) -> str:
    return one_line(error)[:300]
