"""Find and read what a run has logged, also while it is running."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_fast.config import SAEConfig
from sae_fast.json_files import JSONError, read_json
from sae_fast.training.checkpoint import MODE_DIRECTORIES
from sae_fast.training.metrics import MetricsLog, Row, check_row
from sae_fast.training.run_directory import run_name, run_title

METRICS = "metrics.jsonl"
HISTORY = "training_history.json"
_LARGEST_HISTORY = 1 << 32  # bytes


@dataclass(frozen=True)
class History:
    """The metrics that a run has logged.

    Attributes:
        directory: where it lies, the run's.
        place: the same, or its file where that has a name of its own.
        rows: its metrics, one row or more; each has step and tokens.
        title: its name, with architecture and sizes as far as they are known.
    """

    directory: Path
    place: Path
    rows: list[Row]
    title: str


def read_history(run: Path) -> History:
    """Read what a run has logged: its directory, its metrics.jsonl or its training_history.json.

    The one run that lies in a mode's directory of arch slots is found from the directory above it.

    Raises:
        OSError: where there is no such run, or it cannot be read.
        ValueError: where it is none, is not one only, or has logged nothing yet.
    """
    path = _find(run)
    if path.suffix == ".jsonl":
        rows, settings = MetricsLog(path).rows, _content(path.with_name("config.json"))
    else:
        rows, settings = _read_columns(path)
    if not rows:
        raise ValueError(f"{path} holds no metrics: nothing has been logged yet")
    _check(path, rows)
    is_own = path.name in (METRICS, HISTORY)
    name = run_name(path.parent) if is_own else path.stem
    try:
        title = run_title(name, SAEConfig.from_saved(settings["sae"]))
    except (ValueError, KeyError, TypeError):  # of another version: so is a title, no more
        title = name
    return History(path.parent, path.parent if is_own else path, rows, title)


def _find(run: Path) -> Path:
    """Find the file with a run's metrics; metrics.jsonl goes before training_history.json."""
    if run.is_file():
        return run
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run")
    if (own := _metrics_in(run)) is not None:
        return own
    modes = {name: _metrics_in(run / name) for name in MODE_DIRECTORIES.values()}
    found = {name: path for name, path in modes.items() if path is not None}
    if len(found) > 1:
        names = " or ".join(str(run / name) for name in found)
        raise ValueError(f"{run} holds {len(found)} runs: name {names}")
    if not found:
        raise ValueError(f"{run} is no run: it holds no {METRICS} and no {HISTORY}")
    return next(iter(found.values()))


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
