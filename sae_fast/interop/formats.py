"""All formats, and finding out which one a directory or file is of."""

from __future__ import annotations

from pathlib import Path

from sae_fast.activations.errors import listed
from sae_fast.interop.circuit_tracer import CircuitTracer
from sae_fast.interop.dictionary import PlainDictionary
from sae_fast.interop.dictionary_learning import DictionaryLearning
from sae_fast.interop.errors import DictionaryError
from sae_fast.interop.format import Format, refuse
from sae_fast.interop.gemma_scope import GemmaScope, GemmaScope2
from sae_fast.interop.openai import OpenAI
from sae_fast.interop.openmoss import LlamaScope, LlamaScopeR1, Llamascopium
from sae_fast.interop.releases import Goodfire, QResearch, QwenScope
from sae_fast.interop.saelens import SAELens
from sae_fast.interop.saev import Saev
from sae_fast.interop.sparsify import Sparsify

# In the order in which they are tried: the first that recognises a place reads it. A file of two
# plain layers may be qresearch's or an AutoEncoderNew of dictionary_learning: the same function.
FORMATS: tuple[Format, ...] = (
    SAELens(),
    Sparsify(),
    CircuitTracer(),
    GemmaScope(),
    GemmaScope2(),
    LlamaScope(),
    LlamaScopeR1(),
    Llamascopium(),
    Saev(),  # before all that open .pt files, which cannot open these
    QwenScope(),
    Goodfire(),
    OpenAI(),
    QResearch(),
    DictionaryLearning(),
)
_DEEPEST = 3  # folders below a directory in which dictionaries are looked for
_MOST = 2000  # files and folders looked at


def recognise(place: str | Path) -> Format | None:
    """Return the format of a directory or file; None: it is of none that is known.

    Raises DictionaryError where a file that tells the format is damaged.
    """
    place = Path(place)
    return next((known for known in FORMATS if known.recognises(place)), None)


def find(place: str | Path, *, below: bool = True) -> tuple[Format, Path] | None:
    """Return the format and the place of the dictionary at a place; None: there is none.

    Args:
        place: a directory or file.
        below: whether a directory may also stand for the only dictionary below it.

    Raises DictionaryError for a directory with several dictionaries, or a damaged file.
    """
    place = Path(place)
    if (known := recognise(place)) is not None:
        return known, place
    found = dictionaries_in(place) if below and place.is_dir() else []
    if len(found) > 1:
        several = listed([str(path.relative_to(place)) for path in found], 4)
        raise DictionaryError(f"{place}: holds dictionaries below it: name one of {several}")
    return find(found[0], below=False) if found else None


def read(place: str | Path) -> PlainDictionary:
    """Read a dictionary of another library, whose format is told by its files.

    Raises DictionaryError, in one line, for a place of no format, of several dictionaries, with
    damaged files, or with a dictionary that has no counterpart here.
    """
    found = find(place)
    if found is None:
        raise DictionaryError(f"{place}: is of no format that is read here")
    known, own_place = found
    return known.read(own_place)


def dictionaries_in(directory: Path) -> list[Path]:
    """Return the places below a directory that hold dictionaries, sorted; of many the first."""
    found: list[Path] = []
    left, seen = [(directory, 0)], 0
    while left and seen < _MOST:
        folder, depth = left.pop(0)
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            seen += 1
            if path.is_symlink() and path.is_dir():
                continue
            try:
                is_one = recognise(path) is not None
            except ValueError:  # a damaged file, of whatever it may be
                is_one = False
            if is_one:
                found.append(path)
            elif path.is_dir() and depth + 1 < _DEEPEST:
                left.append((path, depth + 1))
    return found


def write(dictionary: PlainDictionary, directory: str | Path, to: str) -> Path:
    """Write a dictionary for another library; return its directory, or its file in one of several.

    Args:
        dictionary: what is written.
        directory: where, made if need be.
        to: the format, by its name.

    Raises DictionaryError, in one line, for a format that is not written or cannot express it.
    """
    writers = {known.name: known for known in FORMATS if known.can_write}
    if to not in writers:
        raise DictionaryError(f"to must be one of {', '.join(writers)}, got {to!r}")
    if dictionary.token_norm is not None and not writers[to].writes_token_norm:
        what = f"normalize_activations {dictionary.token_norm}"
        raise refuse(writers[to], what, "it takes activations as they are; saelens has it")
    return writers[to].write(dictionary, Path(directory))
