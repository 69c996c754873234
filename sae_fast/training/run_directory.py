"""The files of a run beside its checkpoints: configuration, metrics, history and plot."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_fast.activations.errors import listed
from sae_fast.activations.scanning import RECORD_NAME
from sae_fast.atomic_files import replacing
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.directory_lock import FileLock, HeldError
from sae_fast.json_files import read_json
from sae_fast.report.page import REPORT
from sae_fast.report.panels import with_target
from sae_fast.report.plot import plot_run
from sae_fast.report.training_page import LatentFigures, training_page
from sae_fast.tensor_files import require_unicode
from sae_fast.training.checkpoint import (
    MODE_DIRECTORIES,
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    find_checkpoint,
    has_checkpoint,
    read_newest_state,
    runs_at,
    runs_in,
)
from sae_fast.training.metrics import Row

LOCK = ".run.lock"
CONFIG = "config.json"
HISTORY = "training_history.json"
SWEEP = "sweep.json"
_WRITTEN_AT_START = (CONFIG, RECORD_NAME)
# Written aside by a process that a kill ended.
LEFTOVERS = (".*.tmp", ".config-*.json", ".history-*.json")
# Of a model, the second by the safetensors library.
MODEL_LEFTOVERS = (".*.tmp", ".*.partial", ".tmp*")
AVERAGED, FINAL = MODELS = ("averaged", "sae_final")  # directories in a run's


class RunDirectory:
    """The directory that a run writes to; one run at a time holds it.

    config.json  metrics.jsonl  training_history.json  checkpoints/  plots/training.png, and with
    arch slots sae_final/, all in a directory of the mode's name.
    """

    def __init__(self, path: Path, keep_checkpoints: int) -> None:
        self.path = path
        self.checkpoints = CheckpointStore(path / "checkpoints", keep_checkpoints)
        self._lock = FileLock(path / LOCK)
        self._made: list[Path] = []  # what was not there before, the innermost first

    @property
    def metrics(self) -> Path:
        """The file of the metrics."""
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        """The plot of the metrics."""
        return self.path / "plots" / "training.png"

    def owns(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint is one of this run's."""
        return checkpoint.path.resolve().parent == self.checkpoints.directory.resolve()

    def hold(self) -> None:
        """Make the directory and keep all other runs out of it until `release`.

        Raises:
            CheckpointError: when another run holds it, or it cannot be written.
        """
        require_unicode(self.path)
        directory = self.checkpoints.directory
        try:
            files = [self.path / name for name in _WRITTEN_AT_START]
            missing = [
                path for path in (*files, directory, *directory.parents) if not path.exists()
            ]
            directory.mkdir(parents=True, exist_ok=True)
            self._made.extend(missing)
            try:
                self._lock.take()
            except HeldError:
                gc.collect()  # it may belong to a trainer of this process that is no longer used
                self._lock.take()
        except HeldError as error:
            raise in_use(self.path, error.holder) from None
        except OSError as error:
            message = f"cannot write to the checkpoint directory {directory}: {error.strerror}"
            raise CheckpointError(message) from error

    def check_free(self) -> None:
        """Raise CheckpointError where another run holds the directory; nothing is made."""
        if not self._lock.is_held and self._lock.path.exists():
            self.hold()
            self.release()

    def check_resumes(self, resumed: Checkpoint | None) -> Checkpoint | None:
        """Return the checkpoint if it is one of the directory's.

        Raises CheckpointError where it is not, and the directory holds a run.
        """
        own = resumed if resumed is not None and self.owns(resumed) else None
        if own is None and (newest := self.checkpoints.newest()) is not None:
            raise CheckpointError(
                f"{self.path} already holds a run ({newest.name}): continue it with "
                "--resume-from latest, or name another --checkpoint-dir"
            )
        return own

    def release(self) -> None:
        """Let other runs use the directory.

        Where no checkpoint was written, what was made for the run is removed: a start that was
        refused leaves nothing behind.
        """
        if self._lock.is_held:
            is_empty = self.checkpoints.newest() is None
            self._lock.release()
            if is_empty:
                for path in self._made:
                    with contextlib.suppress(OSError):
                        path.rmdir() if path.is_dir() else path.unlink()
        self._made.clear()

    def prepare(self, resumed: Checkpoint | None) -> None:
        """Hold the directory and make it ready for a run that starts or continues.

        Raises:
            CheckpointError: when another run holds it, when it cannot be written, or holds a run
                that is not resumed.
        """
        self.hold()
        continued = self.check_resumes(resumed)
        self.checkpoints.prepare()
        _remove_leftovers(self.path)
        if continued is None:
            return
        # Compared by name: the run may be named by another path to it.
        if continued.path.name == self.checkpoints.path_of(continued.step).name:
            best = continued.state.get("best")
            self.checkpoints.rewind(continued.step, None if best is None else best["step"])

    def write_config(self, config: RunConfig) -> None:
        """Write config.json whole or not at all."""
        with replacing(self.path / CONFIG) as aside:
            config.save(aside)

    def write_results(
        self,
        config: RunConfig,
        rows: list[Row],
        summary: dict[str, Any],
        latents: LatentFigures,
    ) -> None:
        """Write the history of all metrics with the summary, the report and the plot."""
        names = dict.fromkeys(name for row in rows for name in row)
        history = {name: [row.get(name) for row in rows] for name in names}
        content = {"config": config.to_dict(), "summary": summary, "history": history}
        with replacing(self.path / HISTORY) as aside:
            aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
        rows = with_target(rows, config.sae.target_l0)
        title = run_title(run_name(self.path), config.sae)
        page = training_page(title, rows, summary, content["config"], latents)
        page.write(self.path / REPORT)
        plot_run(rows, self.plot, title)

    def has_results(self, step: int, models: Iterable[str]) -> bool:
        """Return whether the results of a run of `step` steps are there, these models included.

        The plot is written last: one older than the history is of a shorter run.
        """
        history = self.path / HISTORY
        try:
            is_whole = all((self.path / name / "sae.safetensors").exists() for name in models)
            is_newer = self.plot.stat().st_mtime_ns >= history.stat().st_mtime_ns
            return bool(is_whole and is_newer and read_json(history)["summary"]["steps"] == step)
        except (OSError, ValueError, LookupError, TypeError):
            return False


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keep other trainings out of the directory that holds the runs of one command.

    Raises CheckpointError where another one uses it, or it belongs itself to a run. The directory
    is made, and removed again if it is empty at the end.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / LOCK)
    try:
        lock.take()
        if has_checkpoint(directory) and not runs_in(directory):
            raise CheckpointError(
                f"{directory} already holds a run, and several would be made in it: name another "
                "--checkpoint-dir"
            )
        _remove_leftovers(directory)
        yield
    except HeldError as error:
        raise in_use(directory, error.holder) from None
    finally:
        lock.release()
        _remove_empty(missing)


