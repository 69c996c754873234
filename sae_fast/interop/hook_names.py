"""Names of hook points as TransformerLens has them, and as a capture has them here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sae_fast.activations.capture.hooks import LENS_NAMES

# Of models with RMSNorm it is before the gain of the norm, and mlp_in is behind it.
_BEFORE_GAIN = ("ln2.hook_normalized",)
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_NAME = re.compile(r"\w[\w.:/-]*")  # what is no name is a description of the hook point


def from_lens(name: str) -> str:
    """Return residual.3 for blocks.3.hook_resid_post and so on; another name as it is."""
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in LENS_NAMES or match[2] in _BEFORE_GAIN:
        return name
    return f"{LENS_NAMES[match[2]]}.{int(match[1])}"


def hook_named_by(origin: Mapping[str, Any]) -> str | None:
    """Return the name of the hook point of an origin; None: it has none, or a description."""
    hook = str(origin.get("hook") or "")
    return hook if _NAME.fullmatch(hook) else None


def layer_of(name: str) -> int | None:
    """Return the number of the block in the name of a hook point; None: it names none."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return None if match is None else int(match[1])


def origin(model: str | None, hook: str | None, **further: Any) -> dict[str, Any]:
    """Return the origin of a dictionary as it is kept here, without what is not known.

    Args:
        model: its name.
        hook: the hook point, by any of its names.
        **further: texts, whole numbers and objects of these; None and empty texts are left out.
    """
    known: dict[str, Any] = {"model": model}
    if hook:
        known["hook"] = from_lens(hook)
        known["layer"] = layer_of(known["hook"])
    known |= further
    return {name: value for name, value in known.items() if value is not None and value != ""}
