"""DictionaryError, the exception for a foreign dictionary that cannot be read or written."""

from __future__ import annotations

from sae_fast.activations.errors import ShardError


class DictionaryError(ShardError):
    """A dictionary's file is missing, damaged or unfit, or a format cannot express it.

    The message is one line that names the file and what is wrong.
    """
