"""The concepts of latents, as far as tokens and labels show them, out of the pass over rows.

purity.py looks at the strongest rows of each latent, probing.py at how well a few latents tell
labels apart. Both see the codes as they pass by.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.evaluation.core import Section
from sae_fast.evaluation.probing import Probe, ProbedRows, sparse_probing
from sae_fast.evaluation.purity import Purity, StrongestRows
from sae_fast.evaluation.text_rows import DOCUMENT, TOKENS

logger = logging.getLogger(__name__)

TOKEN, LABEL = "token", "label"  # kinds of numbers, in the names of metrics


@dataclass(frozen=True)
class Concepts:
    """Tokens and labels of the latents.

    Attributes:
        sections: metrics by name, by the name of their group.
        latents: a number for each latent [F] float64, by name.
        purity: by kind, token or label.
        probes: for each label.
        columns: numbers beside the rows, [rows], by column.
    """

    sections: dict[str, Section] = field(default_factory=dict)
    latents: dict[str, Tensor] = field(default_factory=dict)
    purity: dict[str, Purity] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    columns: Mapping[str, Tensor] = field(default_factory=dict)


class ConceptPass:
    """Watch codes, see `core_metrics`, for the purity of latents and for probes.

    Args:
        d_sae: number of latents.
        columns: numbers beside the rows, [rows], by column; tokens and documents among them.
        labels: the column with labels; None: there is none.
        top: rows of a latent whose numbers are compared; 0: none.
        probe_rows: rows that probes are trained and tested on, at most; 0: no probes.

    Raises ValueError for labels that are not whole numbers, or of which there are none.
    """

    def __init__(
        self,
        d_sae: int,
        columns: Mapping[str, Tensor],
        labels: str | None,
        *,
        top: int,
        probe_rows: int,
    ) -> None:
        self._columns = columns
        of_rows = None if labels is None else _checked(labels, columns[labels])
        kinds = {TOKEN: columns.get(TOKENS), LABEL: of_rows}
        self._strongest = {
            kind: StrongestRows(d_sae, numbers.long(), top)
            for kind, numbers in kinds.items()
            if numbers is not None and top
        }
        self._probed: ProbedRows | None = None
        if of_rows is not None and probe_rows:
            self._probed = ProbedRows(of_rows.long(), columns.get(DOCUMENT), probe_rows)
        self._rows = 0

    def __call__(self, x: Tensor, code: ops.SparseCode) -> None:
        """Look at the rows of a batch [n, D] and their code; batches come in order."""
        for strongest in self._strongest.values():
            strongest.add(code, self._rows)
        if self._probed is not None:
            self._probed.add(x, code, self._rows)
        self._rows += len(x)

    def result(self) -> Concepts:
        """Return what was found; too few labelled rows for a probe are told in a warning."""
        found = Concepts(columns=self._columns)
        for kind, strongest in self._strongest.items():
            purity = found.purity[kind] = strongest.result()
            found.sections.setdefault("purity", {}).update(purity.section(kind))
            found.latents.update(purity.latents(kind))
        if self._probed is not None:
            try:
                probing = sparse_probing(self._probed)
            except ValueError as error:
                logger.warning("%s: left out", error)
            else:
                found.probes.extend(probing.probes)
                found.sections["sparse_probing"] = probing.section
        return found


def _checked(name: str, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        raise ValueError(
            f"labels: {name} must hold whole numbers, one for each kind of row, got "
            f"{str(labels.dtype).removeprefix('torch.')}"
        )
    if not bool((labels >= 0).any()):
        raise ValueError(f"labels: {name} holds no label, every row has {int(torch.max(labels))}")
    return labels
