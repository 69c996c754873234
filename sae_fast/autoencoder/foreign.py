"""Read dictionaries of other libraries where a saved model is asked for, or say why not."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from sae_fast import interop
from sae_fast.json_files import JSONError, read_json

logger = logging.getLogger(__name__)

_OWN_FILES = ("sae.safetensors", "config.json")
_HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?:/(?P<subfolder>[^@]+))?(?:@(?P<revision>.+))?"
)


def local_place(
    place: str | Path, subfolder: str | None = None, revision: str | None = None
) -> Path:
    """Return a directory or file on this machine, downloaded where `place` names a repository.

    Args:
        place: a directory or file, or owner/name[/subfolder][@revision] on the Hugging Face hub.
        subfolder: below it.
        revision: of a repository, where `place` has none.

    Raises ValueError or OSError, in one line, where it cannot be had.
    """
    if (named := _on_hub(place)) is not None:
        if revision is not None and named["revision"] is not None:
            raise ValueError(f"{place}: the revision is given twice, also as {revision!r}")
        folders = [part for part in (named["subfolder"], subfolder) if part is not None]
        below = "/".join(folders) or None
        return interop.download(named["name"], below, revision or named["revision"])
    if revision is not None:
        raise ValueError(f"{place}: is on this machine, where there is no revision {revision!r}")
    return Path(place) if subfolder is None else Path(place) / subfolder


def foreign_dictionary(place: Path) -> interop.PlainDictionary | None:
    """Read a dictionary of another library; None where the place holds none.

    Raises DictionaryError, in one line, for one that is damaged or has no counterpart here.
    """
    if not place.exists() or place.name in _OWN_FILES:
        return None
    runs = [place / "checkpoints", *place.glob("*/checkpoints")]
    is_run = any(path.is_dir() and not any(path.glob("*.pt")) for path in runs)
    found = interop.find(place, below=not is_run)
    if found is None:
        return None
    known, own_place = found
    dictionary = known.read(own_place)
    for remark in dictionary.remarks:
        logger.warning("%s", remark)
    return dictionary


def looks_like_hub_name(place: str | Path) -> bool:
    """Return whether a place that does not exist may be owner/name… on the Hugging Face hub."""
    return _on_hub(place) is not None


def _on_hub(place: str | Path) -> re.Match[str] | None:
    """Return the parts of a name on the hub; None: it is a place on this machine.

    A path that begins with a folder on this machine is a wrong path, and not looked up.
    """
    named = _HUB_NAME.fullmatch(str(place))
    if named is None or ".." in Path(place).parts or Path(place).exists():
        return None
    is_path = named["revision"] is None and Path(Path(place).parts[0]).is_dir()
    return None if is_path else named


def explain_missing(place: Path) -> Exception:
    """Return the error, in one line, for a place that is not a whole saved model."""
    if not place.exists():
        return FileNotFoundError(f"{place}: no such directory")
    if place.is_file():
        return ValueError(_of_file(place))
    if (place / "checkpoints").is_dir():
        return FileNotFoundError(f"{place}: a run that has no checkpoint yet")
    if steps := sorted(place.glob("step-*")):
        return ValueError(f"{place}: a folder of checkpoints: name one, such as {steps[-1].name}")
    if runs := sorted(path.parent for path in place.glob("*/checkpoints")):
        return ValueError(
            f"{place}: not a saved model but a folder of runs: name one, as {runs[0]}"
        )
    config, tensors = (place / name for name in ("config.json", "sae.safetensors"))
    if config.is_file() and not _is_ours(config):
        return ValueError(
            f"{place}: not a saved model, its config.json is not the one of a model, and no "
            f"dictionary of {_known()}"
        )
    missing = tensors if config.is_file() else config
    return FileNotFoundError(
        f"{place}: not a saved model, it has no {missing.name}, and no dictionary of {_known()}"
    )


def _of_file(place: Path) -> str:
    if place.name in _OWN_FILES:
        return f"{place}: a file of a saved model: name its directory, {place.parent}"
    return f"{place}: a file, and neither a saved model, which is a directory, nor of {_known()}"


def _known() -> str:
    return ", ".join(known.title for known in interop.FORMATS)


def _is_ours(config: Path) -> bool:
    """Return True where a config.json has sections of our own, or cannot be read at all."""
    try:
        content: Any = read_json(config)
    except (JSONError, OSError):
        return True
    known = {"sae", "d_in", "d_sae", "arch", "expansion_factor"}
    return isinstance(content, dict) and bool(known & content.keys())
