"""Write a model in a format of another library, with rows to prove it by."""

from __future__ import annotations

import difflib
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_fast import interop
from sae_fast.autoencoder import expected_codes
from sae_fast.autoencoder.expected_codes import Agreement
from sae_fast.autoencoder.interchange import to_plain
from sae_fast.autoencoder.model_card import model_card
from sae_fast.interop import DictionaryError
from sae_fast.interop.hook_names import hook_named_by

if TYPE_CHECKING:
    from sae_fast.autoencoder.model import SparseAutoencoder

logger = logging.getLogger(__name__)

OWN = "sae_fast"
_ADDED_TO = "circuit_tracer"  # a directory of several dictionaries


def export(sae: SparseAutoencoder, directory: str | Path, to: str = OWN) -> Agreement:
    """Write a model, read it again, and return how well both agree.

    See `SparseAutoencoder.export`.
    """
    directory = Path(directory)
    names = [OWN, *(known.name for known in interop.FORMATS if known.can_write)]
    if to not in names:
        near = difflib.get_close_matches(to, names[1:], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DictionaryError(f"to must be one of {', '.join(names)}, got {to!r}{hint}")
    if directory.exists() and not directory.is_dir():
        raise DictionaryError(f"{directory}: is a file")
    if to != _ADDED_TO and directory.is_dir() and any(directory.iterdir()):
        raise DictionaryError(f"{directory}: is not empty: name a new directory")
    place, plain = directory, to_plain(sae)
    _warn_of_description(plain.origin)
    if to == OWN:
        sae.save(directory)
    else:
        place = interop.write(plain, directory, to)
    expected_codes.write(plain, place)
    del plain  # which may hold matrices of its own, and the written ones come beside the model's
    written = type(sae).from_pretrained(place)
    agreement = expected_codes.check(to_plain(written), written, place)
    if not agreement.holds:
        raise DictionaryError(f"{place}: what was written differs: {agreement}")
    return agreement


def _warn_of_description(origin: Mapping[str, Any]) -> None:
    """Warn where the hook point has no name that other programs could look for."""
    hook = origin.get("hook")
    if hook and hook_named_by(origin) is None:
        logger.warning(
            "hook %r is no name of a hook point: it is left out where a name is needed", hook
        )


def push_to_hub(
    sae: SparseAutoencoder,
    name: str,
    to: str,
    subfolder: str | None,
    private: bool | None,
    figures: Mapping[str, Any] | None,
) -> str:
    """Write a model and its card, upload both, and return the address of the commit.

    See `SparseAutoencoder.push_to_hub`.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "dictionary"
        export(sae, directory, to)
        card = model_card(sae, "/".join(filter(None, (name, subfolder))), to, figures)
        (directory / "README.md").write_text(card, encoding="utf-8")
        return interop.upload(directory, name, subfolder, private)
