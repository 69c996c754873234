"""The documents of a dataset, in the order in which they are captured, which a seed decides.

A document is one entry of a column: a text, tokens, or a conversation. Or it is a pair of texts, in
two columns: what an encoder reads, and what its decoder does. Or it is an image, as datasets keeps
it: a dictionary with its bytes, or with the path of its file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FINGERPRINT_DOCUMENTS, FINGERPRINT_CHARACTERS = 1024, 1 << 16
MAX_DOCUMENTS = 2**31  # doc_id is int32

Numbers = npt.NDArray[np.int64]


class Kind(Enum):
    """The kinds of documents, by the names of the settings that ask for them."""

    TEXTS = "text_column"
    TOKENS = "tokens_column"
    CONVERSATIONS = "chat_template"
    PAIRS = "target_column"
    IMAGES = "image_column"


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

    @property
    def count(self) -> int | None:
        """The number of documents; None: a stream does not say."""
        return len(self._entries)

    def read(self, start: int, stop: int) -> tuple[Numbers, list[Any]]:
        """Return numbers in the dataset and documents start..stop of the order.

        A document is a text, tokens [n] int64, a list of messages, or a pair of texts, and empty
        where there is none; or it is an image, and None where there is none.
        """
        places = np.arange(start, min(stop, len(self)))
        numbers = places if self._order is None else self._order[places]
        return numbers, self.converted(self._entries.take(numbers))

    def converted(self, found: list[Any]) -> list[Any]:
        """Return entries of the dataset as the documents that they are."""
        if self.kind is Kind.TOKENS:
            return [np.array(tokens or [], np.int64) for tokens in found]
        if self.kind is Kind.PAIRS:
            return [(source or "", target or "") for source, target in found]
        if self.kind is Kind.IMAGES:
            return found
        nothing: Any = "" if self.kind is Kind.TEXTS else []
        return [document or nothing for document in found]

    def fingerprint(self) -> str:
        """Return a hash of the number of documents and of some of them, evenly spread.

        Of a stream it is a hash of its first documents.
        """
        digest = hashlib.sha256(f"{'stream' if self.count is None else self.count}".encode())
        for document in self._sampled():
            if self.kind is Kind.IMAGES:
                document = content = _first_bytes(document)
            elif isinstance(document, np.ndarray):
                content = document[:FINGERPRINT_CHARACTERS].astype("<i8").tobytes()
            else:
                text = document if isinstance(document, str) else json.dumps(document, default=str)
                content = text[:FINGERPRINT_CHARACTERS].encode(errors="surrogatepass")
            digest.update(len(document).to_bytes(8, "little") + content)
        return f"sha256:{digest.hexdigest()}"

    def _sampled(self) -> list[Any]:
        count = min(len(self), FINGERPRINT_DOCUMENTS)
        return self.converted(self._entries.take(np.arange(count) * len(self) // count))


def _first_bytes(image: Any) -> bytes:
    """Return the first bytes of an image as it is stored, or its address where it is elsewhere."""
    if image is None:
        return b""
    if image.get("bytes") is not None:
        return bytes(image["bytes"][:FINGERPRINT_CHARACTERS])
    path = Path(image["path"])
    if not path.is_file():
        return str(image["path"]).encode()
    with path.open("rb") as file:
        return file.read(FINGERPRINT_CHARACTERS)


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


class PairedColumns(Column):
    """Two columns of a dataset of the datasets package, whose entries are pairs."""

    def __init__(self, dataset: Any, column: str, other: str) -> None:
        super().__init__(dataset, column)
        self._dataset = dataset.select_columns([column, other])
        self._other = other

    def take(self, numbers: Numbers) -> list[Any]:
        """Return the pairs with these numbers; None where there is no text."""
        found = self._dataset[numbers.tolist()]
        return list(zip(found[self._column], found[self._other], strict=True))


@dataclass(frozen=True)
class _Listed(Column):
    """Documents that are in memory."""

    entries: Sequence[Any]
    name: str | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def take(self, numbers: Numbers) -> list[Any]:
        return [self.entries[number] for number in numbers.tolist()]
