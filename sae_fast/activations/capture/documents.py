"""The documents of a dataset: a hub name, a saved folder, or JSON, text, CSV and Parquet files.

All are opened by the datasets package, which keeps them on disk; a document is one entry of one
text column. They are read in an order that a seed decides.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_fast.activations.capture.language_model import capture_package
from sae_fast.activations.errors import one_line
from sae_fast.config.model_text import DEFAULT_SPLIT

DEFAULT_COLUMN = "text"
CONVERSATION_COLUMNS = ("messages", "conversations")
TEXT_SPLITS = ("line", "paragraph", "document")
FINGERPRINT_DOCUMENTS, FINGERPRINT_CHARACTERS = 1024, 1 << 16
MAX_DOCUMENTS = 2**31  # doc_id is int32

_LOADERS = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".txt": ("text", {}),
    ".md": ("text", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_SAVED = ("state.json", "dataset_dict.json")  # what Dataset.save_to_disk leaves in a folder

Numbers = npt.NDArray[np.int64]


class Kind(Enum):
    """The kinds of documents, by the names of the settings that ask for them."""

    TEXTS = "text_column"
    TOKENS = "tokens_column"
    CONVERSATIONS = "chat_template"


class Documents:
    """Documents in the order in which they are captured.

    Args:
        entries: the documents as they stand in the dataset: texts, lists of tokens, or lists of
            messages; None where an entry has none.
        name: of the dataset, for errors.
        shuffle_seed: seed of the order; None keeps the dataset's own order.
        kind: what the documents are.

    Attributes:
        column: the column of the dataset that holds the documents; None: they are in memory.
    """

    def __init__(
        self,
        entries: Sequence[Any] | Column,
        name: str = "documents",
        shuffle_seed: int | None = None,
        kind: Kind = Kind.TEXTS,
    ) -> None:
        if not len(entries):
            raise ValueError(f"dataset: {name} has no documents")
        if len(entries) > MAX_DOCUMENTS:
            raise ValueError(
                f"dataset: {name} has {len(entries):,} documents, at most 2^31 are read"
            )
        self.name = name
        self.kind = kind
        self._entries = entries if isinstance(entries, Column) else _Listed(entries)
        self.column = self._entries.name
        self._order: Numbers | None = None
        if shuffle_seed is not None:
            self._order = np.random.default_rng(shuffle_seed).permutation(len(entries))

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, start: int, stop: int) -> tuple[Numbers, list[Any]]:
        """Return numbers in the dataset and documents start..stop of the order.

        A document is a text, tokens [n] int64, or a list of messages; one that is not there is
        empty.
        """
        places = np.arange(start, min(stop, len(self)))
        numbers = places if self._order is None else self._order[places]
        return numbers, self._documents(numbers)

    def _documents(self, numbers: Numbers) -> list[Any]:
        found = self._entries.take(numbers)
        if self.kind is Kind.TOKENS:
            return [np.array(tokens or [], np.int64) for tokens in found]
        nothing: Any = "" if self.kind is Kind.TEXTS else []
        return [document or nothing for document in found]

    def fingerprint(self) -> str:
        """Return a hash of the number of documents and of some of them, evenly spread."""
        count = min(len(self), FINGERPRINT_DOCUMENTS)
        digest = hashlib.sha256(f"{len(self)}".encode())
        for document in self._documents(np.arange(count) * len(self) // count):
            if isinstance(document, np.ndarray):
                content = document[:FINGERPRINT_CHARACTERS].astype("<i8").tobytes()
            else:
                text = document if isinstance(document, str) else json.dumps(document, default=str)
                content = text[:FINGERPRINT_CHARACTERS].encode(errors="surrogatepass")
            digest.update(len(document).to_bytes(8, "little") + content)
        return f"sha256:{digest.hexdigest()}"


class Column:
    """One column of a dataset of the datasets package."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.name: str | None = column
        self._dataset = dataset.select_columns([column])
        self._column = column

    def __len__(self) -> int:
        return len(self._dataset)

    def take(self, numbers: Numbers) -> list[Any]:
        """Return the entries with these numbers; None where there is nothing."""
        entries: list[Any] = self._dataset[numbers.tolist()][self._column]
        return entries


