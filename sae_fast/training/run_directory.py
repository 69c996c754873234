"""The files of a run beside its checkpoints: configuration, metrics, history and plot."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from sae_fast.training.metrics import Row
from sae_fast.training.plot import plot_run

MODE_DIRECTORIES = {
    "joint": "joint",
    "separate_activation": "feature_activation",
    "separate_value": "next_token_prediction",
}


class RunDirectory:
    """Where everything lies that a run writes.

    config.json  metrics.jsonl  training_history.json  checkpoints/  plots/training.png, and with
    arch slots sae_final/, all in a directory of the mode's name.
    """

    def __init__(self, path: Path, keep_checkpoints: int) -> None:
        self.path = path
        self.checkpoints = CheckpointStore(path / "checkpoints", keep_checkpoints)

    @property
    def metrics(self) -> Path:
        """The file of the metrics."""
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        """The plot of the metrics."""
        return self.path / "plots" / "training.png"

    def owns(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is one of this run's."""
        return checkpoint.path.resolve().parent == self.checkpoints.directory.resolve()

    def prepare(self, resumed: Checkpoint | None) -> None:
        """Makes the directory; refuses one that another run has written checkpoints to.

        Raises:
            CheckpointError: when it cannot be written, or holds a run that is not resumed.
        """
        self.checkpoints.prepare()
        newest = self.checkpoints.newest()
        if newest is not None and (resumed is None or not self.owns(resumed)):
            raise CheckpointError(
                f"{self.path} already holds a run ({newest.name}): go on with it by "
                "--resume-from latest, or name another --checkpoint-dir"
            )

    def write_config(self, config: RunConfig) -> None:
        """Writes config.json whole or not at all."""
        aside = self.path / f".config-{os.getpid()}.json"
        config.save(aside)
        os.replace(aside, self.path / "config.json")

    def write_results(self, config: RunConfig, rows: list[Row], summary: dict[str, Any]) -> None:
        """Writes the history of all metrics with the summary, and draws the plot."""
        names = dict.fromkeys(name for row in rows for name in row)
        history = {name: [row.get(name) for row in rows] for name in names}
        content = {"config": config.to_dict(), "summary": summary, "history": history}
        aside = self.path / f".history-{os.getpid()}.json"
        aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(aside, self.path / "training_history.json")
        plot_run(rows, self.plot, run_title(run_name(self.path), config.sae))


def in_mode_directory(sae: SAEConfig, config: TrainConfig) -> TrainConfig:
    """The same with the run of arch slots in the directory that its mode has in `checkpoint_dir`.

    A `checkpoint_dir` that is that directory stays what it is.
    """
    if sae.arch != "slots" or config.checkpoint_dir is None:
        return config
    name = MODE_DIRECTORIES[sae.slots_mode or "joint"]
    path = Path(config.checkpoint_dir)
    return config if path.name == name else replace(config, checkpoint_dir=str(path / name))


def run_name(path: Path) -> str:
    """The name of a run's directory, where that is its mode's or seed's with the one above it."""
    path = path.resolve()
    is_part = path.name in MODE_DIRECTORIES.values() or path.name.startswith("seed_")
    return f"{path.parent.name}/{path.name}" if is_part else path.name


def run_title(name: str, sae: SAEConfig) -> str:
    """What stands above a run's plots."""
    return f"{name}: {describe(sae)}"


def describe(sae: SAEConfig) -> str:
    """Architecture and sizes, as a title has them."""
    sizes = f"{sae.arch}: d_in {sae.d_in}, d_sae {sae.d_sae:,}"
    if sae.transcoder:
        kind = "skip transcoder" if sae.skip_connection else "transcoder"
        sizes = f"{sae.arch} {kind}: d_in {sae.d_in}, d_out {sae.d_out}, d_sae {sae.d_sae:,}"
    return sizes if sae.k is None else f"{sizes}, k {sae.k}"


def new_run_directory(config: SAEConfig, parent: Path = Path("runs")) -> Path:
    """A directory of a name not yet taken, runs/topk-k64-1, or runs/topk-1 where no k is given."""
    number = 1
    name = config.arch if config.k is None else f"{config.arch}-k{config.k}"
    while (path := parent / f"{name}-{number}").exists():
        number += 1
    return path
