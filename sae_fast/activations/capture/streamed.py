"""Documents of a dataset that is read as a stream: from its beginning, and no further than needed.

Nothing is copied to a disk, and the number of documents is not known before the end. They come in
blocks of SHUFFLED_DOCUMENTS, each in an order that the seed decides, so any place can be read
again: the stream begins anew and passes over what lies before its block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from sae_fast.activations.capture.documents import MAX_DOCUMENTS, Documents, Kind, Numbers

SHUFFLED_DOCUMENTS = 1000
KEPT_BLOCKS = 2


class StreamedDocuments(Documents):
    """Documents in the order in which they are captured, of a stream.

    Args:
        dataset: an IterableDataset of the datasets package.
        columns: with the documents, or the two with the texts of pairs.
        name: of the dataset, for errors.
        shuffle_seed: seed of the order in each block; None keeps the dataset's own order.
        kind: what the documents are.
        explained: a context that turns errors of datasets into a ValueError.
    """

    def __init__(
        self,
        dataset: Any,
        columns: Sequence[str],
        name: str,
        shuffle_seed: int | None,
        kind: Kind,
        explained: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._dataset = dataset.select_columns(list(columns))
        self._iterator: Iterator[dict[str, list[Any]]] | None = None
        self._next = 0  # number of the block that the iterator gives next
        self._blocks: dict[int, list[Any]] = {}
        self._lock = threading.Lock()  # a thread may tokenise ahead
        self._seed = shuffle_seed
        self._explained = explained
        self.name, self.column, self.kind = name, columns[0], kind
        self._columns = tuple(columns)
        if not self._block(0):
            raise ValueError(f"dataset: {name} has no documents")

    def __len__(self) -> int:
        raise TypeError("the number of documents of a stream is not known")

    @property
    def count(self) -> int | None:
        """The number of documents: it is not known."""
        return None

    def read(self, start: int, stop: int) -> tuple[Numbers, list[Any]]:
        """Return numbers in the dataset and documents start..stop of the order.

        There are fewer where the stream ends before.
        """
        numbers: list[int] = []
        documents: list[Any] = []
        for block in range(start // SHUFFLED_DOCUMENTS, -(-stop // SHUFFLED_DOCUMENTS)):
            entries = self._block(block)
            first = block * SHUFFLED_DOCUMENTS
            order = np.arange(len(entries))
            if self._seed is not None:
                order = np.random.default_rng([self._seed, block]).permutation(len(entries))
            chosen = order[max(0, start - first) : stop - first].tolist()
            numbers += [first + place for place in chosen]
            documents += self.converted([entries[place] for place in chosen])
            if len(entries) < SHUFFLED_DOCUMENTS:
                break
        if numbers and max(numbers) >= MAX_DOCUMENTS:
            raise ValueError(f"dataset: {self.name} has more than 2^31 documents")
        return np.array(numbers, np.int64), documents

    def _sampled(self) -> list[Any]:
        return self.converted(self._block(0))

    def _block(self, number: int) -> list[Any]:
        """Return the entries of a block; fewer than SHUFFLED_DOCUMENTS, or none, at the end."""
        with self._lock:
            if number in self._blocks:
                return self._blocks[number]
            with self._explained():
                if self._iterator is None or self._next != number:
                    rest = self._dataset.skip(number * SHUFFLED_DOCUMENTS)
                    self._iterator = iter(rest.iter(batch_size=SHUFFLED_DOCUMENTS))
                batch = next(self._iterator, None)
            found = [] if batch is None else [batch[column] for column in self._columns]
            entries: list[Any] = (
                [*zip(*found, strict=True)] if len(found) > 1 else [*found[0]] if found else []
            )
            self._next = number + 1
            if len(entries) < SHUFFLED_DOCUMENTS:
                self._iterator = None
            while len(self._blocks) >= KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = entries
            return entries
