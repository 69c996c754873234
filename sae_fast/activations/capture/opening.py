"""Datasets by name: on the hub, a saved folder, or JSON, text, CSV and Parquet files.

All are opened by the datasets package, which keeps them on disk, or reads them as a stream.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sae_fast.activations.capture.documents import Column, Documents, Kind, PairedColumns
from sae_fast.activations.capture.packages import capture_package
from sae_fast.activations.capture.streamed import StreamedDocuments
from sae_fast.activations.errors import one_line
from sae_fast.config.model_text import DEFAULT_SPLIT

DEFAULT_COLUMN = "text"
CONVERSATION_COLUMNS = ("messages", "conversations")
TEXT_SPLITS = ("line", "paragraph", "document")
STREAMING = AUTO, ALWAYS, NEVER = ("auto", "always", "never")
STREAMED_BYTES = 64 << 20  # of files together, above which they are read as a stream by default
LOOKED_AT = 64  # documents of a stream, for the kinds of its columns

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
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_SAVED = ("state.json", "dataset_dict.json")  # what Dataset.save_to_disk leaves in a folder


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
    target_column: str | None = None,
    image_column: str | None = None,
    streaming: str = NEVER,
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
        target_column: column with the texts that a decoder reads while its encoder reads the ones
            of `text_column`.
        image_column: column of images; default: the only one, where no column holds texts.
        streaming: one of STREAMING: whether documents are read from the beginning on, no further
            than asked for, and shuffled in blocks; auto: those on the hub that are not in the cache
            of datasets, and files of more than STREAMED_BYTES together.

    Raises:
        ValueError: in one line, naming what is missing.
    """
    if text_split not in TEXT_SPLITS:
        raise ValueError(f"text_split must be one of {', '.join(TEXT_SPLITS)}, got {text_split!r}")
    if streaming not in STREAMING:
        raise ValueError(f"streaming must be one of {', '.join(STREAMING)}, got {streaming!r}")
    datasets = capture_package("datasets")
    with _quiet(datasets), _explained(name):
        is_stream = _is_streamed(datasets, name, split, streaming)
        dataset = _open(datasets, name, config, split, text_split, is_stream)
        features = dataset.features
        if features is None:  # of a stream that does not say before it is read
            features = datasets.Dataset.from_list(list(dataset.take(LOOKED_AT))).features
    if tokens_column is not None:
        kind, column = Kind.TOKENS, tokens_column
        _check_tokens_column(features, name, tokens_column)
    elif conversations:
        kind, column = Kind.CONVERSATIONS, _conversation_column(features, name, text_column)
    elif (images := _image_column(features, name, image_column, text_column)) is not None:
        kind, column = Kind.IMAGES, images
        dataset = dataset.cast_column(images, datasets.Image(decode=False))
    else:
        kind, column = Kind.TEXTS, _text_column(features, name, text_column)
    if target_column is not None:
        kind = Kind.PAIRS
        _text_column(features, name, target_column, "target_column")
        if target_column == column:
            raise ValueError(
                f"target_column = {target_column!r} is the column that the encoder reads too: name "
                "another, or give the encoder another with --text-column"
            )
    if is_stream:
        explained = partial(_explained, name)
        columns = [column, *([] if target_column is None else [target_column])]
        return StreamedDocuments(dataset, columns, name, shuffle_seed, kind, explained)
    if target_column is not None:
        return Documents(PairedColumns(dataset, column, target_column), name, shuffle_seed, kind)
    return Documents(Column(dataset, column), name, shuffle_seed, kind)


