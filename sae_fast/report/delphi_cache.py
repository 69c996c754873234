"""Codes as delphi caches them, so that it explains latents without any autoencoder.

    OUT/latents/HOOK/FIRST_LAST.safetensors  the latents FIRST to LAST
    OUT/latents/HOOK/config.json             what delphi asks of its own cache

A file has `locations` [nnz, 3]: sequence, place in it, and latent counted from FIRST; `activations`
[nnz] float16; and `tokens` [sequences, length], of all rows. As in delphi, the rows are cut into
sequences of one length in the order they are stored, across documents, the last rows that fill no
sequence are left out, and so are activations of at most 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from sae_fast.atomic_files import replacing, write_json
from sae_fast.evaluation.code_store import CodeStore
from sae_fast.evaluation.text_rows import TOKENS, Integers
from sae_fast.report.page_source import PageSource

CACHE, CONFIG = "latents", "config.json"
LEAST = 1e-5  # activations of at most this magnitude are not in a cache
_LARGEST = 65504.0  # of float16
_FEWEST_FILES = 5  # as delphi has it by default
_ENTRIES_PER_FILE = 1 << 24
_BATCH = 32  # delphi's default, which its loader does not use

Report = Callable[[str, int], object]


def split_bounds(d_sae: int, entries: int) -> list[int]:
    """Return the first latent of each file, and the number of latents at the end."""
    files = max(_FEWEST_FILES, math.ceil(entries / _ENTRIES_PER_FILE))
    files = min(files, d_sae)
    return [d_sae * number // files for number in range(files + 1)]


def write_delphi(
    store: CodeStore,
    d_sae: int,
    entries: int,
    source: PageSource,
    length: int,
    out: Path,
    report: Report = lambda reading, rows: None,
) -> Path:
    """Write the cache into a folder, which is made; return the folder of the hook point.

    The codes of `store` are read once for each file.

    Args:
        store: the codes, of rows with tokens.
        d_sae: number of latents.
        entries: how many entries the codes have.
        source: the place of the dictionary.
        length: tokens of a sequence.
        out: the folder.
        report: takes the name of a reading and rows done since the last.

    Raises ValueError where the rows fill no sequence.
    """
    places = [item.first + store.text.places(item) for item in store.blocks]
    served = np.concatenate([np.zeros(0, np.int64), *places])
    sequences = len(served) // length
    if not sequences:
        raise ValueError(
            f"--sequence-tokens {length} is more than the {len(served):,} rows: delphi's cache has "
            "whole sequences only"
        )
    tokens = store.text.numbers(TOKENS, served[: sequences * length]).reshape(sequences, length)
    folder = out / CACHE / source.folder
    folder.mkdir(parents=True, exist_ok=True)
    bounds = split_bounds(d_sae, entries)
    for first, stop in pairwise(bounds):
        locations, activations = _entries(store, first, stop, length, sequences, report)
        content = {"locations": locations, "activations": activations, "tokens": tokens}
        with replacing(folder / f"{first}_{stop - 1}.safetensors", flush=False) as temporary:
            save_file(content, temporary)
    config = {
        "dataset_repo": source.dataset,
        "dataset_split": "train",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": _BATCH,
        "cache_ctx_len": length,
        "n_tokens": sequences * length,
        "n_splits": len(bounds) - 1,
        "model_name": source.model,
    }
    write_json(folder / CONFIG, config)
    return folder


def _entries(
    store: CodeStore, first: int, stop: int, length: int, sequences: int, report: Report
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float16]]:
    """Return locations and activations of the latents from `first` up to `stop`, by row.

    The locations are uint16 where all of them fit, else uint32.
    """
    small = max(sequences, length, stop - first) <= 1 << 16
    kind = np.uint16 if small else np.uint32
    found = [np.zeros((0, 3), kind)]
    values = [np.zeros(0, np.float16)]
    before = 0  # rows that are served in front of the block
    for item, codes in zip(store.blocks, store, strict=True):
        places = store.text.places(item)
        numbers: Integers = np.zeros(codes.n_rows, np.int64)
        numbers[places] = before + np.arange(len(places))
        part = slice(codes.offsets[first], codes.offsets[stop])
        rows, own = numbers[codes.rows[part]], codes.values[part]
        counts = np.diff(codes.offsets[first : stop + 1])
        latents = np.repeat(np.arange(stop - first), counts)
        kept = np.flatnonzero((np.abs(own) > LEAST) & (rows < sequences * length))
        kept = kept[np.argsort(rows[kept], kind="stable")]
        sequence, place = np.divmod(rows[kept], length)
        found.append(np.stack([sequence, place, latents[kept]], axis=1).astype(kind))
        values.append(np.clip(own[kept], -_LARGEST, _LARGEST).astype(np.float16))
        before += len(places)
        report("delphi", 0)
    return np.concatenate(found), np.concatenate(values)