@contextmanager
def claimed_run_directory(config: SAEConfig, parent: Path = Path("runs")) -> Iterator[Path]:
    """Make a directory with a name that is not taken, see `free_name`, and yield its path.

    No other process can get the name. The directory is removed again if it is empty at the end.
    """
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = free_name(config, parent)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            break
    try:
        yield path
    finally:
        _remove_empty([path, *missing])


def free_name(config: SAEConfig, parent: Path = Path("runs")) -> Path:
    """Return a path not yet taken: runs/topk-k64-1, or runs/topk-1 where no k is given."""
    number = 1
    name = config.arch if config.k is None else f"{config.arch}-k{config.k}"
    while (path := parent / f"{name}-{number}").exists():
        number += 1
    return path


def in_use(path: Path, holder: str) -> CheckpointError:
    """Return the error of a directory that another run holds."""
    return CheckpointError(
        f"{path} is in use: another run writes to it ({holder}); wait for it, or name another "
        "--checkpoint-dir"
    )


def _remove_leftovers(directory: Path) -> None:
    places = [(directory, LEFTOVERS), *((directory / name, MODEL_LEFTOVERS) for name in MODELS)]
    for place, patterns in places:
        for leftover in itertools.chain.from_iterable(map(place.glob, patterns)):
            leftover.unlink(missing_ok=True)


