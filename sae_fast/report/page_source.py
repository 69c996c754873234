"""`PageSource`: what other programs want to know about a dictionary besides its pages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_fast.activations.capture.hooks import transformer_lens_name

_IN_BLOCK = re.compile(r"^blocks\.\d+\.[\w.]+$")
_FOLDER = re.compile(r"^\w[\w.:-]*$")


@dataclass(frozen=True)
class PageSource:
    """The place of a dictionary, and the names under which its pages are published.

    Attributes:
        model: the model, as the shards name it.
        layer: the number of the block.
        hook: the hook point, as the shards name it.
        dataset: the texts.
        set_name: of dictionaries that belong together, one a layer.
        release: of sets that are published together.
        creator: who publishes them.
        created: the time, as ISO 8601 has it.
    """

    model: str
    layer: int
    hook: str
    dataset: str
    set_name: str
    release: str
    creator: str
    created: str

    @property
    def model_id(self) -> str:
        """The last part of the model's name."""
        return as_name(self.model.rstrip("/").rpartition("/")[2])

    @property
    def source_id(self) -> str:
        """The name of this dictionary in its set."""
        return f"{self.layer}-{self.set_name}"

    @property
    def hook_name(self) -> str | None:
        """The hook point as TransformerLens names it; None where it has no name there."""
        name = transformer_lens_name(self.hook)
        return name if _IN_BLOCK.match(name) else None

    @property
    def folder(self) -> str:
        """The hook point as the name of a folder."""
        return self.hook if _FOLDER.match(self.hook) else f"layer_{self.layer}"


def as_name(text: str) -> str:
    """Return a text as a name of letters, digits, dots, underscores and hyphens."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "unnamed"


def page_source(
    origins: tuple[Mapping[str, Any], ...], set_name: str, release: str, creator: str, created: str
) -> PageSource:
    """Return the source that origins describe, of which the first ones come first.

    Raises ValueError where none of them says model, hook point or layer, or the set has a name that
    is no name of a folder.
    """
    if set_name != as_name(set_name):
        raise ValueError(
            f"set_name must be of letters, digits, dots, underscores and hyphens, got {set_name!r}"
        )
    found: dict[str, Any] = {}
    for origin in reversed(origins):
        found |= {name: value for name, value in origin.items() if value is not None}
    for name in ("model", "hook", "layer"):
        if name not in found:
            raise ValueError(
                f"--write: other programs file pages by model and layer, and neither the "
                f"autoencoder nor the shards say their {name}"
            )
    return PageSource(
        str(found["model"]),
        int(found["layer"]),
        str(found["hook"]),
        str(found.get("dataset", "")),
        set_name,
        release,
        creator,
        created,
    )
