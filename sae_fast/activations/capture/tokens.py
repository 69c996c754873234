"""Text to tokens: which special tokens a tokenizer puts round documents, and tokenising ahead."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_fast.activations.background import start_thread
from sae_fast.activations.capture.conversations import ChatTemplate, EncodedDocument
from sae_fast.activations.capture.documents import Documents, Kind, Numbers

CHUNK = 64  # documents that are tokenised at once

Integers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer.

    Attributes:
        before: [n] in front of a document.
        after: [n] after it.
        surround: whether `after` ends every row, as [SEP] does, or only the document.
        excluded: [n] all tokens that are not text.
        padding: any token, for places that are masked.
    """

    before: Integers
    after: Integers
    surround: bool
    excluded: Integers
    padding: int

    def without_surroundings(self) -> SpecialTokens:
        """Return them for documents that have their special tokens already."""
        return replace(self, before=self.before[:0], after=self.after[:0], surround=False)


def special_tokens(tokenizer: Any, *, causal: bool) -> SpecialTokens:
    """Return the special tokens that are put round documents.

    The rows of an encoder have what the tokenizer itself puts round a text. The documents of a
    causal model begin with BOS, also where the tokenizer leaves that to its user; without a BOS
    they end with EOS; without either nothing is between them.
    """
    before: list[int] = []
    after: list[int] = []
    if not causal:
        before, after = _round_text(tokenizer)
    elif tokenizer.bos_token_id is not None:
        before = [tokenizer.bos_token_id]
    elif tokenizer.eos_token_id is not None:
        after = [tokenizer.eos_token_id]
    unknown = tokenizer.unk_token_id
    named = [
        getattr(tokenizer, f"{name}_token_id", None)
        for name in ("bos", "eos", "cls", "sep", "pad", "mask")
    ]
    # An unknown word is text, unless, as in GPT-2, one token stands for that and for BOS.
    excluded = {token for token in tokenizer.all_special_ids if token != unknown or token in named}
    padding = tokenizer.pad_token_id
    return SpecialTokens(
        np.array(before, np.int32),
        np.array(after, np.int32),
        not causal,
        np.array(sorted(excluded | {*before, *after}), np.int32),
        0 if padding is None else padding,
    )


def vocabulary_of(tokenizer: Any) -> str:
    """Return the size of a vocabulary, and a hash of its tokens with their numbers.

    It is the same for a tokenizer of transformers, for the tokenizer.json that it was read from,
    and in all versions of both libraries.
    """
    tokens = sorted((number, str(text)) for text, number in tokenizer.get_vocab().items())
    digest = hashlib.sha256(repr(tokens).encode())
    return f"{len(tokens)} tokens, sha256:{digest.hexdigest()}"


class Tokenisation:
    """Tokenises documents in their order, some of them ahead where it has processes for that.

    Args:
        tokenizer: of transformers.
        special: its special tokens.
        processes: 1: this one, with the threads that the tokenizer itself uses.
        vocabulary: tokens that the model has, which documents of tokens are checked against; None:
            they are not checked.
        chat: the template of documents that are conversations.
        pairs: makes tokens of documents that are pairs of texts.
    """

    def __init__(
        self,
        tokenizer: Any,
        special: SpecialTokens,
        processes: int = 1,
        vocabulary: int | None = None,
        chat: ChatTemplate | None = None,
        pairs: PairEncoder | None = None,
    ) -> None:
        if processes < 1:
            raise ValueError(f"num_proc must be at least 1, got {processes}")
        self.special = special
        self.chat = chat
        self._pairs = pairs
        self._tokenizer = tokenizer
        self._processes = processes
        self._vocabulary = vocabulary

    def iterate(
        self, documents: Documents, start: int, stop: int
    ) -> Iterator[tuple[int, int, EncodedDocument]]:
        """Yield place, number in the dataset and tokens of documents start..stop of the order.

        A document without text has no tokens. Of a document that is tokens already, the special
        tokens that are put round documents are left out where it has them.
        """
        chunks = _chunks(documents, start, stop)
        if documents.kind is Kind.TOKENS:
            for begin, numbers, given in chunks:
                encoded = [self._checked(*pair) for pair in zip(numbers, given, strict=True)]
                yield from _labelled(begin, numbers, encoded)
            return
        encoder = self._encoder(documents.kind)
        if encoder is None:
            raise ValueError(f"dataset: {documents.name} needs {documents.kind.value}")
        if self._processes == 1 or stop - start <= CHUNK:  # starting processes takes seconds
            for begin, numbers, given in chunks:
                yield from _labelled(begin, numbers, encode(encoder, numbers.tolist(), given))
            return
        yield from self._ahead(encoder, chunks)

    def _encoder(self, kind: Kind) -> Any:
        """Return what makes tokens of documents of a kind; None: it is missing."""
        return {
            Kind.TEXTS: self._tokenizer,
            Kind.CONVERSATIONS: self.chat,
            Kind.PAIRS: self._pairs,
        }.get(kind)

    def _ahead(
        self, encoder: Any, chunks: Iterator[tuple[int, Numbers, list[Any]]]
    ) -> Iterator[tuple[int, int, EncodedDocument]]:
        """Yield what other processes make of the chunks, in their order."""
        # A fork would copy locks that torch's and the tokenizer's threads hold.
        context = multiprocessing.get_context("spawn")
        waiting: deque[tuple[int, Numbers, Future[list[EncodedDocument]]]] = deque()
        with (
            _stored(encoder) as path,
            ProcessPoolExecutor(
                self._processes, context, initializer=_begin_worker, initargs=(path,)
            ) as pool,
        ):
            try:
                for begin, numbers, given in chunks:
                    made = pool.submit(_encode_here, numbers.tolist(), given)
                    waiting.append((begin, numbers, made))
                    if len(waiting) > 2 * self._processes:
                        first, numbers, future = waiting.popleft()
                        yield from _labelled(first, numbers, future.result())
                while waiting:
                    first, numbers, future = waiting.popleft()
                    yield from _labelled(first, numbers, future.result())
            except BrokenProcessPool:
                raise OSError("num_proc: a process that tokenises was ended") from None
            finally:
                pool.shutdown(cancel_futures=True)

    def _checked(self, number: np.int64, tokens: Numbers) -> EncodedDocument:
        """Return the tokens [n] of a document; raise ValueError for one that the model has not."""
        limit = 2**31 if self._vocabulary is None else self._vocabulary
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < limit:
            wrong = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise ValueError(
                f"tokens_column: document {number} holds the token {wrong}, the model has tokens "
                f"from 0 to {limit - 1}: they must be of its own tokenizer"
            )
        return EncodedDocument(_without_special(tokens.astype(np.int32), self.special))


