"""The plan of a conversion: which entries of a source go into which shard.

Shards are cut at whole entries of the first axis, so that no sequence is in two of them, and by the
rows there are before padding is dropped. The same source and settings give the same plan, by which
an interrupted conversion continues.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sae_fast.activations.errors import ShardError
from sae_fast.activations.imports.saved_activations import SavedActivations


@dataclass(frozen=True)
class EntrySpan:
    """Entries start..stop of an array."""

    file: int  # number of the file
    array: int  # number of the array in it
    start: int
    stop: int
    first: int  # number of the first of these entries in the whole source
    entry_rows: int

    @property
    def rows(self) -> int:
        """Rows, padding among them."""
        return (self.stop - self.start) * self.entry_rows

    def split(self, entries: int) -> tuple[EntrySpan, EntrySpan]:
        """Split into the first `entries` entries, and the others."""
        middle = self.start + entries
        return (
            EntrySpan(self.file, self.array, self.start, middle, self.first, self.entry_rows),
            EntrySpan(
                self.file, self.array, middle, self.stop, self.first + entries, self.entry_rows
            ),
        )


@dataclass(frozen=True)
class PlannedShard:
    """A shard by its name and the spans that go into it."""

    name: str
    spans: tuple[EntrySpan, ...]

    @property
    def rows(self) -> int:
        """Upper bound on the rows; padding and non-finite rows are dropped later."""
        return sum(span.rows for span in self.spans)


def plan_shards(source: SavedActivations, shard_rows: int, heldout_rows: int) -> list[PlannedShard]:
    """Plan all shards; hold out the last entries, of `heldout_rows` rows or a little more.

    Raises ShardError where these would be all.
    """
    spans = list(_all_spans(source))
    train, heldout = _hold_out(spans, heldout_rows)
    if not train:
        raise ShardError(
            f"heldout_rows {heldout_rows} leaves nothing to train on: there are {source.rows} rows "
            f"in {spans[-1].first + spans[-1].stop - spans[-1].start} sequences or rows"
        )
    planned = []
    for kind, part in (("train", train), ("heldout", heldout)):
        for number, cut in enumerate(_cut(part, shard_rows)):
            planned.append(PlannedShard(f"{kind}_{number:05d}.h5", cut))
    return planned


def _all_spans(source: SavedActivations) -> Iterable[EntrySpan]:
    first = 0
    for number, file in enumerate(source.files):
        for place, array in enumerate(file.arrays):
            if array.rows:
                yield EntrySpan(number, place, 0, array.entries, first, max(1, array.tokens))
            first += array.entries


def _hold_out(spans: list[EntrySpan], rows: int) -> tuple[list[EntrySpan], list[EntrySpan]]:
    """Split spans into the spans without, and with, the last rows."""
    train, heldout = list(spans), list[EntrySpan]()
    while rows > 0 and train:
        last = train.pop()
        if last.rows <= rows:
            heldout.insert(0, last)
            rows -= last.rows
            continue
        entries = -(-rows // last.entry_rows)
        kept, held = last.split(last.stop - last.start - entries)
        heldout.insert(0, held)
        if kept.rows:
            train.append(kept)
        rows = 0
    return train, heldout


def _cut(spans: Iterable[EntrySpan], limit: int) -> Iterable[tuple[EntrySpan, ...]]:
    """Yield shards of at most `limit` rows, or of one entry that is longer."""
    shard: list[EntrySpan] = []
    left = limit
    for rest in spans:
        while rest.rows:
            entries = max(0, left) // rest.entry_rows
            if entries == 0 and not shard:
                entries = 1
            piece, rest = rest.split(min(entries, rest.stop - rest.start))
            if piece.rows:
                shard.append(piece)
                left -= piece.rows
            if rest.rows:
                yield tuple(shard)
                shard, left = [], limit
    if shard:
        yield tuple(shard)
