"""Find and read what runs have logged, also while they are running."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_fast.activations.files import natural_key
from sae_fast.config import SAEConfig
from sae_fast.json_files import JSONError, is_number, read_json
from sae_fast.report.panels import with_target
from sae_fast.training.checkpoint import MODE_DIRECTORIES
from sae_fast.training.metrics import MetricsLog, Row, check_row
from sae_fast.training.run_directory import kind_of, run_name, run_title

METRICS = "metrics.jsonl"
HISTORY = "training_history.json"
_LARGEST_HISTORY = 1 << 32  # bytes
_DEEPEST = 3  # directories of a hook point, of a training, and of a mode of arch slots


class NothingLoggedError(ValueError):
    """A run has not logged a row yet."""


@dataclass(frozen=True)
class History:
    """The metrics that a run has logged.

    Attributes:
        directory: the directory of the run.
        place: the directory too, or the file where that has a name of its own.
        rows: its metrics, one row or more; each has step and tokens, and target_l0 where the run
            is trained for one.
        title: its name, with architecture and sizes as far as they are known.
        kind: the architecture, with the word transcoder for one; "unknown" where the configuration
            cannot be read.
    """

    directory: Path
    place: Path
    rows: list[Row]
    title: str
    kind: str


def read_history(run: Path) -> History:
    """Read what a run has logged: its directory, its metrics.jsonl or its training_history.json.

    The one run that lies in a mode's directory of arch slots is found from the directory above it.

    Raises:
        OSError: where there is no such run, or it cannot be read.
        ValueError: if it is no run, holds several, or has logged nothing yet.
    """
    path = _find(run)
    if path.suffix == ".jsonl":
        rows, settings = MetricsLog(path).rows, _content(path.with_name("config.json"))
    else:
        rows, settings = _read_columns(path)
    if not rows:
        raise NothingLoggedError(f"{path} holds no metrics: nothing has been logged yet")
    _check(path, rows)
    has_usual_name = path.name in (METRICS, HISTORY)
    name = run_name(path.parent) if has_usual_name else path.stem
    title, kind = name, "unknown"
    # A configuration of another version costs the title and the target, no more.
    with contextlib.suppress(ValueError, KeyError, TypeError):
        sae = SAEConfig.from_saved(settings["sae"])
        title, kind = run_title(name, sae), kind_of(sae)
        rows = with_target(rows, sae.target_l0)
    return History(path.parent, path.parent if has_usual_name else path, rows, title, kind)


def find_runs(place: Path) -> list[Path]:
    """Return the runs that a path names: itself, or the runs of a sweep in the order of names.

    Directories of modes that lie in the directory of one run with arch slots are no sweep.
    """
    if not place.is_dir() or _metrics_in(place) is not None:
        return [place]
    runs = _runs_below(place, _DEEPEST)
    modes = {place / name for name in MODE_DIRECTORIES.values()}
    return [place] if modes.issuperset(runs) else runs


def _runs_below(directory: Path, depth: int) -> list[Path]:
    runs: list[Path] = []
    folders = (path for path in directory.iterdir() if path.is_dir() and path.name[0] != ".")
    for folder in sorted(folders, key=natural_key):
        if _metrics_in(folder) is not None:
            runs.append(folder)
        elif depth > 1:
            runs += _runs_below(folder, depth - 1)
    return runs


def heldout_result(history: History) -> tuple[float, float] | None:
    """Return L0 and FVU on held-out rows at the end of a run; None if it is not complete.

    Raises:
        ValueError: naming a complete run that was not evaluated on held-out rows.
    """
    place = history.place
    path = place / HISTORY if place.is_dir() else place
    if path.suffix == ".jsonl" or not path.is_file():
        return None
    content = read_json(path, _LARGEST_HISTORY)
    summary = content.get("summary") if isinstance(content, dict) else None
    figures: Any = summary if isinstance(summary, dict) else {}
    l0, fvu = figures.get("final_heldout_l0"), figures.get("final_heldout_fvu")
    if not (is_number(l0) and is_number(fvu)):
        raise ValueError(
            f"{place} has no held-out figures: it was trained without held-out shards, which "
            "--heldout names"
        )
    return l0, fvu


def _find(run: Path) -> Path:
    """Find the file with a run's metrics; metrics.jsonl goes before training_history.json."""
    if run.is_file():
        return run
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run")
    if (metrics := _metrics_in(run)) is not None:
        return metrics
    modes = {name: _metrics_in(run / name) for name in MODE_DIRECTORIES.values()}
    of_modes = {name: path for name, path in modes.items() if path is not None}
    if len(of_modes) > 1:
        names = " or ".join(str(run / name) for name in of_modes)
        raise ValueError(f"{run} holds {len(of_modes)} runs: name {names}")
    if not of_modes:
        raise ValueError(
            f"{run} is no run: it holds no {METRICS} and no {HISTORY}, and no directory in it does"
        )
    return next(iter(of_modes.values()))


def _metrics_in(directory: Path) -> Path | None:
    paths = (directory / name for name in (METRICS, HISTORY))
    return next((path for path in paths if path.is_file()), None)


def _read_columns(path: Path) -> tuple[list[Row], Any]:
    """Read the rows and the settings in a training_history.json."""
    try:
        content = read_json(path, _LARGEST_HISTORY)
    except JSONError as error:
        raise ValueError(f"{error}: neither a {HISTORY} nor a {METRICS}") from None
    columns = content.get("history") if isinstance(content, dict) else None
    if not isinstance(columns, dict) or not all(isinstance(c, list) for c in columns.values()):
        raise ValueError(f"{path} is neither a {HISTORY} nor a {METRICS}")
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError(
            f"{path} is neither a {HISTORY} nor a {METRICS}: its metrics have different lengths"
        )
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows, content.get("config")


def _content(path: Path) -> Any:
    """Read the JSON in a file; return None where there is none."""
    try:
        return read_json(path)
    except (ValueError, OSError):
        return None


def _check(path: Path, rows: list[Row]) -> None:
    for row in rows:
        try:
            check_row(row, ("step", "tokens"))
        except JSONError as error:
            raise ValueError(f"{path} is no history of a run: {error}") from None
