"""ShardError, the exception for a file of activations that cannot be trained on, and its texts."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_NAME = 80  # characters of a name in a list of names
LONGEST_REASON = 400  # characters of what a library says, which may quote all of a damaged file


class ShardError(ValueError):
    """A shard is missing, damaged, foreign or unfit; the message is one line naming it."""


def takes_too_much(path: object) -> ShardError:
    """Return the error for a file whose reading uses up the memory, damaged or not."""
    return ShardError(f"{path}: reading it takes more memory than this process may have")


def one_line(error: BaseException) -> str:
    """Return the text of `error` on a single line, for use inside a `ShardError` message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return shortened(text, LONGEST_REASON)


def shortened(text: str, most: int) -> str:
    """Cut a text that may be longer than a message can be."""
    return text if len(text) <= most else f"{text[:most]}…"


def listed(names: Sequence[str], most: int = 6, *, longest: int = LONGEST_NAME) -> str:
    """Join names as a sentence has them, for a message that has to stay one line.

    Args:
        names: the names; none give an empty text.
        most: how many are named; of more, the first ones are, and how many more there are.
        longest: characters at which a name is cut.
    """
    parts = [shortened(name, longest) for name in names[:most]]
    if len(names) > most:
        parts.append(f"{len(names) - most:,} more")
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