def _is_streamed(datasets: Any, name: str, split: str, streaming: str) -> bool:
    """Return whether a dataset is read as a stream; raise ValueError where it cannot be."""
    if streaming == NEVER:
        return False
    path = Path(name)
    why = "a part of a split has a length" if "[" in split else None
    if path.is_dir() and any((path / marker).is_file() for marker in _SAVED):
        why = "a saved dataset is read in place"
    if streaming == ALWAYS and why is not None:
        raise ValueError(f"streaming = {ALWAYS!r} does not fit: {why}")
    if streaming == ALWAYS or why is not None:
        return why is None
    if "://" in name:
        system, place = capture_package("fsspec").core.url_to_fs(name)
        return sum(system.size(found) or 0 for found in system.glob(place)) > STREAMED_BYTES
    files = [path] if path.is_file() else [Path(found) for found in glob.glob(name)]
    if path.is_dir():
        files = [found for found in path.rglob("*") if found.is_file()]
    if files:
        return sum(found.stat().st_size for found in files) > STREAMED_BYTES
    if datasets.config.HF_HUB_OFFLINE:
        return False
    # The folder in which datasets keeps one that it has copied.
    *owner, own = name.split("/")
    folder = "___".join([*owner, capture_package("datasets.naming").camelcase_to_snakecase(own)])
    return not (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir()


def _open(
    datasets: Any, name: str, config: str | None, split: str, text_split: str, is_stream: bool
) -> Any:
    how = {"split": split, "streaming": is_stream}
    if "://" in name:
        files = [name] if is_stream else _fetched(datasets, name)
        return _load_files(datasets, name, files, text_split, how)
    path = Path(name)
    if path.is_dir() and any((path / marker).is_file() for marker in _SAVED):
        saved = datasets.load_from_disk(name)
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(f"there is no split {split!r}, only {', '.join(saved)}")
        return saved[split]
    if path.is_dir():
        return datasets.load_dataset(name, config, **how)
    files = sorted(glob.glob(name)) if not path.is_file() else [name]
    if files:
        return _load_files(datasets, name, files, text_split, how)
    if (
        _suffix(name) in (*_LOADERS, *IMAGE_SUFFIXES)
        or name.startswith((".", "/", "~"))
        or glob.has_magic(name)
    ):
        raise ValueError("no such file or folder")
    return datasets.load_dataset(name, config, **how)


def _load_files(
    datasets: Any, name: str, files: list[str], text_split: str, how: dict[str, Any]
) -> Any:
    """Open files of one format, on this machine or with a protocol of fsspec such as s3."""
    suffix = _suffix(name)
    if suffix.lower() in IMAGE_SUFFIXES:
        return datasets.load_dataset("imagefolder", data_files=files, **how, drop_labels=True)
    if suffix not in _LOADERS:
        raise ValueError(
            f"a file must be one of {', '.join(_LOADERS)}, or of images, got {suffix or name}"
        )
    loader, options = _LOADERS[suffix]
    if loader == "text":
        options = {"sample_by": text_split}
    return datasets.load_dataset(loader, data_files=files, **how, **options)


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


def _text_column(features: Any, name: str, wanted: str | None, setting: str = "text_column") -> str:
    """Return the name of the column with the documents."""
    columns: list[str] = [column for column, feature in features.items() if _is_text(feature)]
    there = ", ".join(features)
    if wanted is not None:
        if wanted not in columns:
            near = difflib.get_close_matches(wanted, columns, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            kind = "column" if wanted not in features else "column of texts"
            raise ValueError(f"{setting}: {name} has no {kind} {wanted!r}{hint}; it has {there}")
        return wanted
    if DEFAULT_COLUMN in columns:
        return DEFAULT_COLUMN
    nested = _nested(features)
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


def _image_column(
    features: Any, name: str, wanted: str | None, text_column: str | None
) -> str | None:
    """Return the name of the column with images; None: the documents are texts."""
    columns: list[str] = [column for column, feature in features.items() if _is_image(feature)]
    texts = [column for column, feature in features.items() if _is_text(feature)]
    there = ", ".join(features)
    if wanted is not None:
        if wanted not in columns:
            kind = "column" if wanted not in features else "column of images"
            raise ValueError(f"image_column: {name} has no {kind} {wanted!r}; it has {there}")
        return wanted
    if text_column is not None or texts or not columns:
        return None
    if len(columns) > 1:
        raise ValueError(
            f"image_column: {name} has {len(columns)} columns of images: name one with "
            f"--image-column; it has {there}"
        )
    return columns[0]


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _check_tokens_column(features: Any, name: str, wanted: str) -> None:
    """Raise ValueError unless a column holds lists of tokens."""
    if _nested(features).get(wanted) == "tokens":
        return
    kind = "column" if wanted not in features else "column of tokens"
    there = ", ".join(features)
    raise ValueError(f"tokens_column: {name} has no {kind} {wanted!r}; it has {there}")


def _conversation_column(features: Any, name: str, wanted: str | None) -> str:
    """Return the name of the column with the conversations."""
    columns = [column for column, held in _nested(features).items() if held == "conversations"]
    there = ", ".join(features)
    if wanted is not None:
        if wanted not in columns:
            kind = "column" if wanted not in features else "column of conversations"
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


def _nested(features: Any) -> dict[str, str]:
    """Return what each column of lists holds, by its name."""
    return {
        column: _held_by(feature)
        for column, feature in features.items()
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
        if isinstance(cause, StopIteration):
            raise ValueError(f"dataset: {name} holds no documents") from error
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
