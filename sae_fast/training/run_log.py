"""The log of a run while it trains, and the summary and results that it leaves when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import RunConfig
from sae_fast.report.page import REPORT
from sae_fast.report.training_page import LatentFigures
from sae_fast.training.best import Best
from sae_fast.training.health import RunHealth
from sae_fast.training.loggers import Loggers, open_loggers
from sae_fast.training.metrics import MetricsLog, Row
from sae_fast.training.run_directory import RunDirectory, run_name


class RunLog:
    """The metrics of one run, on disk and with its loggers, its summary and its results.

    Args:
        run: the directory of the run; None: rows are kept in memory and nothing is written.
        config: of the run.
        health: watches the rows for signs of a training that goes wrong.
        step: rows of later steps are dropped, since a run resumed there logs them again.

    Attributes:
        summary: numbers of the whole run by name, complete after `conclude`.
        wandb_id: of the run on Weights & Biases, which a resumed run continues.
    """

    def __init__(
        self, run: RunDirectory | None, config: RunConfig, health: RunHealth, step: int
    ) -> None:
        self.summary: dict[str, Any] = {}
        self.wandb_id: str | None = None
        self._run, self._config, self._health = run, config, health
        self._metrics = MetricsLog(None if run is None else run.metrics)
        self._metrics.rewind(step)
        self._step = step
        self._loggers: Loggers | None = None

    @property
    def rows(self) -> list[Row]:
        """The rows of metrics so far, those before a resume included."""
        return self._metrics.rows

    @property
    def has_loggers(self) -> bool:
        """Whether rows go to a logger beside metrics.jsonl."""
        return self._loggers is not None

    def open_loggers(self, *, quiet: bool = False) -> None:
        """Open the loggers that the configuration asks for; raise ValueError where one fails.

        With `quiet` W&B prints no more than where the run is.
        """
        config = self._config.train
        if not config.loggers:
            return
        self._loggers, self.wandb_id = open_loggers(
            config,
            self._config.to_dict(),
            None if self._run is None else self._run.path,
            name=None if self._run is None else run_name(self._run.path),
            step=self._step,
            wandb_id=self.wandb_id,
            quiet=quiet,
        )

    def write(self, row: Row, *, to_loggers: bool, rates: Tensor | None = None) -> None:
        """Append a row, and log what it says about the training's health.

        Args:
            row: of metrics.
            to_loggers: whether the loggers get it too.
            rates: the share of the held-out rows on which each latent fires [F], which loggers draw
                as a histogram.
        """
        self._metrics.write(row)
        self._health.watch(row)
        if self._loggers is not None and to_loggers:
            self._loggers.write(row, rates)

    def flush(self) -> None:
        """Flush the rows to the disk, so that no checkpoint outlives a row before it."""
        self._metrics.flush()

    def continue_wandb(self, run_id: str | None) -> None:
        """Let `open_loggers` continue the W&B run of this id; None: it opens a new one."""
        self.wandb_id = run_id

    def note_checkpoint(self, path: Path) -> None:
        """Name the last checkpoint in the summary."""
        self.summary["checkpoint"] = str(path)

    def conclude(
        self,
        totals: Mapping[str, float],
        skipped: Mapping[str, int],
        best: Best | None,
        *,
        is_complete: bool,
    ) -> None:
        """Complete the summary.

        Args:
            totals: steps, tokens, seconds and reader_stall_fraction of the run.
            skipped: with fp16 how many steps were skipped, and on how many tokens it trained.
            best: the figure and step of the best checkpoint, if there is one.
            is_complete: whether all steps are made, so that there will be a plot.
        """
        self.summary |= totals
        rows = self.rows
        for row in rows:  # the last value of each
            names = row.keys() - {"step", "tokens", "epoch"}
            self.summary |= {f"final_{name}": row[name] for name in row if name in names}
        self.summary |= skipped
        self.summary["warnings"] = self._health.conclude(rows)
        if best is not None:
            names = best.keys() - {"step"}
            self.summary |= {f"best_{name}": best[name] for name in names}
            self.summary |= {"best_step": best["step"]}
        if self._run is not None and is_complete:
            self.summary["plot"] = str(self._run.plot)
            self.summary["report"] = str(self._run.path / REPORT)

    def write_results(
        self,
        config: RunConfig,
        models: Mapping[str, Callable[[], SparseAutoencoder]],
        latents: LatentFigures,
    ) -> None:
        """Write the models, the history, the report and the plot of a run that is complete.

        Args:
            config: the configuration that the run was trained with.
            models: makes each further model to save, by its directory's name.
            latents: for the report.
        """
        assert self._run is not None
        for name, model in models.items():
            model().save(self._run.path / name)
        self._run.write_results(config, self.rows, self.summary, latents)

    def close(self, *, failed: bool = False) -> None:
        """Close the loggers, with the summary."""
        if self._loggers is not None:
            self._loggers.finish(self.summary, failed=failed)
            self._loggers = None
