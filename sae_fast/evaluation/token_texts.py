"""The text of tokens, as they stand within a text, from any tokenizer of transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_fast.activations import ShardSet
from sae_fast.activations.capture.packages import capture_package
from sae_fast.activations.capture.tokens import vocabulary_of
from sae_fast.activations.mixing import origin_of
from sae_fast.activations.origin import origin_of_attributes, vocabulary_difference

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
COMPARED_ROWS = 4096  # in whose tokens two tokenizers are compared
_HASH = "sha256:"  # how a hash in place of a name begins
_UNKNOWN_CHARACTER = "\ufffd"  # in place of bytes that are part of a character


class TokenTexts:
    """The texts of the tokens of one vocabulary.

    Args:
        tokenizer: of tokenizers or transformers.
        name: of it, for errors.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._is_plain = hasattr(tokenizer, "get_vocab_size")  # of the library tokenizers
        encoded = tokenizer.encode("a", add_special_tokens=False)
        ids = encoded.ids if self._is_plain else encoded
        self._before = list(ids[-1:])

    @property
    def size(self) -> int:
        """Tokens of the vocabulary."""
        is_plain = self._is_plain
        return int(self._tokenizer.get_vocab_size() if is_plain else len(self._tokenizer))

    @cached_property
    def vocabulary(self) -> str:
        """The number of tokens and a hash, see `vocabulary_of`."""
        return vocabulary_of(self._tokenizer)

    def require(self, smallest: int, largest: int) -> None:
        """Raise ValueError where the smallest or largest token of shards is no token."""
        if smallest < 0:
            raise ValueError(
                f"tokenizer: the shards hold token {smallest}, which no tokenizer has: token_ids "
                "must be 0 or more"
            )
        if largest >= self.size:
            raise ValueError(
                f"tokenizer: {self.name} has {self.size:,} tokens, and the shards hold token "
                f"{largest}: they are of another tokenizer"
            )

    def require_equal(self, other: TokenTexts, tokens: Iterable[int]) -> None:
        """Raise ValueError, naming both, where another tokenizer reads one of the tokens otherwise.

        A token that the other one does not have counts as different.
        """
        tokens = list(tokens)
        inside = [token for token in tokens if token < other.size]
        first = next((token for token in tokens if token >= other.size), None)
        found = zip(inside, self.of(inside), other.of(inside), strict=True)
        different = next(((t, a, b) for t, a, b in found if a != b), None)
        if different is not None:
            token, ours, theirs = different
            raise ValueError(
                f"tokenizer: token {token} is {ours!r} in {self.name} and {theirs!r} in "
                f"{other.name}, which the shards name: --force takes it all the same"
            )
        if first is not None:
            raise ValueError(
                f"tokenizer: {other.name}, which the shards name, has {other.size:,} tokens, and "
                f"they hold token {first}: --force takes {self.name} all the same"
            )

    def of(self, tokens: Iterable[int]) -> list[str]:
        """Return the text of each token after another word: " cat" begins a word, "s" does not.

        A token that is only a part of a character, or no text, has the vocabulary's own name, and
        one that the vocabulary does not have its number.
        """
        before = self._decode(self._before)
        return [self._text(token, before) for token in tokens]

    def by_token(
        self,
        tokens: Tensor,  # [n] int64
    ) -> dict[int, str]:
        """Return the text of each of these tokens; raise ValueError where one is unknown."""
        different = sorted(set(tokens.tolist()))
        self.require(different[0], different[-1])
        return dict(zip(different, self.of(different), strict=True))

    def _text(self, token: int, before: str) -> str:
        whole = self._decode([*self._before, token])
        text = whole[len(before) :] if whole.startswith(before) else ""
        if text and _UNKNOWN_CHARACTER not in text:
            return text
        tokenizer = self._tokenizer
        name = (
            tokenizer.id_to_token(token)
            if self._is_plain
            else tokenizer.convert_ids_to_tokens(token)
        )
        return str(token if name is None else name)  # models have rows beyond their tokenizer

    def _decode(self, tokens: list[int]) -> str:
        if self._is_plain:
            return str(self._tokenizer.decode(tokens, skip_special_tokens=False))
        decode = self._tokenizer.decode
        return str(decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def named_tokenizer(shards: ShardSet) -> str | None:
    """Return the name of the tokenizer of shards; of their model where they have a hash of it.

    None: they name neither.
    """
    named = str(shards.shards[0].metadata.get("tokenizer") or _HASH)
    model = origin_of(shards).get("model")
    return (model and str(model)) if named.startswith(_HASH) else named


def texts_here(place: str) -> TokenTexts | None:
    """Return the texts of a tokenizer.json on this machine; None where there is none.

    Args:
        place: a folder with one, or a name on the hub, whose files may have been downloaded before.

    Raises ValueError in one line where the file cannot be read.
    """
    path = Path(place) / TOKENIZER_FILE
    if not path.is_file():
        try:
            found = capture_package("huggingface_hub").try_to_load_from_cache(place, TOKENIZER_FILE)
        except ValueError:  # what is no name on the hub
            return None
        if not isinstance(found, str):
            return None
        path = Path(found)
    with _one_line(place):
        return _read(path, place)


def load_token_texts(place: str, *, only_here: bool = False) -> TokenTexts:
    """Return the texts of a tokenizer: a tokenizer.json, a folder, or a name on the hub.

    Args:
        place: of the tokenizer.
        only_here: whether the hub is not asked, but only what was downloaded before.

    Raises ValueError in one line where there is no such tokenizer.
    """
    path = Path(place)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    with _one_line(place):
        if file.is_file():
            return _read(file, place)
        if path.is_absolute() and not path.exists():
            raise FileNotFoundError("no such file or folder")
        auto = capture_package("transformers").AutoTokenizer
        return TokenTexts(auto.from_pretrained(place, local_files_only=only_here), place)


def token_texts_of(shards: ShardSet, name: str | None, what: str) -> TokenTexts | None:
    """Return the texts of a tokenizer, or of the one that shards name; None: it is not there.

    Without one a warning says which flag names it.

    Args:
        shards: name the tokenizer, or the model, of their rows.
        name: of a tokenizer to load in any case; None: the one of the shards is taken, where it
            has been downloaded.
        what: shows the numbers of tokens then, for the warning.

    Raises ValueError in one line where `name` is no tokenizer.
    """
    if name is not None:
        return load_token_texts(name)
    named, reason = named_tokenizer(shards), "the shards name none"
    if named is not None:
        try:
            return load_token_texts(named, only_here=True)
        except ValueError as error:
            reason = str(error)
            if isinstance(error.__cause__, OSError):  # as transformers raises it
                reason = f"the one of {named}, which the shards name, is not on this machine"
    logger.warning(
        "%s show tokens by their numbers: --tokenizer takes a tokenizer.json, a folder of a model "
        "or a name on the hub (%s)",
        *(what, reason),
    )
    return None


def check_named(texts: TokenTexts, shards: ShardSet, tokens: Iterable[int]) -> None:
    """Raise ValueError where the tokenizer that shards name reads some of their tokens otherwise.

    Where it is not on this machine, its vocabulary must be equal, if the shards have recorded it.
    """
    named = named_tokenizer(shards)
    if named is not None and (theirs := texts_here(named)) is not None:
        texts.require_equal(theirs, sorted(set(tokens)))
        return
    for shard in shards.shards:
        origin = origin_of_attributes(shard.metadata)
        if (difference := vocabulary_difference(origin, texts.vocabulary)) is not None:
            raise ValueError(
                f"tokenizer: {shard.path} is of {difference}, {texts.name}: --force takes it all "
                "the same"
            )


def _read(file: Path, name: str) -> TokenTexts:
    return TokenTexts(capture_package("tokenizers").Tokenizer.from_file(str(file)), name)


@contextmanager
def _one_line(place: str) -> Iterator[None]:
    """Raise any error as a ValueError of one line."""
    try:
        yield
    except Exception as error:  # tokenizers raises Exception itself
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"tokenizer: {place} cannot be loaded: {reason}") from error
