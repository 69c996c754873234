"""The exception of the data path: a file of activations that cannot be trained on."""

from __future__ import annotations


class ShardError(ValueError):
    """A shard is missing, damaged, foreign or unfit; the message is one line naming it."""


def one_line(error: BaseException) -> str:
    """Text of `error` on a single line, for use inside a `ShardError` message."""
    return " ".join(str(error).split()) or type(error).__name__
