"""Checkpoint directories: written aside, flushed to the disk, renamed; verified when read.

`step-00000300/` holds sae.safetensors and config.json (a model that can be loaded by itself) and
trainer.safetensors and trainer.json (what resuming needs besides). trainer.json carries the sha256
of the other files and of itself. A directory appears under its name only when it is complete, so a
kill at any moment leaves the checkpoints before it as they were.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from sae_fast.json_files import JSONError, is_integer, parse_json, read_regular, require
from sae_fast.tensor_files import load_tensors, save_tensors, sha256_of

logger = logging.getLogger(__name__)

TENSORS = "trainer.safetensors"
STATE = "trainer.json"
_PREFIX = "step-"

Content = TypeVar("Content")
StateCheck = Callable[[Path, dict[str, Any]], None]


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or read, in one line that names it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    path: Path
    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run: `step-*` directories and the links `latest` and `best`.

    Args:
        directory: where they lie; made by `prepare`.
        keep: how many of the newest to keep; the one that `best` names is kept as well.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def prepare(self) -> None:
        """Makes the directory, proves that it can be written, sweeps what a kill left behind."""
        probe = self.directory / f".probe-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            message = f"cannot write to the checkpoint directory {self.directory}: {error.strerror}"
            raise CheckpointError(message) from error
        for leftover in self.directory.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.directory / f"{_PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint here, ascending."""
        names = (path.name for path in self.directory.glob(f"{_PREFIX}*"))
        digits = (name.removeprefix(_PREFIX) for name in names)
        return sorted(int(step) for step in digits if step.isdigit())

    def save(
        self,
        step: int,
        save_model: Callable[[Path], object],
        tensors: dict[str, torch.Tensor],
        state: dict[str, Any],
        *,
        best: bool = False,
    ) -> Path:
        """Writes one checkpoint, points `latest` (and `best`) at it and removes the oldest.

        Args:
            step: how many steps the state has seen.
            save_model: writes sae.safetensors and config.json into the directory it is given.
            tensors: the tensors of trainer.safetensors.
            state: the JSON content of trainer.json.
            best: whether this is the best one so far.

        Raises:
            CheckpointError: when it cannot be written; those before it are untouched.
        """
        final = self.path_of(step)
        aside = self.directory / f".{final.name}-{os.getpid()}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            save_model(aside)
            save_tensors(aside / TENSORS, tensors)
            _write_state(aside, {"step": step, **state})
            _flush_directory(aside)
            self._put_in_place(aside, final)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(self._complaint(final, error)) from error
        self._prune(step)
        if best:
            self._link("best", final)
        return final

    def mark_best(self, step: int) -> None:
        """Points `best` at the checkpoint of a step that is already there."""
        self._link("best", self.path_of(step))

    def newest(self) -> Path | None:
        """The last checkpoint written here: what `latest` names, else the one of the last step."""
        named = self.directory / "latest"
        if named.exists():
            return self.directory / os.readlink(named)
        steps = self.steps()
        return self.path_of(steps[-1]) if steps else None

    def _put_in_place(self, aside: Path, final: Path) -> None:
        if final.exists():  # left by a run that went further than the checkpoint resumed from
            self._remove(final)
        os.rename(aside, final)
        self._link("latest", final)

    def _link(self, name: str, target: Path) -> None:
        aside = self.directory / f".{name}-{os.getpid()}"
        aside.unlink(missing_ok=True)
        os.symlink(target.name, aside)
        os.replace(aside, self.directory / name)
        _fsync(self.directory)

    def _prune(self, step: int) -> None:
        """Removes all but the last `keep` up to this step; later ones belong to another branch."""
        best = self.directory / "best"
        spared = os.readlink(best) if best.is_symlink() else None
        for old in [other for other in self.steps() if other <= step][: -self.keep]:
            if self.path_of(old).name != spared:
                self._remove(self.path_of(old))

    def _remove(self, path: Path) -> None:
        # Renamed first: a kill in the middle of it must not leave half a checkpoint to be found.
        doomed = self.directory / f".{path.name}-removed-{os.getpid()}"
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _complaint(self, final: Path, error: OSError) -> str:
        newest = self.newest()
        intact = f"; {newest} is the last complete one" if newest else ""
        return f"cannot write the checkpoint {final}: {_reason(error)}{intact}"


