"""Counts and strongest rows of the newest batches, and texts made of pieces of shards."""

import numpy as np
import torch
from small_pages import D_SAE, ROWS, make_place

from sae_fast import SparseAutoencoder
from sae_fast.activations import open_shards
from sae_fast.evaluation.code_store import CodeStore
from sae_fast.evaluation.latents import PageSettings, make_pages
from sae_fast.evaluation.recent_batches import RecentBatches
from sae_fast.evaluation.text_rows import (
    TOKENS,
    Piece,
    TextRows,
    pieces_around,
    rows_of,
    shard_offsets,
)
from sae_fast.ops import DenseCode

SETTINGS = PageSettings(contexts=3, context_tokens=8, samples=1, cofiring_rows=1 << 20)


def code_of(dense):
    """Return a code whose values are these [n, F]."""
    return DenseCode(dense, torch.tensor(0))


def test_counts_and_strongest_rows_are_of_the_newest_batches():
    generator = torch.Generator().manual_seed(0)
    recent = RecentBatches(6, 2, window=20, newest=5)
    batches = []
    for number in range(5):
        dense = torch.rand(10, 6, generator=generator) * torch.tensor([1, 1, 1, 1, 1, 0])
        dense[torch.rand(10, 6, generator=generator) < torch.linspace(0, 0.9, 6)] = 0
        rows = 100 + 10 * number + torch.randperm(10, generator=generator).numpy()
        batches.append((dense.double().numpy(), rows))
        recent.add(code_of(dense), rows)
    # The span of two batches before the newest one is there, the first two batches are not.
    dense = np.concatenate([part for part, _ in batches[2:]] if recent.rows == 30 else [])
    rows = np.concatenate([part for _, part in batches[2:]])
    assert recent.rows == 30
    assert recent.fired.tolist() == (dense > 0).sum(0).tolist()
    mean = dense.sum(0) / np.maximum((dense > 0).sum(0), 1)
    np.testing.assert_allclose(recent.mean(), mean)
    assert recent.newest.tolist() == rows[-5:].tolist()
    alive = sorted(range(5), key=lambda j: (dense > 0).sum(0)[j])
    best = [rows[np.argmax(dense[:, j])] for j in alive]
    found = recent.strongest(len(dict.fromkeys(best)))
    assert found.tolist() == list(dict.fromkeys(best))
    assert len(recent.strongest(1000)) == len(set(recent.strongest(1000).tolist()))


def test_a_text_of_pieces_has_their_rows_and_ends_sequences_where_they_end(tmp_path):
    make_place(tmp_path)
    shards = open_shards(sorted((tmp_path / "shards").glob("*.h5")))
    rows = np.array([3, 8, 100, 259, 260, 2 * ROWS - 1])
    pieces = pieces_around(shard_offsets(shards), rows, 4, 9)
    assert pieces == [
        Piece(0, 0, 13),
        Piece(0, 96, 105),
        Piece(0, 255, 260),
        Piece(1, 0, 5),
        Piece(1, 255, 260),
    ]
    whole, text = TextRows(shards, 8), TextRows(shards, 8, pieces=pieces)
    own = np.concatenate([ROWS * p.shard + np.arange(p.start, p.stop) for p in pieces])
    assert text.rows == len(own)
    assert text.columns[TOKENS].tolist() == whole.columns[TOKENS][own].tolist()
    assert text.starts.tolist() == [0, 13, 17, 22, 27, 32]  # 17: a document of the shard begins
    (block,) = text.blocks(1000)
    assert (block.rows, block.kept, len(block.parts)) == (37, 37, 5)
    assert [item.first for item in text.blocks(16)] == [0, 13, 27]
    everything = torch.cat([x for _, x, _ in whole.read(whole.blocks(1000))])
    for size in (8, 16, 1000):
        read = torch.cat([x for _, x, _ in text.read(text.blocks(size))])
        assert torch.equal(read, everything[own])
    assert rows_of(pieces, shard_offsets(shards)).tolist() == own.tolist()


def test_only_counted_rows_are_counted_and_the_others_give_contexts(tmp_path):
    make_place(tmp_path)
    shards = open_shards(sorted((tmp_path / "shards").glob("*.h5")))
    sae = SparseAutoencoder.from_pretrained(tmp_path / "<b>sae")
    text = TextRows(shards, 8)
    counted = np.zeros(text.rows, bool)
    counted[::3] = True
    pages = []
    for name, mask in (("all", None), ("some", counted)):
        (tmp_path / name).mkdir()
        store = CodeStore(tmp_path / name, sae, text, 64)
        pages.append(make_pages(store, sae.W_dec, SETTINGS, counted=mask))
    whole, some = pages
    dense = torch.cat([sae.encode(x).dense() for _, x, _ in text.read(text.blocks(1000))])
    fired = (dense[torch.from_numpy(counted)] > 0).sum(0)
    assert some.rows == counted.sum()
    assert some.fired.tolist() == fired.tolist()
    assert some.histogram.sum(1).tolist() == fired.tolist()
    assert some.intervals.sum(1).tolist() == fired.tolist()
    assert some.cofiring_fired.tolist() == fired.tolist()
    assert some.largest.tolist() == whole.largest.tolist()
    for latent in range(D_SAE):
        top = [
            [p.contexts.rows[n] for n in p.contexts.of(latent) if p.contexts.intervals[n] < 0]
            for p in pages
        ]
        assert top[0] == top[1]
        drawn = [n for n in some.contexts.of(latent) if some.contexts.intervals[n] >= 0]
        assert counted[some.contexts.rows[drawn]].all()
