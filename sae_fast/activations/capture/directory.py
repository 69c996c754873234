"""The directory of a capture.

    DIR/capture.json        the recipe: what was captured and how
    DIR/progress_RR.json    how far rank RR has come
    DIR/<hook point>/       shard_00000.h5 …, heldout_00.h5 and, at the end, manifest.json

Shards of all hook points end at the same rows, and the progress is written after the last of
them. So after a kill at any moment it says what is whole, and the rest is made again.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sae_fast.activations.capture.sequences import TokenCursor
from sae_fast.activations.errors import one_line
from sae_fast.activations.shard_job import ShardJob
from sae_fast.activations.source import reading_difference
from sae_fast.atomic_files import write_json
from sae_fast.directory_lock import HeldError
from sae_fast.json_files import parse_json, read_regular

RECIPE = "capture.json"
FORMAT_VERSION = 1
HELDOUT, TRAIN = "heldout", "train"


@dataclass(frozen=True)
class CaptureProgress:
    """The progress of a rank.

    Attributes:
        part: the part that it is in, HELDOUT or TRAIN.
        shards: number of whole shards of that part, for each hook point.
        rows: rows in these shards.
        heldout_rows: rows in the held-out shard, once it is whole.
        cursor: of the batch that the next shard begins in; None: the first.
        taken: rows of that batch that are in earlier shards.
        complete: whether there is nothing left to do.
    """

    part: str = HELDOUT
    shards: int = 0
    rows: int = 0
    heldout_rows: int = 0
    cursor: TokenCursor | None = None
    taken: int = 0
    complete: bool = False


class CaptureDirectory:
    """Directory that one capture writes to; entering it fails if another process captures into it.

    Args:
        path: of the directory.
        hooks: names of the hook points.
        rank: of this process.
        world_size: how many processes write to it.
    """

    def __init__(self, path: Path, hooks: tuple[str, ...], rank: int = 0, world_size: int = 1):
        self.path = path
        self.hooks = hooks
        self.rank = rank
        self.world_size = world_size
        self._job = ShardJob(path, RECIPE, f".capture_{rank:02d}.lock", hooks)

    def __enter__(self) -> CaptureDirectory:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: {self.path} is a file")
        try:
            self._job.__enter__()
        except HeldError as error:
            raise ValueError(
                f"out: another capture is writing to {self.path} ({error.holder})"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._job.__exit__()

    def prepare(self, recipe: dict[str, Any], made_with: dict[str, str]) -> None:
        """Begin or continue a capture; raise ValueError where another one is there."""
        earlier = self._recipe()
        if earlier is None:
            if self._job.names():
                raise ValueError(
                    f"out: {self.path} is not empty and holds no capture, name another"
                )
        else:
            difference = _difference(earlier, json.loads(json.dumps(recipe)))
            if difference is not None:
                raise ValueError(f"out: {self.path} holds another capture: {difference}")
        content = {"format_version": FORMAT_VERSION, **recipe, "made_with": made_with}
        self._job.begin(content, (self._heldout_name(), self._shard_name("*")))

    def stored_type(self) -> str | None:
        """Return the storage type of the capture in the directory; None: there is no capture."""
        recipe = self._recipe()
        return None if recipe is None else recipe.get("settings", {}).get("dtype")

    def progress(self, rank: int | None = None) -> CaptureProgress:
        """Return how far a rank has come; raise ValueError if shards that it made are missing."""
        rank = self.rank if rank is None else rank
        path = self._progress_path(rank)
        try:
            content = parse_json(read_regular(path))
            cursor = content.pop("cursor")
            progress = CaptureProgress(
                **content, cursor=None if cursor is None else TokenCursor(**cursor)
            )
        except FileNotFoundError:
            return CaptureProgress()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: not the progress of a capture: {one_line(error)}") from None
        if rank == self.rank:
            self._check_shards(progress)
        return progress

    def save(self, progress: CaptureProgress) -> None:
        """Write how far this rank has come."""
        write_json(self._progress_path(self.rank), asdict(progress))

    @property
    def free_bytes(self) -> int:
        """Bytes that are free on the disk of the directory."""
        return self._job.free_bytes

    def shard_path(self, hook: str, part: str, index: int) -> Path:
        """Return the path of a shard of this rank."""
        name = self._heldout_name() if part == HELDOUT else self._shard_name(f"{index:05d}")
        return self.path / hook / name

    def finish(self) -> bool:
        """Write the manifests if every rank is complete; return whether all are."""
        lock = os.open(self.path / ".capture.lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one of the ranks that end together does it
            if not all(self.progress(rank).complete for rank in range(self.world_size)):
                return False
            if not self._job.is_finished:
                self._job.finish()
            return True
        finally:
            os.close(lock)

    def _recipe(self) -> dict[str, Any] | None:
        path = self._job.record
        try:
            content: dict[str, Any] = self._job.read_record()
            version = content.pop("format_version")
            content.pop("made_with")
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: not the recipe of a capture: {one_line(error)}") from None
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: format version {version}, this release: {FORMAT_VERSION}")
        return content

    def _check_shards(self, progress: CaptureProgress) -> None:
        parts = [(TRAIN, index) for index in range(progress.shards)]
        if progress.heldout_rows:
            parts.append((HELDOUT, 0))
        for hook in self.hooks:
            for part, index in parts:
                path = self.shard_path(hook, part, index)
                if not path.is_file():
                    raise ValueError(
                        f"{path}: missing, but {self._progress_path(self.rank).name} has it; "
                        "put it back, or capture into another directory"
                    )

    def _progress_path(self, rank: int) -> Path:
        return self.path / f"progress_{rank:02d}.json"

    def _heldout_name(self) -> str:
        return f"heldout_{self.rank:02d}.h5"

    def _shard_name(self, index: str) -> str:
        return f"shard_{f'{self.rank:02d}_' if self.world_size > 1 else ''}{index}.h5"


def _difference(there: dict[str, Any], asked: dict[str, Any]) -> str | None:
    """Return the first difference between two recipes in words; None if there is none.

    Models and datasets are compared by their content, not by their paths.
    """
    for section, fields in (
        ("model", ("class", "weights", "tokenizer")),
        ("dataset", ("documents", "fingerprint", "chat")),
    ):
        one, other = there.get(section, {}), asked[section]
        changed = [name for name in fields if one.get(name) != other.get(name)]
        if changed:
            return (
                f"its {section} is {one.get('name')}, asked for is {other['name']} "
                f"(another {' and '.join(changed)}){reading_difference(one, other)}"
            )
    hooks = [sorted(hook["name"] for hook in recipe.get("hooks", ())) for recipe in (there, asked)]
    if hooks[0] != hooks[1]:
        return f"its hook points are {', '.join(hooks[0])}, asked for are {', '.join(hooks[1])}"
    places = [{hook["name"]: _place(hook) for hook in recipe["hooks"]} for recipe in (there, asked)]
    for name, place in places[1].items():
        if places[0][name] != place:
            return f"its {name} is {places[0][name]}, asked for is {place}"
    settings = there.get("settings", {})
    for name, value in asked["settings"].items():
        if settings.get(name) != value:
            return f"its {name} is {settings.get(name)}, asked for is {value}"
    return None


def _place(hook: dict[str, Any]) -> str:
    """Return in words what a hook point of a recipe is."""
    side = "input" if hook.get("is_input", False) else "output"
    scale = hook.get("scale", 1.0)
    times = "" if scale == 1 else f"{scale:g} times "
    columns = hook.get("columns")
    part = "" if columns is None else f"columns {columns[0]} to {columns[1] - 1} of "
    return f"{part}{times}the {side} of {hook['module']}"


def next_part(progress: CaptureProgress) -> CaptureProgress:
    """Return the progress with which the training documents begin, after the held-out ones."""
    return CaptureProgress(part=TRAIN, heldout_rows=progress.rows)


def completed(progress: CaptureProgress) -> CaptureProgress:
    """Return the progress with nothing left to do."""
    return replace(progress, complete=True)