def read_checkpoint(path: Path, check: StateCheck | None = None) -> Checkpoint:
    """Reads one checkpoint after checking every file against its sha256.

    Args:
        path: its directory.
        check: of trainer.json's path and content, raises CheckpointError where it is inconsistent.

    Raises:
        CheckpointError: naming the file that is missing, incomplete or altered.
    """
    state = _read_state(path / STATE, check)
    for name, digest in state["sha256"].items():
        try:
            found = sha256_of(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from error
        if found != digest:
            raise CheckpointError(f"{path / name} is corrupted: its checksum does not match")
    try:
        return Checkpoint(path, state["step"], load_tensors(path / TENSORS), state)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def read_newest_intact(path: Path, check: StateCheck | None = None) -> Checkpoint:
    """Reads a checkpoint, or the newest intact one before it, saying which one was passed over.

    Raises:
        CheckpointError: when neither it nor any before it is intact.
    """
    return _first_intact(path, lambda found: read_checkpoint(found, check), logging.WARNING)


def read_newest_state(path: Path, check: StateCheck | None = None) -> dict[str, Any]:
    """The JSON content of a checkpoint, or of the newest before it that has any.

    Raises:
        CheckpointError: when there is none.
    """
    return _first_intact(path, lambda found: _read_state(found / STATE, check), logging.DEBUG)


def _first_intact(path: Path, read: Callable[[Path], Content], level: int) -> Content:
    earlier: list[Path] = []
    if path.name.startswith(_PREFIX):
        store = CheckpointStore(path.parent, keep=1)
        earlier = [store.path_of(step) for step in reversed(store.steps())]
        earlier = [candidate for candidate in earlier if candidate.name < path.name]
    complaint: CheckpointError | None = None
    for candidate in [path, *earlier]:
        try:
            return read(candidate)
        except CheckpointError as error:
            logger.log(level, "%s; trying the checkpoint before it", error)
            complaint = complaint or error
    raise CheckpointError(f"{complaint}, and no intact checkpoint comes before it") from complaint


def find_checkpoint(reference: str, run_directory: Path | None) -> Path | None:
    """The checkpoint that `--resume-from` means; None when `latest` finds none yet.

    Args:
        reference: `latest` or `best` of the run, a checkpoint, or a run directory (its latest), or
            one that holds a single run, as that of arch slots does.
        run_directory: the run that `latest` and `best` speak of.

    Raises:
        CheckpointError: when there is no such checkpoint.
    """
    if reference in ("latest", "best"):
        if run_directory is None:
            raise CheckpointError(f"resume_from={reference} needs checkpoint_dir, the run it is of")
        store = CheckpointStore(run_directory / "checkpoints", keep=1)
        if reference == "latest":
            inner = [] if store.newest() is not None else _runs_in(run_directory)
            return _newest_of(inner[0]) if len(inner) == 1 else store.newest()
        best = store.directory / "best"
        if not best.exists():
            raise CheckpointError(f"{store.directory} has no best checkpoint")
        return store.directory / os.readlink(best)
    path = Path(os.path.realpath(reference))  # `latest` and `best` are links to what is meant
    if path.name.startswith(_PREFIX) or (path / STATE).exists():
        return path
    for directory in (path / "checkpoints", path):
        newest = CheckpointStore(directory, keep=1).newest()
        if newest is not None:
            return newest
    inner = _runs_in(path)
    if len(inner) == 1:
        return _newest_of(inner[0])
    names = " and ".join(run.name for run in inner)
    several = f", but holds the runs {names}: name one of them" if inner else ""
    raise CheckpointError(
        f"resume_from: {reference} is no checkpoint and no run that has one{several}"
    )


def _newest_of(run: Path) -> Path | None:
    return CheckpointStore(run / "checkpoints", keep=1).newest()


def _runs_in(directory: Path) -> list[Path]:
    """The runs with a checkpoint that a directory holds, by name."""
    if not directory.is_dir():
        return []
    return [path for path in sorted(directory.iterdir()) if _newest_of(path) is not None]


def _write_state(directory: Path, state: dict[str, Any]) -> None:
    files = sorted(path for path in directory.iterdir())
    state = {**state, "sha256": {path.name: sha256_of(path) for path in files}}
    text = json.dumps({**state, "digest": _digest(state)}, indent=1)
    (directory / STATE).write_text(text)


def _read_state(path: Path, check: StateCheck | None) -> dict[str, Any]:
    try:
        state = parse_json(read_regular(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except JSONError as error:
        raise CheckpointError(f"{path} is corrupted: {error}") from error
    digest = state.pop("digest", None) if isinstance(state, dict) else None
    if digest is None or digest != _digest(state):
        raise CheckpointError(f"{path} is corrupted: its checksum does not match")
    state = dict(state)
    try:
        _check_names(path, state)
    except JSONError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if check is not None:
        check(path, state)
    return state


def _check_names(path: Path, state: dict[str, Any]) -> None:
    """Raise JSONError unless a state is of the step and the files of its directory."""
    require(is_integer(state.get("step")), "step", "a whole number", state.get("step"))
    digits = path.parent.name.removeprefix(_PREFIX)
    if path.parent.name.startswith(_PREFIX) and digits.isdigit():
        require(int(digits) == state["step"], "step", f"that of {path.parent.name}", state["step"])
    sums = state.get("sha256")
    known = {"sae.safetensors", "config.json", TENSORS}
    present = {name for name in known if (path.parent / name).exists()}
    is_whole = isinstance(sums, dict) and present | {TENSORS} <= sums.keys() <= known
    require(is_whole, "sha256", f"sums of {', '.join(sorted(known))}", sums)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _flush_directory(directory: Path) -> None:
    """The files, then the names: a rename must never outrun what it names."""
    for path in directory.iterdir():
        _fsync(path)
    _fsync(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems cannot flush a directory, and say so with EINVAL.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
