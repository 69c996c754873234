"""Write the pages of latents as a folder that a browser opens from the disk, without a server.

    OUT/index.html, viewer.js, viewer.css, start.js  the same for every dictionary
    OUT/data/meta.js, vocabulary.js, table.js         sizes, texts of tokens, all latents
    OUT/data/latents_00000.js …                       the pages of CHUNK latents each

The data of a training that goes on are in a folder for each step in place of data, and OUT/live.js
tells an open page the newest step.

A page that is opened from the disk may load scripts, but no other files, so the data are scripts
that call a function with arrays in base64. Texts are JSON without `<`, and the viewer puts them
into text nodes only: a token that looks like markup is shown as it is.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_fast.atomic_files import replacing
from sae_fast.evaluation.contexts import TOP
from sae_fast.evaluation.latents import LatentPages
from sae_fast.evaluation.logits import LogitEffects
from sae_fast.evaluation.text_rows import DOCUMENT, POSITION, TOKENS, TextRows
from sae_fast.evaluation.token_texts import TokenTexts
from sae_fast.evaluation.top_entries import place_in_run

CHUNK = 64  # latents whose pages are in one file
PEAKS = 5  # tokens of the largest contexts that the table shows
NO_TOKEN = -1
DATA = "data"
INDEX = "index.html"
_OWN_FILES = (
    "viewer.js",
    "viewer.css",
    "start.js",
    INDEX,
)  # the index last: the rest is there then

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Viewer:
    """The pages of one dictionary, ready to be written.

    Attributes:
        pages: the numbers.
        text: the rows that they are of.
        title, subtitle: the lines at the top.
        intervals: of activations, from which samples are drawn.
        logits: tokens that latents raise and lower; None: not known.
        tokens: texts of tokens; None: their numbers are shown.
        step: of a training that goes on; None: the model is trained.
    """

    pages: LatentPages
    text: TextRows
    title: str
    subtitle: str
    intervals: int
    logits: LogitEffects | None = None
    tokens: TokenTexts | None = None
    step: int | None = None

    def write(self, out: Path) -> None:
        """Write all files into a folder, which is made; each appears when it is whole."""
        name = DATA if self.step is None else live_folder(f"{self.step:09d}")
        data = out / name
        data.mkdir(parents=True, exist_ok=True)
        used = _UsedTokens()
        for number in range(-(-self.pages.d_sae // CHUNK)):
            arrays = self._chunk(range(number * CHUNK, min((number + 1) * CHUNK, self.pages.d_sae)))
            _write_call(data / f"latents_{number:05d}.js", "chunk", str(number), _encoded(arrays))
            used.add(arrays["tokens"])
        if self.logits is not None:
            used.add(self.logits.promoted)
            used.add(self.logits.suppressed)
        _write_call(data / "vocabulary.js", "vocabulary", _json(self._vocabulary(used.numbers())))
        _write_call(data / "table.js", "table", _encoded(self._table()))
        _write_call(data / "meta.js", "meta", _json(self._meta()))
        folder = files("sae_fast.report") / "viewer"
        for own in _OWN_FILES:
            text = (folder / own).read_text("utf-8")
            if own == INDEX:
                text = text.replace(f'"{DATA}/', f'"{name}/')
                text = text.replace(f'data-folder="{DATA}"', f'data-folder="{name}"')
            with replacing(out / own, flush=False) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _meta(self) -> dict[str, Any]:
        pages = self.pages
        return {
            "title": self.title,
            "subtitle": self.subtitle,
            "latents": pages.d_sae,
            "rows": pages.rows,
            "chunk": CHUNK,
            "peaks": PEAKS,
            "bins": pages.histogram.shape[1],
            "intervals": self.intervals,
            "neighbours": pages.decoder_latents.shape[1],
            "logits": 0 if self.logits is None else self.logits.promoted.shape[1],
            "step": self.step,
        }

    def _vocabulary(self, used: Array) -> dict[str, Any] | None:
        if self.tokens is None:
            return None
        ids = used.tolist()
        return {"ids": ids, "texts": self.tokens.of(ids)}

    def _table(self) -> dict[str, Array]:
        pages = self.pages
        return {
            "fired": pages.fired.astype(np.float64),
            "largest": pages.largest,
            "mean": pages.mean.astype(np.float32),
            "cosine": _first_column(pages.decoder_cosines),
            "phi": _first_column(pages.cofiring_phi),
            "peaks": self._peak_tokens().astype(np.int32),
        }

    def _peak_tokens(self) -> Array:
        """Return the first different tokens at the peaks of each latent, [F, PEAKS]."""
        contexts = self.pages.contexts
        tokens = self.text.numbers(TOKENS, contexts.rows)
        found = np.full((self.pages.d_sae, PEAKS), NO_TOKEN)
        is_top = contexts.intervals == TOP
        latents, tokens = contexts.latents[is_top], tokens[is_top]
        by_token = np.lexsort((tokens, latents))  # stable: of equal tokens the first comes first
        is_first = np.ones(len(tokens), bool)
        is_first[by_token[1:]] = (latents[by_token[1:]] != latents[by_token[:-1]]) | (
            tokens[by_token[1:]] != tokens[by_token[:-1]]
        )
        latents, tokens = latents[is_first], tokens[is_first]
        places = place_in_run(latents)
        shown = places < PEAKS
        found[latents[shown], places[shown]] = tokens[shown]
        return found

    def _chunk(self, latents: range) -> dict[str, Array]:
        pages, contexts = self.pages, self.pages.contexts
        first, stop = np.searchsorted(contexts.latents, (latents.start, latents.stop))
        part = slice(int(first), int(stop))
        rows, begins, ends = contexts.rows[part], contexts.begins[part], contexts.ends[part]
        entries = slice(int(contexts.offsets[first]), int(contexts.offsets[stop]))
        lengths = ends - begins
        token_offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(token_offsets[-1]) - np.repeat(token_offsets[:-1], lengths)
        own = slice(latents.start, latents.stop)
        arrays: dict[str, Array] = {
            "pieces": np.searchsorted(
                contexts.latents[part], np.arange(latents.start, latents.stop + 1)
            ),
            "interval": contexts.intervals[part],
            "peak": rows - begins,
            "row": rows.astype(np.float64),
            "document": self.text.numbers(DOCUMENT, rows).astype(np.float64),
            "position": self.text.numbers(POSITION, rows).astype(np.float64),
            "token_offsets": token_offsets,
            "tokens": self.text.numbers(TOKENS, np.repeat(begins, lengths) + places),
            "entry_offsets": contexts.offsets[int(first) : int(stop) + 1] - entries.start,
            "places": contexts.places[entries],
            "values": contexts.values[entries],
            "histogram": pages.histogram[own],
            "decoder_latents": pages.decoder_latents[own],
            "decoder_cosines": pages.decoder_cosines[own],
            "cofiring_latents": pages.cofiring_latents[own],
            "cofiring_phi": pages.cofiring_phi[own],
            "cofiring_counts": pages.cofiring_counts[own],
        }
        if self.logits is not None:
            arrays |= {name: array[own] for name, array in vars(self.logits).items()}
        return arrays


def live_folder(step: str) -> str:
    """Return the name of the folder with the data of a step, which is nine digits, or a pattern."""
    return f"{DATA}_{step}"


def write_live(out: Path, step: int) -> None:
    """Tell open pages the newest step; its data are complete."""
    _write_call(out / "live.js", "live", str(step))


class _UsedTokens:
    """The set of tokens that are shown; negative numbers are no tokens."""

    def __init__(self) -> None:
        self._is_used = np.zeros(0, bool)

    def add(self, tokens: Array) -> None:
        """Add tokens, which may be repeated."""
        size = int(tokens.max(initial=NO_TOKEN)) + 1
        if size > len(self._is_used):
            self._is_used = np.append(self._is_used, np.zeros(size - len(self._is_used), bool))
        self._is_used[tokens[tokens >= 0]] = True

    def numbers(self) -> Array:
        """Return the tokens, ascending."""
        return np.flatnonzero(self._is_used)


def _first_column(array: Array) -> Array:
    return array[:, 0] if array.shape[1] else np.zeros(len(array), array.dtype)


def _encoded(arrays: Mapping[str, Array]) -> str:
    """Return arrays as JSON: type and base64 of their bytes, whole numbers as int32."""
    parts = []
    for name, array in arrays.items():
        kind = np.dtype(np.int32) if array.dtype.kind in "iu" else array.dtype
        flat = np.ascontiguousarray(array, kind.newbyteorder("<"))
        text = base64.b64encode(flat.data.cast("B") if flat.size else b"").decode("ascii")
        parts.append(f'"{name}": ["{kind.name}", "{text}"]')
    return f"{{{', '.join(parts)}}}"


def _json(value: Any) -> str:
    """Return JSON without `<`, which could end a script."""
    return json.dumps(value).replace("<", "\\u003c")


def _write_call(path: Path, function: str, *arguments: str) -> None:
    """Write a script that calls a function of the viewer with arguments in JSON."""
    with replacing(path, flush=False) as temporary:
        temporary.write_text(f"saeFast.{function}({', '.join(arguments)});\n", encoding="ascii")
