"""Sequences of tokens, as a model reads them, in batches; any batch can be the first again.

Packed: documents one after another, in rows of ctx_len. A document that does not end in its row
continues in the next. Each begins with the token that begins texts (BOS); where the tokenizer has
none, it ends with the one that ends them (EOS). A token sees the documents before its own in the
row, as in pretraining.

Not packed: one document a row, padded to the longest of its batch; a longer one makes several rows,
each with the special tokens round it. Rows of like length make a batch, within a window of batches,
and the batches of a window come in a random order.

Every token has the number of its document in the dataset and its position there: 0 is the special
token in front, or the first token where there is none. Positions count on over the rows of a
document.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_fast.activations.capture.conversations import EncodedDocument
from sae_fast.activations.capture.documents import MAX_DOCUMENTS, Documents
from sae_fast.activations.capture.probe import Source
from sae_fast.activations.capture.tokens import SpecialTokens, Tokenisation
from sae_fast.activations.source import saved_counts

# Batches over which rows of similar length are put together. Of documentation strings in
# batches of 32, padding takes 82 % of the places with 1, 26 % with 16, 9 % with 64, 6 % with 128.
WINDOW = 64

Integers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class SequenceConfig:
    """Settings by which documents become sequences.

    Attributes:
        ctx_len: tokens of a row, at most.
        batch_size: rows of a batch.
        pack: whether documents follow one another in a row.
        exclude_special_tokens: BOS, EOS, [CLS], [SEP] and the like are read by the model, not kept.
    """

    ctx_len: int
    batch_size: int
    pack: bool
    exclude_special_tokens: bool = False

    def __post_init__(self) -> None:
        for name in ("ctx_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class TokenCursor:
    """The place where a batch begins.

    Attributes:
        document: place in the order of the documents.
        offset: how many of its tokens are in earlier rows.
        skip: batches of the window that begins there which come before.
        batch: number of the batch.
        rows: kept tokens of all batches before it.
        empty: documents without tokens before that place.
    """

    document: int = 0
    offset: int = 0
    skip: int = 0
    batch: int = 0
    rows: int = 0
    empty: int = 0


START = TokenCursor()


def saved_cursor(values: Any) -> TokenCursor:
    """Return a saved cursor; raise ValueError unless all its numbers are counts."""
    return TokenCursor(*saved_counts(values, *(item.name for item in fields(TokenCursor))))


@dataclass(frozen=True)
class TokenBatch:
    """The tokens that the model reads at once.

    Attributes:
        tokens: [B, T] int64.
        mask: [B, T] bool, False for padding; None: there is none.
        kept: [B, T] bool, the tokens whose activations are kept.
        doc_id: [B, T] int32, number of the document in the dataset.
        position: [B, T] int32, place in the document.
        cursor: where the batch begins.
        following: where the next batch begins.
        source: what an encoder reads while a decoder reads the tokens; None: there is no decoder
            beside an encoder.
        pixels: [B, 3, H, W] float32, the images of a model that reads images, whose tokens say what
            each row is; None: it reads the tokens.
    """

    tokens: Tensor
    mask: Tensor | None
    kept: Tensor
    doc_id: Tensor
    position: Tensor
    cursor: TokenCursor
    following: TokenCursor
    source: Source | None = None
    pixels: Tensor | None = None


@dataclass(frozen=True)
class _Row:
    """A part of a document in a row of its own."""

    tokens: Integers
    wanted: Integers  # 1 or 0 for each of them
    doc_id: int
    position: int  # of its first token
    source: Integers | None


class TokenBatches:
    """The batches of some documents.

    Args:
        documents: in their order.
        tokenisation: of these documents' texts.
        config: how sequences are made.
        stop: place in the order before which to end; default: all.
        start: place of the first document.
    """

    def __init__(
        self,
        documents: Documents,
        tokenisation: Tokenisation,
        config: SequenceConfig,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        special = tokenisation.special
        room = config.ctx_len - len(special.before) - len(special.after)
        if not config.pack and room < 1:
            raise ValueError(
                f"ctx_len must leave room beside {config.ctx_len - room} special tokens, "
                f"got {config.ctx_len}"
            )
        self.config = config
        self.documents = documents
        self.tokenisation = tokenisation
        self.start = replace(START, document=start)
        count = MAX_DOCUMENTS if documents.count is None else documents.count
        self.stop = count if stop is None else stop

    @property
    def special(self) -> SpecialTokens:
        """The special tokens that are put round documents."""
        return self.tokenisation.special

    def between(self, start: int, stop: int | None = None) -> TokenBatches:
        """Return the batches of the documents start..stop of the order."""
        given = self.documents, self.tokenisation, self.config
        return TokenBatches(*given, start=start, stop=stop)

    def sample(self, place: int, sequences: int) -> TokenBatches:
        """Return batches of at most `sequences` rows, from a place on."""
        few = replace(self.config, batch_size=min(sequences, self.config.batch_size))
        return TokenBatches(self.documents, self.tokenisation, few, start=place, stop=self.stop)

    def rows_by_document(self, start: int, stop: int) -> list[int]:
        """Return the number of rows that each document of the order start..stop makes."""
        documents = self.tokenisation.iterate(self.documents, start, stop)
        return [self.kept_of(document) for *_, document in documents]

    def iterate(self, cursor: TokenCursor | None = None) -> Generator[TokenBatch, None, None]:
        """Yield the batches from a cursor on, however often they have been made before."""
        begin = self.start if cursor is None else cursor
        return self._packed(begin) if self.config.pack else self._padded(begin)

    def kept_of(self, document: EncodedDocument) -> int:
        """Return how many tokens are kept of a document with these tokens."""
        text, special, wanted = document.tokens, self.special, document.wanted
        if self.config.exclude_special_tokens:
            is_kept = np.isin(text, special.excluded, invert=True)
            return int((is_kept if wanted is None else is_kept & wanted).sum())
        if not len(text):
            return 0
        if self.config.pack:
            unwanted = 0 if wanted is None else int((~wanted).sum())
            return len(special.before) + len(text) + len(special.after) - unwanted
        return sum(int(row.wanted.sum()) for row, _ in self._rows(0, document, 0))

    def _tokens(self, place: int) -> Iterator[tuple[int, int, EncodedDocument]]:
        """Yield place, number and tokens of each document from a place on."""
        return self.tokenisation.iterate(self.documents, place, self.stop)

    def _packed(self, cursor: TokenCursor) -> Generator[TokenBatch, None, None]:
        size = self.config.batch_size * self.config.ctx_len
        buffer = np.empty((4, size), np.int32)  # tokens, doc_id, position, wanted
        have, empty, offset = 0, cursor.empty, cursor.offset
        before, after = self.special.before, self.special.after
        for place, number, document in self._tokens(cursor.document):
            if not len(document):
                empty += 1
                continue
            tokens = np.concatenate([before, document.tokens, after])
            wanted = np.concatenate([np.ones_like(before), _wanted(document), np.ones_like(after)])
            while offset < len(tokens):
                count = min(size - have, len(tokens) - offset)
                part = slice(have, have + count)
                buffer[0, part] = tokens[offset : offset + count]
                buffer[1, part] = number
                buffer[2, part] = np.arange(offset, offset + count)
                buffer[3, part] = wanted[offset : offset + count]
                have, offset = have + count, offset + count
                if have == size:
                    done = offset == len(tokens)
                    at = TokenCursor(place + 1, 0) if done else TokenCursor(place, offset)
                    batch = self._flat_batch(buffer, cursor, replace(at, empty=empty))
                    cursor = batch.following
                    yield batch
                    buffer, have = np.empty_like(buffer), 0
            offset = 0
        if have:
            at = TokenCursor(self.stop, 0, empty=empty)
            yield self._flat_batch(buffer[:, :have], cursor, at)

    def _flat_batch(
        self, tokens: Integers, cursor: TokenCursor, following: TokenCursor
    ) -> TokenBatch:
        """Make a batch of tokens [4, n] in rows of ctx_len, the last of them padded."""
        length = min(self.config.ctx_len, tokens.shape[1])
        rows = -(-tokens.shape[1] // length)
        padded = np.zeros((4, rows * length), np.int32)
        padded[0] = self.special.padding
        padded[:, : tokens.shape[1]] = tokens
        lengths = np.full(rows, length)
        lengths[-1] = tokens.shape[1] - (rows - 1) * length
        return self._batch(padded.reshape(4, rows, length), lengths, cursor, following)

    def _padded(self, cursor: TokenCursor) -> Generator[TokenBatch, None, None]:
        size = self.config.batch_size * WINDOW
        rows: deque[_Row] = deque()
        window = replace(cursor, skip=0)
        skip, empty, offset = cursor.skip, cursor.empty, cursor.offset
        for place, number, document in self._tokens(cursor.document):
            if not len(document):
                empty += 1
                continue
            for row, end in self._rows(number, document, offset):
                rows.append(row)
                if len(rows) == size:
                    at = TokenCursor(place + 1, 0) if end is None else TokenCursor(place, end)
                    at = replace(at, empty=empty)
                    for batch in self._window(list(rows), window, skip, at):
                        yield batch
                        window = batch.following
                    rows.clear()
                    skip = 0
            offset = 0
        if rows:
            at = TokenCursor(self.stop, 0, empty=empty)
            yield from self._window(list(rows), window, skip, at)

    def _rows(
        self, number: int, document: EncodedDocument, offset: int
    ) -> Iterator[tuple[_Row, int | None]]:
        """Yield the rows of a document from a token on, and the first token of the next row."""
        before, after = self.special.before, self.special.after
        text, wanted = document.tokens, _wanted(document)
        if not self.special.surround:  # what ends a document is not at the end of every row
            text, wanted = (
                np.concatenate([text, after]),
                np.concatenate([wanted, np.ones_like(after)]),
            )
            after = after[:0]
        room = self.config.ctx_len - len(before) - len(after)
        ones = np.ones_like(before), np.ones_like(after)
        for begin in range(offset, len(text), room):
            end = begin + room
            tokens = np.concatenate([before, text[begin:end], after])
            kept = np.concatenate([ones[0], wanted[begin:end], ones[1]])
            row = _Row(tokens, kept, number, begin, document.source)
            yield row, end if end < len(text) else None

    def _window(
        self, rows: list[_Row], window: TokenCursor, skip: int, following: TokenCursor
    ) -> Iterator[TokenBatch]:
        """Yield the batches of a window but for the first `skip`, in a mixed order of lengths."""
        rows.sort(key=lambda row: -len(row.tokens))
        size = self.config.batch_size
        groups = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        order = np.random.default_rng([window.document, window.offset]).permutation(len(groups))
        groups = [groups[index] for index in order]
        cursor = replace(window, skip=skip)
        for index in range(skip, len(groups)):
            is_last = index == len(groups) - 1
            after = following if is_last else replace(window, skip=index + 1)
            batch = self._row_batch(groups[index], cursor, after)
            cursor = batch.following
            yield batch

    def _row_batch(
        self, rows: Sequence[_Row], cursor: TokenCursor, following: TokenCursor
    ) -> TokenBatch:
        lengths = np.array([len(row.tokens) for row in rows])
        padded = np.zeros((4, len(rows), lengths.max()), np.int32)
        padded[0] = self.special.padding
        for index, row in enumerate(rows):
            length = len(row.tokens)
            padded[0, index, :length] = row.tokens
            padded[1, index, :length] = row.doc_id
            padded[2, index, :length] = np.arange(row.position, row.position + length)
            padded[3, index, :length] = row.wanted
        batch = self._batch(padded, lengths, cursor, following)
        sources = [row.source for row in rows if row.source is not None]
        return replace(batch, source=self._source(sources)) if sources else batch

    def _source(self, texts: Sequence[Integers]) -> Source:
        """Pad what the encoder reads."""
        lengths = np.array([len(text) for text in texts])
        tokens = np.full((len(texts), lengths.max()), self.special.padding, np.int64)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        return Source(torch.from_numpy(tokens), torch.from_numpy(mask))

    def _batch(
        self,
        padded: Integers,  # [4, B, T]: tokens, doc_id, position, wanted
        lengths: npt.NDArray[Any],  # [B]
        cursor: TokenCursor,
        following: TokenCursor,
    ) -> TokenBatch:
        mask = np.arange(padded.shape[2]) < lengths[:, None]
        kept = mask & (padded[3] != 0)
        if self.config.exclude_special_tokens:
            kept = kept & ~np.isin(padded[0], self.special.excluded)
        counted = replace(
            following, batch=cursor.batch + 1, rows=cursor.rows + int(np.count_nonzero(kept))
        )
        return TokenBatch(
            torch.from_numpy(padded[0].astype(np.int64)),
            None if mask.all() else torch.from_numpy(mask),
            torch.from_numpy(kept),
            torch.from_numpy(padded[1]),
            torch.from_numpy(padded[2]),
            cursor,
            counted,
        )


def _wanted(document: EncodedDocument) -> Integers:
    """Return 1 for each token of a document that becomes a row, and 0 for the others."""
    if document.wanted is None:
        return np.ones(len(document), np.int32)
    return document.wanted.astype(np.int32)