@dataclass(frozen=True)
class _Listed(Column):
    """Documents that are in memory."""

    entries: Sequence[Any]
    name: str | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def take(self, numbers: Numbers) -> list[Any]:
        return [self.entries[number] for number in numbers.tolist()]


def load_documents(
    name: str,
    *,
    config: str | None = None,
    split: str = DEFAULT_SPLIT,
    text_column: str | None = None,
    text_split: str = TEXT_SPLITS[0],
    shuffle_seed: int | None = None,
    tokens_column: str | None = None,
    conversations: bool = False,
) -> Documents:
    """Open a dataset.

    Args:
        name: of the dataset on the hub, or a folder, a file or a pattern of files, which may lie
            elsewhere, with a protocol of fsspec: s3://bucket/texts-*.jsonl.
        config: configuration of a dataset on the hub that has several.
        split: which part of the dataset.
        text_column: default: text, or else the only column with texts, unless another column
            holds lists, such as the turns of a conversation or tokens, which may be the documents.
        text_split: what a document of a .txt file is, one of TEXT_SPLITS.
        shuffle_seed: seed of the order; None keeps the dataset's own order.
        tokens_column: column with documents that are tokens, in place of `text_column`.
        conversations: whether the documents are lists of messages, in `text_column`; default:
            messages or conversations, or the only column with conversations.

    Raises:
        ValueError: in one line, naming what is missing.
    """
    if text_split not in TEXT_SPLITS:
        raise ValueError(f"text_split must be one of {', '.join(TEXT_SPLITS)}, got {text_split!r}")
    datasets = capture_package("datasets")
    with _quiet(datasets), _explained(name):
        dataset = _open(datasets, name, config, split, text_split)
    if tokens_column is not None:
        kind, column = Kind.TOKENS, tokens_column
        _check_tokens_column(dataset, name, tokens_column)
    elif conversations:
        kind, column = Kind.CONVERSATIONS, _conversation_column(dataset, name, text_column)
    else:
        kind, column = Kind.TEXTS, _text_column(dataset, name, text_column)
    return Documents(Column(dataset, column), name, shuffle_seed, kind)


def _open(datasets: Any, name: str, config: str | None, split: str, text_split: str) -> Any:
    if "://" in name:
        return _load_files(datasets, name, _fetched(datasets, name), split, text_split)
    path = Path(name)
    if path.is_dir() and any((path / marker).is_file() for marker in _SAVED):
        saved = datasets.load_from_disk(name)
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(f"there is no split {split!r}, only {', '.join(saved)}")
        return saved[split]
    if path.is_dir():
        return datasets.load_dataset(name, config, split=split)
    files = sorted(glob.glob(name)) if not path.is_file() else [name]
    if files:
        return _load_files(datasets, name, files, split, text_split)
    if _suffix(name) in _LOADERS or name.startswith((".", "/", "~")) or glob.has_magic(name):
        raise ValueError("no such file or folder")
    return datasets.load_dataset(name, config, split=split)


def _load_files(datasets: Any, name: str, files: list[str], split: str, text_split: str) -> Any:
    """Open files of one format, on this machine or with a protocol of fsspec such as s3."""
    suffix = _suffix(name)
    if suffix not in _LOADERS:
        raise ValueError(f"a file must be one of {', '.join(_LOADERS)}, got {suffix or name}")
    loader, options = _LOADERS[suffix]
    if loader == "text":
        options = {"sample_by": text_split}
    return datasets.load_dataset(loader, data_files=files, split=split, **options)


def _fetched(datasets: Any, name: str) -> list[str]:
    """Copy files of a protocol of fsspec into the cache of datasets; return where they are.

    Files that were copied before and have not changed since are not copied again.
    """
    folder = hashlib.sha256(name.encode()).hexdigest()[:32]
    place = Path(datasets.config.HF_DATASETS_CACHE) / "fetched" / folder
    kept = {"cache_storage": str(place), "same_names": True, "check_files": True}
    found = capture_package("fsspec").open_local(f"filecache::{name}", filecache=kept)
    files = [found] if isinstance(found, str) else sorted(found)
    if not files:
        raise ValueError("no such file")
    if len(set(files)) < len(files):
        raise ValueError("two of its files have the same name: name the folders one by one")
    return files


