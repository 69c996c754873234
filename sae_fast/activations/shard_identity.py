"""The identity of the shards of a checkpoint, and whether the present ones are the same.

They are told apart by the names of their files, by digests of what describes them and of their
first and last rows and, as far as a scan has read them, by digests of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_fast.activations.errors import listed
from sae_fast.activations.shard_set import ShardSet

_NAMED = 4  # changes in a message


def identity_of(shards: ShardSet) -> dict[str, Any]:
    """Return what identifies a set of shards, as JSON values; reads two rows of each."""
    return {
        "shards": [list(item) for item in shards.identities()],
        "contents": shards.contents(),
    }


def check_same_shards(
    before: Mapping[str, Any], now: Mapping[str, Any], what: str = "the shards"
) -> None:
    """Raise ValueError, naming the shards, if a set of shards has changed.

    Args:
        before: result of `identity_of` when the checkpoint was written, perhaps with other entries.
        now: result of `identity_of` now.
        what: the shards in the message, a plural.
    """
    known, current = saved_shards(before), [(name, digest) for name, digest in now["shards"]]
    changes = _changes(known, current)
    if known == current:
        contents = zip(known, saved_contents(before, len(known)), now["contents"], strict=True)
        changes = [
            f"{name} has other content" for (name, _), x, y in contents if x and y and x != y
        ]
    if changes:
        raise ValueError(
            f"{what} differ from the ones that the checkpoint was made with: "
            f"{listed(changes, _NAMED)}"
        )


def saved_shards(position: Any) -> list[tuple[str, str]]:
    """Return names and digests of the shards in a position; raise ValueError if malformed."""
    if not isinstance(position, dict) or not isinstance(position.get("origin", {}), dict):
        raise ValueError("data position: a set of shards must be a JSON object with its origin")
    shards = position.get("shards")
    if not isinstance(shards, list) or not all(map(_is_pair_of_texts, shards)):
        raise ValueError("data position: shards must be a list of names with their digests")
    return [(name, digest) for name, digest in shards]


def saved_contents(position: Mapping[str, Any], count: int) -> list[str]:
    """Return row digests of each shard in a position; raise ValueError if malformed.

    Positions of earlier releases have none, and a shard has "" where its digest was not known.
    """
    contents = position.get("contents", [""] * count)
    if not isinstance(contents, list) or not all(isinstance(item, str) for item in contents):
        raise ValueError("data position: contents must be a list of digests")
    if len(contents) != count:
        raise ValueError(f"data position: contents must be of {count} shards")
    return contents


def _is_pair_of_texts(item: object) -> bool:
    if not isinstance(item, list) or len(item) != 2:
        return False
    return all(isinstance(part, str) for part in item)


def _changes(before: list[tuple[str, str]], now: list[tuple[str, str]]) -> list[str]:
    """List the differences between shards by name and digest; empty if they are equal."""
    if before == now:
        return []
    old, new = dict(before), dict(now)
    changes = [
        *(f"{name} is gone" for name in old if name not in new),
        *(f"{name} is new" for name in new if name not in old),
        *(f"{name} has other content" for name in new if old.get(name, new[name]) != new[name]),
    ]
    return changes or ["their order is another"]