def _remove_empty(directories: list[Path]) -> None:
    for path in directories:
        with contextlib.suppress(OSError):
            path.rmdir()


def check_holds_no_runs(sae: SAEConfig, config: TrainConfig) -> None:
    """Raise CheckpointError where the `checkpoint_dir` of one run holds several others.

    With arch slots the runs of its modes belong there.
    """
    if config.checkpoint_dir is None:
        return
    directory = Path(config.checkpoint_dir)
    modes = MODE_DIRECTORIES.values() if sae.arch == "slots" else ()
    runs = [run for run in _all_runs_in(directory) if str(run.relative_to(directory)) not in modes]
    if not runs or has_checkpoint(directory):
        return
    names = listed([str(run.relative_to(directory)) for run in runs])
    if (way := way_on_from_model(runs[0])) is not None:
        way = f"their activations come from a model, continue with {way}"
    raise CheckpointError(
        f"{directory} holds the run{'s' if len(runs) > 1 else ''} {names}: "
        f"{way or 'add --sweep FILE, or name one of them'}"
    )


def _all_runs_in(directory: Path) -> list[Path]:
    """Return the runs in a directory, and those further inside that its sweep.json names."""
    runs = runs_in(directory)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        names = [name for name in read_json(directory / SWEEP)["runs"] if isinstance(name, str)]
        inner = [path for name in names if (path := directory / name).is_relative_to(directory)]
        runs += [run for path in inner for run in runs_at(path) if run not in runs]
    return runs


def way_on_from_model(run: Path) -> str | None:
    """Return the arguments that continue a run trained straight from a model; None for others.

    Args:
        run: its directory, or one of its checkpoints.
    """
    try:
        path = find_checkpoint(str(run), None)
        identity = {} if path is None else read_newest_state(path)["source"]["identity"]
        hooks = [hook["name"] for hook in identity["hooks"]] if "model" in identity else []
    except (CheckpointError, LookupError, TypeError):
        return None
    if path is None or not hooks:
        return None
    home = next((parent.parent for parent in path.resolve().parents if parent.name in hooks), None)
    if home is None:
        return "MODEL DATASET --run_name NAME --resume_from latest"
    here = Path.cwd().resolve()
    place = home.parent.relative_to(here) if home.is_relative_to(here) else home.parent
    save_dir = "" if place == Path("output") else f"--save_dir {place} "
    return f"MODEL DATASET {save_dir}--run_name {home.name} --resume_from latest"


def in_mode_directory(sae: SAEConfig, config: TrainConfig) -> TrainConfig:
    """Return the configuration with a run of arch slots in its mode's directory.

    That lies in `checkpoint_dir`, which stays what it is where it has the mode's name already.
    """
    if sae.arch != "slots" or config.checkpoint_dir is None:
        return config
    name = MODE_DIRECTORIES[sae.slots_mode or "joint"]
    path = Path(config.checkpoint_dir)
    return config if path.name == name else replace(config, checkpoint_dir=str(path / name))


def run_name(path: Path) -> str:
    """Return the name of a run's directory, after its parent's where it is a mode's or seed's."""
    path = path.resolve()
    is_part = path.name in MODE_DIRECTORIES.values() or path.name.startswith("seed_")
    return f"{path.parent.name}/{path.name}" if is_part else path.name


def run_title(name: str, sae: SAEConfig) -> str:
    """Return what stands above a run's plots."""
    return f"{name}: {describe(sae)}"


def describe(sae: SAEConfig) -> str:
    """Return architecture and sizes, as a title has them."""
    widths = f"d_in {sae.d_in}, d_out {sae.d_out}" if sae.transcoder else f"d_in {sae.d_in}"
    sizes = f"{kind_of(sae)}: {widths}, d_sae {sae.d_sae:,}"
    return sizes if sae.k is None else f"{sizes}, k {sae.k}"


def kind_of(sae: SAEConfig) -> str:
    """Return the architecture, with the word transcoder for one, as a title has it."""
    if not sae.transcoder:
        return sae.arch
    return f"{sae.arch} skip transcoder" if sae.skip_connection else f"{sae.arch} transcoder"