def _chunks(
    documents: Documents, start: int, stop: int
) -> Iterator[tuple[int, Numbers, list[Any]]]:
    """Yield the documents start..stop of the order, CHUNK at once, with the place of the first."""
    for begin in range(start, stop, CHUNK):
        end = min(begin + CHUNK, stop)
        numbers, given = documents.read(begin, end)
        yield begin, numbers, given
        if len(given) < end - begin:  # the end of a stream
            return


def _without_special(tokens: Integers, special: SpecialTokens) -> Integers:
    """Return tokens without the special ones at their ends that are put round them anyway."""
    before, after = special.before, special.after
    if len(before) and np.array_equal(tokens[: len(before)], before):
        tokens = tokens[len(before) :]
    if len(after) and np.array_equal(tokens[-len(after) :], after):
        tokens = tokens[: -len(after)]
    return tokens


@dataclass(frozen=True)
class PairEncoder:
    """Makes tokens of pairs of texts: what an encoder reads, and what its decoder does.

    Attributes:
        tokenizer: of transformers.
        special: its special tokens, which are put round what the encoder reads.
        ctx_len: tokens of the encoder's text, behind which it is cut off.
    """

    tokenizer: Any
    special: SpecialTokens
    ctx_len: int

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedDocument]:
        """Return the tokens of pairs; one whose second text is empty has none."""
        before, after = self.special.before, self.special.after
        room = max(0, self.ctx_len - len(before) - len(after))
        sources = tokenise(self.tokenizer, [source for source, _ in pairs])
        targets = tokenise(self.tokenizer, [target for _, target in pairs])
        return [
            EncodedDocument(target, source=np.concatenate([before, source[:room], after]))
            for source, target in zip(sources, targets, strict=True)
        ]


def decoder_tokens(special: SpecialTokens, start: int) -> SpecialTokens:
    """Return the special tokens of a decoder's text, which begins with the token `start`.

    It reads the text as its tokenizer writes it, but for the last token, which it predicts.
    """
    before = np.concatenate([np.array([start], np.int32), special.before])
    return replace(
        special,
        before=before,
        after=special.after[:-1],
        surround=False,
        excluded=np.union1d(special.excluded, before).astype(np.int32),
    )


def encode(encoder: Any, numbers: Sequence[int], given: Sequence[Any]) -> list[EncodedDocument]:
    """Return the tokens of documents: texts with a tokenizer, conversations with a template."""
    if isinstance(encoder, ChatTemplate):
        return [encoder.encode(*pair) for pair in zip(given, numbers, strict=True)]
    if isinstance(encoder, PairEncoder):
        return encoder.encode(given)
    return [EncodedDocument(tokens) for tokens in tokenise(encoder, given)]


def tokenise(tokenizer: Any, texts: Sequence[str]) -> list[Integers]:
    """Return the tokens [n] of each text, without special ones; none for white space."""
    filled = [index for index, text in enumerate(texts) if text and not text.isspace()]
    tokens_of_texts = [np.empty(0, np.int32) for _ in texts]
    if filled:
        encoded = tokenizer(
            [texts[index] for index in filled],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            verbose=False,
        )["input_ids"]
        for index, tokens in zip(filled, encoded, strict=True):
            tokens_of_texts[index] = np.array(tokens, np.int32)
    return tokens_of_texts


def _labelled(
    begin: int, numbers: Numbers, encoded: list[EncodedDocument]
) -> Iterator[tuple[int, int, EncodedDocument]]:
    for index, document in enumerate(encoded):
        yield begin + index, int(numbers[index]), document


def _round_text(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens before a text and after it."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for begin in range(len(whole) - len(text) + 1):
        if whole[begin : begin + len(text)] == text:
            return whole[:begin], whole[begin + len(text) :]
    return [], []


@contextmanager
def _stored(encoder: Any) -> Iterator[str]:
    """Write a tokenizer or a template to a file for worker processes, and remove it at the end.

    As an argument of the processes it would be longer than a pipe holds, and a worker that is ended
    while it starts would leave this process waiting for ever.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder"
        path.write_bytes(pickle.dumps(encoder))
        yield str(path)


_encoders: list[Any] = []  # of a worker process


def _begin_worker(path: str) -> None:
    """Begin a worker process, which ends with its parent, even a killed one."""
    # A terminal and a cluster send signals to every process of a command.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    start_thread(_end_with_parent, name="parent", does="watches the parent process")
    _encoders[:] = [pickle.loads(Path(path).read_bytes())]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_here(numbers: list[int], given: list[Any]) -> list[EncodedDocument]:
    return encode(_encoders[0], numbers, given)
