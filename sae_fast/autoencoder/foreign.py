"""Explain why a directory is no saved model: another library's layout, or a file missing.

Layouts are told by the names of their files, and no content is read but for a key or two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_fast.json_files import JSONError, read_json

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class _Layout:
    """The layout of another library's files, and the call that reads them.

    Attributes:
        files: names that must all be there; a * stands for anything.
        name: of the library or release.
        reader: the call that reads it.
    """

    files: tuple[str, ...]
    name: str
    reader: str


_LAYOUTS = (
    _Layout(("cfg.json", "sae_weights.safetensors"), "SAELens", "sae_lens.SAE.load_from_disk"),
    _Layout(("params.npz",), "Gemma Scope", "sae_lens.SAE.from_pretrained"),
    _Layout(("config.json", "ae.pt"), "dictionary_learning", "dictionary_learning.load_dictionary"),
    _Layout(("ae.pt",), "dictionary_learning", "dictionary_learning.AutoEncoder.from_pretrained"),
    _Layout(("cfg.json", "sae.safetensors"), "sparsify", "sparsify.SparseCoder.load_from_disk"),
    _Layout(("*/cfg.json", "*/sae.safetensors"), "sparsify", "sparsify.SparseCoder.load_many"),
    _Layout(
        ("autoencoder.pt",),
        "OpenAI sparse_autoencoder",
        "sparse_autoencoder.Autoencoder.from_state_dict",
    ),
)
_OPENAI_NAMES = re.compile(r"(autoencoder|\d+)\.pt")


def explain_missing(place: Path) -> Exception:
    """Return the error, in one line, for a place that is not a whole saved model."""
    if not place.exists():
        return FileNotFoundError(_of_nothing(place))
    if place.is_file():
        return ValueError(_of_file(place))
    layout = _layout(place)
    if layout is not None:
        return ValueError(f"{place}: {_is_foreign(layout)}")
    if (place / "checkpoints").is_dir():
        return FileNotFoundError(f"{place}: a run that has no checkpoint yet")
    if runs := sorted(path.parent for path in place.glob("*/checkpoints")):
        return ValueError(
            f"{place}: not a saved model but a folder of runs: name one, as {runs[0]}"
        )
    config, tensors = (place / name for name in ("config.json", "sae.safetensors"))
    if config.is_file() and not _is_ours(config):
        return ValueError(f"{place}: not a saved model, its config.json is not that of one")
    missing = tensors if config.is_file() else config
    return FileNotFoundError(f"{place}: not a saved model, it has no {missing.name}")


def _of_nothing(place: Path) -> str:
    if _HUB_NAME.fullmatch(str(place)):
        return (
            f"{place}: no such directory; a name on the Hugging Face hub is not read, "
            f"download it first: hf download {place} --local-dir DIR"
        )
    return f"{place}: no such directory"


def _of_file(place: Path) -> str:
    if place.name in ("sae.safetensors", "config.json"):
        return f"{place}: a file of a saved model: name its directory, {place.parent}"
    for layout in _LAYOUTS:
        if place.name in layout.files and place.name != "cfg.json":
            return f"{place}: {_is_foreign(layout)}"
    if _OPENAI_NAMES.fullmatch(place.name):
        return f"{place}: {_is_foreign(_LAYOUTS[-1])}"
    return f"{place}: a file, and a saved model is a directory"


def _layout(place: Path) -> _Layout | None:
    for layout in _LAYOUTS:
        if all(any(place.glob(name)) for name in layout.files):
            return layout
    if any(_OPENAI_NAMES.fullmatch(path.name) for path in place.iterdir()):
        return _LAYOUTS[-1]
    return None


def _is_foreign(layout: _Layout) -> str:
    return (
        f"a dictionary of {layout.name}, which is not read here yet; {layout.reader} reads it there"
    )


def _is_ours(config: Path) -> bool:
    """Return True where a config.json has sections of our own, or cannot be read at all."""
    try:
        content: Any = read_json(config)
    except (JSONError, OSError):
        return True
    known = {"sae", "d_in", "d_sae", "arch", "expansion_factor"}
    return isinstance(content, dict) and bool(known & content.keys())
