"""Checkpoint directories: written aside, flushed to the disk, renamed; verified when read.

`step-00000300/` holds sae.safetensors and config.json (a model that can be loaded by itself) and
trainer.safetensors and trainer.json (what resuming needs besides). trainer.json carries the sha256
of the other files and of itself. A directory appears under its name only when it is complete, so a
kill at any moment leaves the checkpoints before it as they were.

`latest` and `best` are links to two of them. Where the file system has no links they are small text
files with the name of the checkpoint; in a copy whose links were followed they are directories. All
three are read.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from sae_fast.activations.errors import listed
from sae_fast.json_files import JSONError, is_integer, parse_json, read_regular, require
from sae_fast.tensor_files import load_tensors, save_tensors, sha256_of
from sae_fast.text_links import followed

logger = logging.getLogger(__name__)

TENSORS = "trainer.safetensors"
STATE = "trainer.json"
_PREFIX = "step-"
# Where a run of arch slots lies in its checkpoint_dir, by slots_mode.
MODE_DIRECTORIES = {
    "joint": "joint",
    "separate_activation": "feature_activation",
    "separate_value": "next_token_prediction",
}
# Written aside by a process that a kill ended.
_LEFTOVERS = (".step-*", ".latest-*", ".best-*", ".probe-*")

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
    """The checkpoints of one run: `step-*` directories, and `latest` and `best`, which name two.

    Args:
        directory: where they lie; made by `prepare`.
        keep: how many of the newest to keep; the one that `best` names is kept as well.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep
        self._has_links = True

    def prepare(self) -> None:
        """Make the directory, prove that it can be written, remove what a kill left behind."""
        probe = self.directory / f".probe-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            message = f"cannot write to the checkpoint directory {self.directory}: {error.strerror}"
            raise CheckpointError(message) from error
        for pattern in _LEFTOVERS:
            for leftover in self.directory.glob(pattern):
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)

    @staticmethod
    def is_first(path: str | Path) -> bool:
        """Return whether a path is of the checkpoint that a run writes before its first step."""
        return Path(path).name == f"{_PREFIX}{0:08d}"

    def path_of(self, step: int) -> Path:
        """Return the directory of a step's checkpoint."""
        return self.directory / f"{_PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint here, ascending."""
        names = (path.name for path in self.directory.glob(f"{_PREFIX}*"))
        digits = (name.removeprefix(_PREFIX) for name in names)
        return sorted(int(step) for step in digits if step.isdigit())

    def save(
        self,
        state: Mapping[str, Any],
        save_model: Callable[[Path], object],
        *,
        best: bool = False,
        prune: bool = True,
    ) -> Path:
        """Write one checkpoint, point `latest` (and `best`) at it and remove the oldest.

        Args:
            state: by name tensors, which go into trainer.safetensors, and JSON values, which go
                into trainer.json; among these "step", how many steps the state has seen.
            save_model: writes sae.safetensors and config.json into the directory it is given.
            best: whether this is the best one so far.
            prune: whether to remove the oldest; False leaves that to a call of `prune`.

        Raises:
            CheckpointError: when it cannot be written; those before it are untouched.
        """
        with self.being_written(state["step"]) as aside:
            save_model(aside)
            save_tensors(aside / TENSORS, tensors_of(state))
            return self.complete(aside, state, best=best, prune=prune)

    @contextlib.contextmanager
    def being_written(self, step: int) -> Iterator[Path]:
        """Make a directory aside for the files of a checkpoint, and remove it after an error.

        Raises CheckpointError, which names the checkpoint, in the place of OSError.
        """
        final = self.path_of(step)
        aside = self.directory / f".{final.name}-{os.getpid()}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
        except BaseException as error:  # memory can be used up too
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, OSError):
                raise CheckpointError(self._complaint(final, error)) from error
            raise

    def complete(
        self, aside: Path, state: Mapping[str, Any], *, best: bool = False, prune: bool = True
    ) -> Path:
        """Make a checkpoint of a directory that has its tensors, see `save`; return its path."""
        values = {name: v for name, v in state.items() if not isinstance(v, torch.Tensor)}
        final = self.path_of(state["step"])
        _write_state(aside, values)
        _flush_directory(aside)
        self._put_in_place(aside, final)
        # `best` can be told from the state of the latest, see `rewind`, but not the reverse.
        self._point("latest", final)
        if best:
            self._point("best", final)
        if prune:
            self.prune(state["step"])
        return final

    def rewind(self, step: int, best: int | None) -> None:
        """Let the checkpoint of `step` be the latest and remove what its save would have removed.

        A run that is resumed from there then leaves what an undisturbed one leaves, whatever a kill
        had kept the run before from doing.

        Args:
            step: of a checkpoint which is here.
            best: the step of the best one, as the state of the latest has it; None: there is none.
        """
        self._point("latest", self.path_of(step))
        if best is not None and self.path_of(best).exists():
            self._point("best", self.path_of(best))
        else:
            self._remove(self.directory / "best")
        self.prune(step)

    def named(self, name: str) -> Path | None:
        """Return the checkpoint that `latest` or `best` names; None where it names none."""
        pointer = self.directory / name
        if pointer.is_symlink():
            target = self.directory / os.readlink(pointer)
            return target if target.exists() else None
        if pointer.is_dir():  # a copy made with links followed
            return self._original(pointer)
        target = followed(pointer)
        return target if target.name.startswith(_PREFIX) else None

    def newest(self) -> Path | None:
        """Return the last checkpoint written here: what `latest` names, else the last step's."""
        if (named := self.named("latest")) is not None:
            return named
        steps = self.steps()
        return self.path_of(steps[-1]) if steps else None

    def prune(self, step: int, spared: int | None = None) -> None:
        """Remove all but the last `keep` up to this step, the best one and step `spared`.

        Checkpoints of later steps belong to another branch of the run.
        """
        best = self.named("best")
        for old in [other for other in self.steps() if other <= step][: -self.keep]:
            if self.path_of(old) != best and old != spared:
                self._remove(self.path_of(old))

    def _original(self, copy: Path) -> Path:
        """Return the checkpoint that a directory in place of a link is a copy of; else itself."""
        try:
            original = self.path_of(int(_read_state(copy / STATE, None)["step"]))
            is_same = (original / STATE).read_bytes() == (copy / STATE).read_bytes()
        except (ValueError, TypeError, KeyError, OSError):
            return copy
        return original if is_same else copy

    def _put_in_place(self, aside: Path, final: Path) -> None:
        self._remove(final)  # left by a run that went further than the checkpoint resumed from
        os.rename(aside, final)

    def _point(self, name: str, target: Path) -> None:
        pointer, aside = self.directory / name, self.directory / f".{name}-{os.getpid()}"
        aside.unlink(missing_ok=True)
        try:
            os.symlink(target.name, aside)
        except OSError as error:
            aside.write_text(f"{target.name}\n")
            if self._has_links:
                self._has_links = False
                logger.warning(
                    "%s: this file system makes no symbolic links (%s): latest and best are text "
                    "files with the name of a checkpoint",
                    self.directory,
                    error.strerror,
                )
        try:
            if pointer.is_dir() and not pointer.is_symlink():
                self._remove(pointer)
            os.replace(aside, pointer)
        finally:
            aside.unlink(missing_ok=True)
        _fsync(self.directory)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint, `latest` or `best`, if it is there."""
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        # Renamed first: a kill in the middle of it must not leave half a checkpoint to be found.
        doomed = self.directory / f".{path.name}-removed-{os.getpid()}"
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _complaint(self, final: Path, error: OSError) -> str:
        newest = self.newest()
        intact = f"; {newest} is the last complete one" if newest else ""
        return f"cannot write the checkpoint {final}: {_reason(error)}{intact}"


def tensors_of(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a state by name."""
    return {name: v for name, v in state.items() if isinstance(v, torch.Tensor)}


