"""The results of a task: results.json, the table, and results.md with all definitions."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import sae_fast
from sae_fast.atomic_files import write_text
from sae_fast.autoencoder.architectures import ARCHITECTURES
from sae_fast.ground_truth.overlap import OVERLAP
from sae_fast.ground_truth.task import Score, Task
from sae_fast.json_files import JSONError, read_json, shown
from sae_fast.machine import cpu_name, usable_cores
from sae_fast.markdown import markdown_table
from sae_fast.ops.native import build_info

FORMAT_VERSION = 1
COMMON = (
    Score(
        "fvu",
        "FVU",
        "Fraction of variance unexplained on the held-out rows: the sum of squared errors divided "
        "by the sum of squared distances from the mean of each dimension.",
    ),
    Score("l0", "L0", "Latents active per held-out row, by the rule of inference.", is_share=False),
    Score("dead", "dead", "Share of the latents that fire on no held-out row."),
)


@dataclass
class Results:
    """The results of a task.

    Attributes:
        task: name, title, text and scores.
        command: makes the results again.
        entries: arch, seed, scores and details of each finished training.
        overlap: of an architecture, how much its seeds share.
        facts: of data and task model.
    """

    task: Task
    command: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    overlap: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> list[Score]:
        """The columns of an entry: the task's scores, then the scores that all tasks have."""
        return [*self.task.scores, *COMMON]

    @property
    def architectures(self) -> list[str]:
        """The architectures with entries, in the order of their first one."""
        return list(dict.fromkeys(str(entry["arch"]) for entry in self.entries))

    def has(self, arch: str, seed: int) -> bool:
        """Return whether a training is finished."""
        return any((entry["arch"], entry["seed"]) == (arch, seed) for entry in self.entries)

    def add(self, entry: dict[str, Any]) -> None:
        """Add the entry of a training; entries are in the order of the list of architectures."""
        places = {name: place for place, name in enumerate(ARCHITECTURES)}
        key = entry["arch"], entry["seed"]
        others = [item for item in self.entries if (item["arch"], item["seed"]) != key]
        self.entries = sorted(
            [*others, entry], key=lambda item: places.get(str(item["arch"]), len(places))
        )

    @property
    def seeds(self) -> list[int]:
        """The seeds of all finished trainings, ascending."""
        return sorted({int(entry["seed"]) for entry in self.entries})

    def seeds_of(self, arch: str) -> list[int]:
        """Return the seeds of an architecture's finished trainings."""
        return [entry["seed"] for entry in self.entries if entry["arch"] == arch]

    def values(self, arch: str, score: str) -> list[float]:
        """Return the values of a score over the seeds, without those that have none."""
        own = [entry["scores"].get(score) for entry in self.entries if entry["arch"] == arch]
        return [value for value in own if value is not None]

    def mean(self, arch: str, score: str) -> str:
        """Return the mean of a score over the seeds, with its standard deviation, for tables.

        Behind it stands over how many seeds it is, unless it is over all of `seeds`.
        """
        values = self.values(arch, score)
        return f"{spread(values)}{self._counted(len(values))}"

    def shared(self, arch: str, score: str) -> str:
        """Return a score of `OVERLAP` for tables, marked as `mean` is."""
        value = self.overlap.get(arch, {}).get(score)
        count = 0 if value is None else len(self.seeds_of(arch))
        return f"{shown_score(value)}{self._counted(count)}"

    def _counted(self, count: int) -> str:
        """Return the mark of a mean over `count` seeds; none where it says nothing new."""
        return f" ({count} of {len(self.seeds)})" if 0 < count < len(self.seeds) else ""

    def seeds_line(self) -> str:
        """Return the sentence about the seeds that stands over the table."""
        told = f"Mean and standard deviation over the seeds {', '.join(map(str, self.seeds))}"
        cells = [
            self.mean(arch, score.name) for arch in self.architectures for score in self.scores
        ]
        if any(cell.endswith(")") for cell in cells):
            count = len(self.seeds)
            told += f"; (n of {count}): over n seeds, since the others have no training or no value"
        return f"{told}."

    def untrained_line(self) -> str:
        """Return the sentence about the dictionary without a training; empty where none is."""
        told = "`untrained` is a topk before its first step: what the start alone gives."
        return told if "untrained" in self.architectures else ""

    def write(self, path: Path) -> None:
        """Write results.json, whole or not at all, with a line for each entry."""
        head = {
            "format_version": FORMAT_VERSION,
            "task": self.task.name,
            "command": self.command,
            "machine": machine(),
            "settings": self.task.config.of_the_task(),
            "facts": self.facts,
            "overlap": self.overlap,
        }
        entries = ",\n  ".join(map(json.dumps, self.entries))
        text = json.dumps(head, indent=1).removesuffix("\n}")
        write_text(path, f'{text},\n "entries": [\n  {entries}\n ]\n}}\n')

    def line(self, entry: Mapping[str, Any]) -> str:
        """Return the scores of an entry on a line."""
        scores = entry["scores"]
        parts = [f"{score.heading} {shown_score(scores.get(score.name))}" for score in self.scores]
        return ", ".join(parts)

    def table(self) -> str:
        """Return the mean of each score over the seeds, with its standard deviation, as Markdown.

        An architecture has a row.
        """
        shared = [score for score in OVERLAP if any(self.overlap.values())]
        headings = ["arch", *(score.heading for score in [*self.scores, *shared])]
        rows = []
        for arch in self.architectures:
            cells = [self.mean(arch, score.name) for score in self.scores]
            rows.append([arch, *cells, *(self.shared(arch, score.name) for score in shared)])
        return markdown_table(headings, rows, texts=1)

    def markdown(self, pictures: Mapping[str, str]) -> str:
        """Return results.md.

        Args:
            pictures: by the name of the file, the text that stands for it.
        """
        settings = ", ".join(
            f"{name} {value}"
            for name, value in self.task.config.of_the_task().items()
            if value is not None
        )
        shared = OVERLAP if any(self.overlap.values()) else ()
        lines = [
            f"# {self.task.title}",
            self.task.about,
            self.seeds_line(),
            self.table(),
            *(f"![{text}]({name})" for name, text in pictures.items()),
            "## Definitions",
            _definitions([*self.scores, *shared]),
            self.untrained_line(),
            "## Data",
            "\n".join(f"- {name}: {_fact(value)}" for name, value in self.facts.items()),
            f"Settings: {settings}.",
            f"`{self.command}`",
            _machine_line(),
        ]
        return "\n\n".join(line for line in lines if line) + "\n"