def _suffix(name: str) -> str:
    """Return the suffix of a file or pattern, leaving out the suffix of a compression."""
    suffixes = [suffix for suffix in Path(name).suffixes if suffix not in _COMPRESSED]
    return suffixes[-1] if suffixes else ""


def _text_column(dataset: Any, name: str, wanted: str | None) -> str:
    """Return the name of the column with the documents."""
    columns: list[str] = [
        column
        for column, feature in dataset.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    there = ", ".join(dataset.column_names)
    if wanted is not None:
        if wanted not in columns:
            near = difflib.get_close_matches(wanted, columns, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            kind = "column" if wanted not in dataset.column_names else "column of texts"
            raise ValueError(f"text_column: {name} has no {kind} {wanted!r}{hint}; it has {there}")
        return wanted
    if DEFAULT_COLUMN in columns:
        return DEFAULT_COLUMN
    nested = _nested(dataset)
    if nested:
        column, what = next(iter(nested.items()))
        raise ValueError(
            f"text_column: {name} has no column {DEFAULT_COLUMN!r}, and {column!r} holds {what}: "
            f"make a column of texts of it ({_REMEDIES[what]}), or name another with "
            f"--text-column; it has {there}"
        )
    if len(columns) == 1:
        return columns[0]
    raise ValueError(
        f"text_column: {name} has {len(columns) or 'no'} columns of texts, none of them "
        f"{DEFAULT_COLUMN!r}: name one with --text-column; it has {there}"
    )


def _check_tokens_column(dataset: Any, name: str, wanted: str) -> None:
    """Raise ValueError unless a column holds lists of tokens."""
    if _nested(dataset).get(wanted) == "tokens":
        return
    kind = "column" if wanted not in dataset.column_names else "column of tokens"
    there = ", ".join(dataset.column_names)
    raise ValueError(f"tokens_column: {name} has no {kind} {wanted!r}; it has {there}")


def _conversation_column(dataset: Any, name: str, wanted: str | None) -> str:
    """Return the name of the column with the conversations."""
    columns = [column for column, held in _nested(dataset).items() if held == "conversations"]
    there = ", ".join(dataset.column_names)
    if wanted is not None:
        if wanted not in columns:
            kind = "column" if wanted not in dataset.column_names else "column of conversations"
            raise ValueError(f"text_column: {name} has no {kind} {wanted!r}; it has {there}")
        return wanted
    usual = [column for column in CONVERSATION_COLUMNS if column in columns]
    if not usual and len(columns) != 1:
        raise ValueError(
            f"chat_template: {name} has {len(columns) or 'no'} columns of conversations (lists of "
            "messages with role and content), none of them messages or conversations: "
            f"{'name one with --text-column; ' if columns else ''}it has {there}"
        )
    return (usual or columns)[0]


_REMEDIES = {
    "tokens": "tokenizer.decode, or name it with --tokens-column",
    "conversations": "tokenizer.apply_chat_template with tokenize=False, or give --chat-template",
    "lists": "join them",
}


def _nested(dataset: Any) -> dict[str, str]:
    """Return what each column of lists holds, by its name."""
    return {
        column: _held_by(feature)
        for column, feature in dataset.features.items()
        if hasattr(feature, "feature") or isinstance(feature, list)
    }


def _held_by(feature: Any) -> str:
    """Return what a column of lists most likely holds: a key of _REMEDIES."""
    inner = feature[0] if isinstance(feature, list) else feature.feature
    if isinstance(inner, dict):
        return "conversations"
    return "tokens" if str(getattr(inner, "dtype", "")).startswith(("int", "uint")) else "lists"


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn any error of datasets while it opens one into a ValueError of one line with its name."""
    try:
        yield
    except Exception as error:  # it wraps anything: parsers' errors, the network's, its own
        cause = error.__cause__ or error
        names = re.search(r"available configs: \[(.*?)\]", str(cause), re.DOTALL)
        if names is not None:
            raise ValueError(
                f"dataset: {name} has several configurations, {names[1].replace(chr(39), '')}: "
                "name one with --dataset-config"
            ) from error
        text = str(cause).strip().partition("\n")[0] or one_line(cause)
        raise ValueError(f"dataset: {name} cannot be read: {text}") from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Turn the progress bars of datasets off while it opens files."""
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
