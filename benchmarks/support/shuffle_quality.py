"""The quality of a source's shuffle, from its batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_fast.activations import Source

NEAR_TOKENS = 16


@dataclass(frozen=True)
class ShuffleQuality:
    """Measures of batches with N of an epoch's R rows; a `…_ratio` is 1 for a full shuffle.

    Attributes:
        document_ratio: number of pairs of rows of one document in a batch, relative to the number
            expected in a full shuffle.
        near_ratio: number of these pairs at most NEAR_TOKENS positions apart, also relative to a
            full shuffle.
        variance_ratio: variance of the batches' means, relative to a full shuffle's, which is the
            rows' variance times (R - N) / (N (R - 1)). It shows how much noise neighbouring rows
            add to a gradient.
        companions: average number of other rows of a row's document in its batch.
    """

    document_ratio: float
    near_ratio: float
    variance_ratio: float
    companions: float


def measure_shuffle(source: Source, epochs: int = 1) -> ShuffleQuality:
    """Measure the batches of the next epochs of a source with the columns doc_id and position.

    Raises ValueError if a batch has one row, or an epoch less than two batches.
    """
    rows = source.rows_per_epoch
    documents = near = squares = 0.0  # sums over the batches
    n_batches, size = 0, 0
    for _ in range(epochs):
        seen: list[Tensor] = []
        total, norms = torch.zeros(source.d_in, dtype=torch.float64), 0.0
        means: list[Tensor] = []
        while n_batches == 0 or len(means) * size < rows:
            x, columns = source.next_rows()
            if not 1 < (size := len(x)) <= rows // 2:
                raise ValueError(f"batch_size must be from 2 to {rows // 2}, got {size}")
            keys = _keys(columns["doc_id"], columns["position"])
            seen.append(keys)
            documents += float(_document_pairs(keys))
            near += float(_near_pairs(keys))
            total += x.double().sum(0)
            norms += float(x.double().square().sum())
            means.append(x.double().mean(0))
            n_batches += 1
        mean = total / (len(means) * size)
        variance = norms / (len(means) * size) - float(mean.square().sum())
        spread = float((torch.stack(means) - mean).square().sum(1).mean())
        squares += spread / (variance * (rows - size) / (size * (rows - 1)))
        keys = torch.cat(seen)[:rows]
    # The share of an epoch's pairs of rows that a full shuffle brings into one batch.
    share = size * (size - 1) / (rows * (rows - 1))
    return ShuffleQuality(
        document_ratio=_ratio(documents / n_batches, share * float(_document_pairs(keys))),
        near_ratio=_ratio(near / n_batches, share * float(_near_pairs(keys))),
        variance_ratio=squares / epochs,
        companions=2 * documents / n_batches / size,
    )


def _keys(documents: Tensor, positions: Tensor) -> Tensor:
    """Return numbers whose difference is the distance of two positions in one document.

    Numbers of different documents are far apart.
    """
    return documents.long() * (1 << 32) + positions.long()


def _document_pairs(keys: Tensor) -> Tensor:
    counts: Tensor = torch.unique(keys >> 32, return_counts=True)[1]
    return (counts * (counts - 1)).sum() // 2


def _near_pairs(keys: Tensor) -> Tensor:
    ordered = keys.sort().values
    after = torch.searchsorted(ordered, ordered + NEAR_TOKENS, right=True)
    return (after - torch.arange(1, len(keys) + 1)).sum()


def _ratio(found: float, expected: float) -> float:
    return found / expected if expected > 0 else float("nan")
