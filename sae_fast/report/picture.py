"""`Picture`: panels that a notebook shows where they are the value of a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from sae_fast.report.panels import Row
from sae_fast.report.plot import plot_run


@dataclass(frozen=True)
class Picture:
    """The panels of a run as an image.

    Attributes:
        png: the bytes of a PNG file.
        title: the line above the panels.
    """

    png: bytes = field(repr=False)
    title: str

    def _repr_png_(self) -> bytes:
        """Return what IPython shows."""
        return self.png


def picture_of(rows: Sequence[Row], title: str) -> Picture:
    """Draw the metrics of a run over its steps.

    Args:
        rows: the rows of metrics.jsonl.
        title: the line above the panels.
    """
    with TemporaryDirectory() as folder:
        path = plot_run(list(rows), Path(folder) / "panels.png", title)
        return Picture(path.read_bytes(), title)
