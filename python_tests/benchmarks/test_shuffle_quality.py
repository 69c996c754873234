"""The measure of a shuffle on batches with known rows."""

import h5py
import numpy as np
import pytest
import torch

from benchmarks.support.shuffle_quality import NEAR_TOKENS, measure_shuffle
from sae_fast.activations import ActivationStream, TensorStream
from sae_fast.activations.source import Rows

COLUMNS = ("doc_id", "position")
DOCUMENTS, LENGTH, WIDTH = 64, 64, 5


def corpus() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Make documents whose rows share a vector, with their columns."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(DOCUMENTS, 1, WIDTH, generator=generator)
    x = shared + torch.randn(DOCUMENTS, LENGTH, WIDTH, generator=generator)
    position = torch.arange(LENGTH).repeat(DOCUMENTS)
    doc_id = torch.arange(DOCUMENTS).repeat_interleave(LENGTH)
    return x.reshape(-1, WIDTH), {"doc_id": doc_id, "position": position}


class Ordered:
    """A source of batches in a given order of the rows."""

    d_in = WIDTH

    def __init__(self, order: torch.Tensor, batch_size: int) -> None:
        self.rows, self.labels = corpus()
        self.batches = torch.split(order, batch_size)
        self.rows_per_epoch = len(self.rows)
        self.turn = 0

    def next_rows(self) -> Rows:
        chosen = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        return Rows(
            self.rows[chosen], {name: column[chosen] for name, column in self.labels.items()}
        )


def test_rows_as_stored_are_as_far_from_a_shuffle_as_can_be():
    found = measure_shuffle(Ordered(torch.arange(DOCUMENTS * LENGTH), LENGTH))
    # A batch is a document: all its pairs, of which 1 in about 64 * 65 would come together.
    batches = DOCUMENTS
    pairs = LENGTH * (LENGTH - 1) / 2
    rows = DOCUMENTS * LENGTH
    share = LENGTH * (LENGTH - 1) / (rows * (rows - 1))
    assert found.document_ratio == pytest.approx(pairs / (share * batches * pairs))
    assert found.near_ratio == pytest.approx(found.document_ratio)
    assert found.companions == LENGTH - 1
    # Half of a row's variance is its document's, which the batch's mean does not average out.
    assert found.variance_ratio == pytest.approx(LENGTH / 2, rel=0.2)


def test_near_pairs_are_counted_by_position():
    rows = DOCUMENTS * LENGTH
    # Every second row of two documents: distances of 2, 4, … positions.
    order = torch.arange(rows).view(-1, 2 * LENGTH)
    order = torch.cat([order[:, ::2], order[:, 1::2]], dim=1).flatten()
    found = measure_shuffle(Ordered(order, LENGTH))
    half = LENGTH // 2
    in_batch = 2 * sum(half - step for step in range(1, NEAR_TOKENS // 2 + 1))
    in_all = DOCUMENTS * sum(LENGTH - step for step in range(1, NEAR_TOKENS + 1))
    share = LENGTH * (LENGTH - 1) / (rows * (rows - 1))
    assert found.near_ratio == pytest.approx(in_batch / (share * in_all))
    assert found.companions == half - 1


def test_a_full_shuffle_is_the_unit():
    x, labels = corpus()
    stream = TensorStream(x, batch_size=128, columns=labels)
    found = measure_shuffle(stream, epochs=4)
    assert found.document_ratio == pytest.approx(1, abs=0.05)
    assert found.near_ratio == pytest.approx(1, abs=0.1)
    assert found.variance_ratio == pytest.approx(1, abs=0.15)


@pytest.mark.slow
def test_a_larger_pool_mixes_better(tmp_path):
    x, labels = corpus()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("activations", data=x.numpy(), chunks=(32, WIDTH))
        for name, column in labels.items():
            file[name] = column.numpy().astype(np.int32)
    found = {}
    for pool_rows in (128, 1024, len(x)):
        with ActivationStream(
            tmp_path, batch_size=64, pool_rows=pool_rows, columns=COLUMNS
        ) as stream:
            found[pool_rows] = measure_shuffle(stream, epochs=4)
    small, middle, whole = found.values()
    assert small.document_ratio > 1.5 * middle.document_ratio > 1.5 * whole.document_ratio
    assert small.variance_ratio > 1.3 * middle.variance_ratio
    assert whole.document_ratio == pytest.approx(1, abs=0.1)
    assert small.companions > 2 * whole.companions


@pytest.mark.parametrize("batch_size", [1, 2049])
def test_batches_that_tell_nothing_are_refused(batch_size):
    x, labels = corpus()
    stream = TensorStream(x, batch_size=batch_size, columns=labels)
    with pytest.raises(ValueError, match=f"batch_size must be from 2 to 2048, got {batch_size}"):
        measure_shuffle(stream)
