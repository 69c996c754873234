"""Sparse probing: how well a few latents, or all numbers of a row, tell a label from the others.

For each label a logistic regression of scikit-learn tells its rows from the rest, on the k latents
whose mean differs most between the two (SAEBench, arXiv:2503.09532). Whole documents are trained or
tested on, where documents are known. definitions.py has the formulas.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.activations.columns import NO_LABEL
from sae_fast.evaluation.core import Section
from sae_fast.evaluation.top_entries import hashed

SIZES = (1, 2, 5)  # latents of a probe
LEAST_ROWS = 10  # with a label and without it, to train on; half as many to test on
MOST_LABELS = 32  # the commonest ones
_TEST_PART = 5  # every fifth document

Flags = npt.NDArray[np.bool_]


class Probe(NamedTuple):
    """A probe for one label.

    Attributes:
        label: the label.
        latents: what it looks at; empty: all numbers of a row.
        accuracy: the mean of the shares of rows with and without the label that it tells right.
    """

    label: int
    latents: tuple[int, ...]
    accuracy: float


@dataclass(frozen=True)
class Probing:
    """The probes of a dictionary.

    Attributes:
        probes: for each label, one on the rows and one for each number of latents.
        section: averages over labels, by name.
    """

    probes: list[Probe]
    section: Section


class ProbedRows:
    """The labelled rows that probes are trained and tested on, taken evenly from all rows.

    Args:
        labels: of all rows, [rows] int64, NO_LABEL: none.
        documents: of all rows, [rows] int64; None: each row is one by itself.
        limit: how many rows are taken, at most.
    """

    def __init__(self, labels: Tensor, documents: Tensor | None, limit: int) -> None:
        labelled = (labels != NO_LABEL).nonzero().flatten()
        taken = labelled[:: max(1, -(-len(labelled) // limit))]
        self._is_taken = torch.zeros(len(labels), dtype=torch.bool)
        self._is_taken[taken] = True
        self.labels = labels[taken].numpy()
        groups = taken if documents is None else documents[taken].long()
        self.tests: Flags = hashed(groups.numpy(), seed=0) % np.uint64(_TEST_PART) == 0
        self._x: list[Tensor] = []
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, latents and values
        self._count = 0
        self._d_sae = 0

    def add(
        self,
        x: Tensor,  # [n, D]
        code: ops.SparseCode,
        first: int,
    ) -> None:
        """Add consecutive rows, the first of which has the number `first`, and their codes."""
        taken = self._is_taken[first : first + len(x)]
        place = taken.long().cumsum(0) - 1 + self._count
        rows = code.entry_rows().cpu()
        kept = taken[rows] & code.fires().flatten().cpu()
        values, latents = code.values.detach().flatten().cpu(), code.indices.flatten().cpu()
        self._parts.append((place[rows[kept]], latents[kept], values[kept].float()))
        self._x.append(x.cpu()[taken].float())
        self._count += int(taken.sum())
        self._d_sae = code.d_sae

    def arrays(self) -> tuple[Any, npt.NDArray[np.float32]]:
        """Return the codes as a CSC matrix [rows, F] of scipy, and the rows [rows, D]."""
        rows, latents, values = (
            torch.cat([part[n] for part in self._parts]).numpy() for n in range(3)
        )
        shape = (self._count, self._d_sae)
        codes = _package("scipy.sparse").csc_matrix((values, (rows, latents)), shape)
        return codes, torch.cat(self._x).numpy()


def sparse_probing(rows: ProbedRows, sizes: Sequence[int] = SIZES) -> Probing:
    """Return how well labels are told from others by few latents, and by whole rows.

    Args:
        rows: with their labels and codes.
        sizes: numbers of latents of a probe.

    Raises ValueError where no label has rows enough, and without scikit-learn.
    """
    tested = rows.tests
    labels, counts = np.unique(rows.labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_LABELS]
    chosen = [
        label for label in labels[np.sort(order)].tolist() if _enough(rows.labels == label, tested)
    ]
    if not chosen:
        raise ValueError(
            f"probing needs a label with {LEAST_ROWS} rows to train on and {LEAST_ROWS // 2} to "
            f"test on, and as many rows without it, got {len(rows.labels):,} rows with "
            f"{len(labels):,} different labels"
        )
    codes, x = rows.arrays()
    probes = []
    for label in chosen:
        right = rows.labels == label
        probes.append(Probe(label, (), _accuracy(x, right, tested)))
        ranked = _most_different(codes, right, tested)
        for size in sizes:
            latents = ranked[:size]
            part = codes[:, latents].toarray()
            probes.append(Probe(label, tuple(latents), _accuracy(part, right, tested)))
    return Probing(probes, _section(probes, sizes, tested))


def _section(probes: Sequence[Probe], sizes: Sequence[int], tested: Flags) -> Section:
    step = len(sizes) + 1
    names = ["probe_rows_accuracy", *(f"probe_{size}_latents_accuracy" for size in sizes)]
    means = {
        name: float(np.mean([probe.accuracy for probe in probes[n::step]]))
        for n, name in enumerate(names)
    }
    return {
        **means,
        "probe_labels": len(probes) // step,
        "probe_train_rows": int((~tested).sum()),
        "probe_test_rows": int(tested.sum()),
    }


def _enough(right: Flags, tested: Flags) -> bool:
    in_train, in_test = right[~tested], right[tested]
    return all(
        min(int(part.sum()), int((~part).sum())) >= least
        for part, least in ((in_train, LEAST_ROWS), (in_test, LEAST_ROWS // 2))
    )


def _most_different(codes: Any, right: Flags, tested: Flags) -> list[int]:
    """Return the latents in descending order of how far the means of both kinds of rows differ."""
    with_label, without = right & ~tested, ~right & ~tested
    means = [
        np.asarray(codes.T @ (part / part.sum()).astype(np.float64)).ravel()
        for part in (with_label, without)
    ]
    apart = np.abs(means[0] - means[1])
    return [int(latent) for latent in np.argsort(-apart, kind="stable")[: max(SIZES)]]


def _accuracy(features: npt.NDArray[np.float32], right: Flags, tested: Flags) -> float:
    """Return the balanced accuracy on test rows of a probe that the other rows train."""
    linear, metrics = _package("sklearn.linear_model"), _package("sklearn.metrics")
    scale = features[~tested].std(axis=0)
    scaled = features / np.where(scale > 0, scale, 1)
    probe = linear.LogisticRegression(class_weight="balanced", max_iter=1000)
    probe.fit(scaled[~tested], right[~tested])
    guessed = probe.predict(scaled[tested])
    return float(metrics.balanced_accuracy_score(right[tested], guessed))


def _package(name: str) -> Any:
    """Return a module; raise ValueError, which names the remedy, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = "scikit-learn" if name.startswith("sklearn") else "scipy"
        raise ValueError(
            f"probing needs {package}: install it (pip install 'sae_fast[evaluate]')"
        ) from error