def read_results(path: Path, task: Task, command: str) -> Results:
    """Return the results that an earlier call left in a file, or new ones where there is none.

    Raises:
        ValueError: where the file is of another task, or of other settings, naming the first one.
    """
    results = Results(task, command)
    if not path.exists():
        return results
    try:
        content = read_json(path)
    except JSONError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: no results of sae_fast.ground_truth, name another --out")
    if content["task"] != task.name:
        raise ValueError(f"{path.parent} holds results of {content['task']}, name another --out")
    theirs, ours = content["settings"], task.config.of_the_task()
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{path.parent} holds results with {name} = {shown(theirs.get(name))}, "
                f"this call has {shown(value)}: name another --out"
            )
    results.entries = content["entries"]
    results.overlap = content["overlap"]
    return results


def machine() -> dict[str, Any]:
    """Return the machine and the versions behind the numbers."""
    info = build_info()
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sae_fast": sae_fast.__version__,
        "kernels": str(info.get("instruction_set", info["backend"])),
    }


def _machine_line() -> str:
    found = machine()
    return (
        f"{found['cpu']}, {found['cores']} cores; torch {found['torch']}, sae_fast "
        f"{found['sae_fast']} ({found['kernels']}), Python {found['python']}."
    )


def _definitions(scores: Iterable[Score]) -> str:
    rows = [(f"{s.heading} (`{s.name}`)", s.definition, s.source) for s in scores]
    return markdown_table(["column", "definition", "source"], rows)


def spread(values: Sequence[float]) -> str:
    """Return the mean of values, with their standard deviation where there are several."""
    if not values:
        return "none"
    mean = shown_score(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {shown_score(statistics.stdev(values))}"


def shown_score(value: float | None) -> str:
    """Return a score as it stands in tables."""
    if value is None:
        return "none"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
