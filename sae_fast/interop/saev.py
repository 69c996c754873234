"""saev: one .pt file whose first line is JSON, and whose rest is a state dict.

b_dec is not subtracted and nothing is normalised. ReLU and BatchTopK, by its threshold, are read.
TopK selects without ReLU there, so that codes may be negative, which no code of arch topk here is:
it is refused.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_fast.interop.dictionary import PlainDictionary
from sae_fast.interop.errors import DictionaryError
from sae_fast.interop.format import Format, Settings
from sae_fast.interop.tensor_file import TensorFile, open_tensors
from sae_fast.json_files import JSONError, parse_json

_LONGEST_LINE = 1 << 20
_NEWEST_SCHEMA = 5


class Saev(Format):
    """Dictionaries of OSU's saev, of vision models."""

    name = "saev"
    title = "saev"

    def recognises(self, place: Path) -> bool:
        """Return whether a .pt file begins with a line of JSON."""
        if place.suffix != ".pt" or not place.is_file():
            return False
        with place.open("rb") as file:
            return file.read(1) == b"{"

    def read(self, place: Path) -> PlainDictionary:
        """Read a ReLU or BatchTopK dictionary."""
        with place.open("rb") as file:
            line = file.readline(_LONGEST_LINE)
        try:
            header = parse_json(line)
        except JSONError as error:
            raise DictionaryError(f"{place}: its first line is no JSON: {error}") from None
        if not isinstance(header, dict):
            raise DictionaryError(f"{place}: its first line must be a JSON object")
        top = Settings(place, header)
        schema = top.size("schema")
        if schema is None or schema > _NEWEST_SCHEMA:
            raise DictionaryError(
                f"{place}: schema {header.get('schema')!r} is not read, the ones from 1 to "
                f"{_NEWEST_SCHEMA} are"
            )
        settings = top.section("cfg")
        kind, k = _activation(top, settings)
        with _tensors_behind(place, len(line)) as file:
            shape = file.shape("W_enc")
            if len(shape) != 2:
                raise DictionaryError(f"{place}: W_enc must be a matrix, got {list(shape)}")
            d_in, d_sae = shape
            for name, size in (("d_model", d_in), ("d_sae", d_sae)):
                if settings.size(name) not in (None, size):
                    raise DictionaryError(
                        f"{place}: {name} is {settings.size(name)}, and W_enc has {size}"
                    )
            threshold = None
            if kind == "batch_topk":
                threshold = file.read("activation.threshold", shape=()).clamp_min(0)
            return PlainDictionary(
                kind,
                W_enc=file.read("W_enc", shape=(d_sae, d_in), transposed=True),
                b_enc=file.read("b_enc", shape=(d_sae,)),
                W_dec=file.read("W_dec", shape=(d_sae, d_in)),
                b_dec=file.read("b_dec", shape=(d_in,)),
                threshold=threshold,
                k=k,
                subtract_b_dec=False,
            )


def _activation(top: Settings, settings: Settings) -> tuple[str, int | None]:
    """Return the architecture and k."""
    own = settings.section("activation")
    kind = own.text("cls") or top.text("cls") or ""
    if kind == "Relu":
        return "relu", None
    if kind == "BatchTopK":
        return "batch_topk", own.section("params").needed_size("top_k")
    if kind == "TopK":
        raise DictionaryError(
            f"{top.path}: activation TopK is without ReLU in saev, so that codes may be negative; "
            "ReLU and BatchTopK are read"
        )
    raise DictionaryError(f"{top.path}: activation {kind!r} has no counterpart here")


@contextmanager
def _tensors_behind(place: Path, begin: int) -> Iterator[TensorFile]:
    """Open the tensors that begin at a byte of a file, by way of a copy of that part."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "state.pt"
        with place.open("rb") as source, part.open("wb") as target:
            source.seek(begin)
            shutil.copyfileobj(source, target)
        try:
            with open_tensors(part) as file:
                yield file
        except ValueError as error:
            raise DictionaryError(str(error).replace(str(part), str(place))) from None
