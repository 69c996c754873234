"""`Task`: data whose right answer is known, and the scores of a dictionary against it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config.ground_truth import GroundTruthConfig

Say = Callable[[object], None]
Progress = Callable[[int, int], None]  # steps made, and all of them


@dataclass(frozen=True)
class Score:
    """A score of a dictionary.

    Attributes:
        name: in results.json.
        heading: over the column.
        definition: one or two sentences.
        source: the paper or code that it is from; empty: defined here.
        is_share: whether it lies between 0 and 1.
    """

    name: str
    heading: str
    definition: str
    source: str = ""
    is_share: bool = True


@dataclass(frozen=True)
class Scored:
    """The scores of one dictionary.

    Attributes:
        scores: by name; None where a score has no value.
        details: lists for pictures, as JSON values.
    """

    scores: dict[str, float | None]
    details: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A task whose right answer is known.

    `prepare` makes the data, and trains the model of the task where it has one. From then on
    `rows`, `heldout_rows` and their labels are there.

    Args:
        config: the settings of the task.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]  # sentences for results.md
    scores: ClassVar[Sequence[Score]]
    labels_of: ClassVar[str | None] = None  # name of the labels that arch slots binds latents to

    rows: Tensor  # [N, D], to train on
    heldout_rows: Tensor  # [M, D], to score on

    def __init__(self, config: GroundTruthConfig) -> None:
        self.config = config

    @abstractmethod
    def prepare(self, folder: Path, progress: Progress) -> None:
        """Make the data; keep in `folder` what takes long to make, and read it where it is there.

        Args:
            folder: exists; only this task writes in it.
            progress: called after each step of a training of the task's own model.
        """

    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """Return what is known of data and model, JSON values by a name for each."""

    @abstractmethod
    def score(self, sae: SparseAutoencoder) -> Scored:
        """Return the scores of a dictionary that was trained on `rows`."""

    def labels(self) -> tuple[Tensor, Tensor]:
        """Return the labels `labels_of` of rows and of held-out rows, [N] and [M] int64."""
        raise NotImplementedError(f"{self.name} has no labels")

    def draw(self, entries: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
        """Draw pictures of this task's own into `out`; return their files.

        Args:
            entries: of results.json, with scores and details.
            out: the folder.
        """
        return []