def newest_common_step(stores: Iterable[CheckpointStore], limit: int | None = None) -> int | None:
    """Return the newest step, up to `limit`, that has a checkpoint in all stores, if any."""
    common = set.intersection(*(set(store.steps()) for store in stores))
    return max((step for step in common if limit is None or step <= limit), default=None)


def read_checkpoint(path: Path, check: StateCheck | None = None) -> Checkpoint:
    """Read one checkpoint after checking every file against its sha256.

    Args:
        path: its directory.
        check: called with trainer.json's path and content, raises CheckpointError where it is
            inconsistent.

    Raises:
        CheckpointError: naming the file that is missing, incomplete or altered.
    """
    state = _read_state(path / STATE, check)
    for name, digest in state["sha256"].items():
        try:
            actual = sha256_of(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if actual != digest:
            raise CheckpointError(f"{path / name} is corrupted: its checksum does not match")
    try:
        return Checkpoint(path, state["step"], load_tensors(path / TENSORS), state)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def read_newest_intact(path: Path, check: StateCheck | None = None) -> Checkpoint:
    """Read a checkpoint, or the newest intact one before it; log which one was passed over.

    Raises:
        CheckpointError: when neither it nor any before it is intact.
    """
    return _first_intact(path, lambda place: read_checkpoint(place, check), logging.WARNING)


def read_newest_state(path: Path, check: StateCheck | None = None) -> dict[str, Any]:
    """Read the JSON content of a checkpoint, or of the newest before it that has any.

    Raises:
        CheckpointError: when there is none.
    """
    return _first_intact(path, lambda place: _read_state(place / STATE, check), logging.DEBUG)


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
    """Return the checkpoint that `--resume-from` means; None when `latest` finds none yet.

    Args:
        reference: `latest` or `best` of the run, a checkpoint, or a run directory (its latest), or
            a directory that holds a single run, as one of arch slots does.
        run_directory: the run that `latest` and `best` refer to.

    Raises:
        CheckpointError: when there is no such checkpoint.
    """
    if reference in ("latest", "best"):
        if run_directory is None:
            raise CheckpointError(
                f"--resume-from {reference} needs --checkpoint-dir RUN; or give --resume-from RUN"
            )
        store = CheckpointStore(run_directory / "checkpoints", keep=1)
        if reference == "latest":
            inner = [] if store.newest() is not None else runs_in(run_directory)
            return _newest_of(inner[0]) if len(inner) == 1 else store.newest()
        best = store.named("best")
        if best is None:
            raise CheckpointError(f"{store.directory} has no best checkpoint")
        return best
    path = _without_links(Path(reference))
    if path.name.startswith(_PREFIX) or (path / STATE).exists():
        return path
    for directory in (path / "checkpoints", path):
        newest = CheckpointStore(directory, keep=1).newest()
        if newest is not None:
            return newest
    inner = runs_in(path)
    if len(inner) == 1:
        return _newest_of(inner[0])
    names = listed([str(run.relative_to(path)) for run in inner])
    several = f", but holds the runs {names}: name one of them" if inner else ""
    raise CheckpointError(
        f"resume_from: {reference} is no checkpoint and no run that has one{several}"
    )


def _without_links(reference: Path) -> Path:
    """Return the real path; `latest` or `best` of a run becomes the checkpoint that it names."""
    if reference.name in ("latest", "best"):
        named = CheckpointStore(reference.parent, keep=1).named(reference.name)
        reference = reference if named is None else named
    return Path(os.path.realpath(reference))


def _newest_of(run: Path) -> Path | None:
    return CheckpointStore(run / "checkpoints", keep=1).newest()


def runs_in(directory: Path) -> list[Path]:
    """Return the runs with a checkpoint that a directory holds, by name.

    A run of arch slots lies in a directory of its mode, in a sweep within the training's own.
    """
    if not directory.is_dir():
        return []
    return [run for path in sorted(directory.iterdir()) for run in runs_at(path)]


def runs_at(path: Path) -> list[Path]:
    """Return `path` where it is a run with a checkpoint, and those in directories of a mode."""
    places = (path, *(path / name for name in MODE_DIRECTORIES.values()))
    return [place for place in places if has_checkpoint(place)]


def has_checkpoint(run: Path) -> bool:
    """Return whether a directory belongs to a run with a checkpoint; False if it is unreadable."""
    try:
        return _newest_of(run) is not None
    except OSError:
        return False


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
        require(
            int(digits) == state["step"], "step", f"the number in {path.parent.name}", state["step"]
        )
    sums = state.get("sha256")
    known = {"sae.safetensors", "config.json", TENSORS}
    present = {name for name in known if (path.parent / name).exists()}
    is_whole = isinstance(sums, dict) and present | {TENSORS} <= sums.keys() <= known
    require(is_whole, "sha256", f"sums of {', '.join(sorted(known))}", sums)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _flush_directory(directory: Path) -> None:
    """Flush the files, then the names: a rename must never be on the disk before what it names."""
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
