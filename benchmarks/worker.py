"""A process that trains with one contestant's own loop, one step whenever the parent says so.

Started as `python -m benchmarks.worker` by `support/peer_process.py`, in the interpreter of the
contestant, which need not have sae_fast. Standard input brings one JSON line, the job, and then a
line `go` for every step; standard output answers with one JSON line each. A step lasts from the
moment the contestant is handed a batch to the moment it asks for the next.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TextIO

import torch
from torch import Tensor

from benchmarks.support.machine import DISTRIBUTIONS, distribution_version
from benchmarks.support.memory import PeakMemory
from benchmarks.support.problem import (
    Size,
    Weights,
    learning_rate,
    make_activations,
    make_weights,
)
from benchmarks.support.timing import machine_busy_seconds

# More steps than any run takes: the parent ends the loop, never the contestant.
STEPS = 100_000


class TrainingOver(BaseException):
    """Leaves a contestant's loop; a BaseException so that no loop catches it."""


@dataclass(frozen=True)
class Job:
    """What to train, the same for every contestant."""

    contestant: str
    size: Size
    n_batches: int
    steps: int = STEPS

    @property
    def autocast(self) -> bool:
        """Whether bf16 was asked for."""
        return self.contestant.endswith("_bf16")

    @property
    def learning_rate(self) -> float:
        """The same for all."""
        return learning_rate(self.size)

    @cached_property
    def activations(self) -> Tensor:
        """All rows."""
        return make_activations(self.size, self.n_batches)

    @cached_property
    def weights(self) -> Weights:
        """Where training starts."""
        return make_weights(self.size)

    def first_row(self, step: int) -> int:
        """Where the batch of a step begins."""
        return step % self.n_batches * self.size.n_tokens

    def batch(self, step: int) -> Tensor:
        """The batch of a step.  # [N, D]"""
        first = self.first_row(step)
        return self.activations[first : first + self.size.n_tokens]


class Turns:
    """Hands batches out in turn with other processes, and reports how long each step took."""

    def __init__(self, requests: TextIO, answers: TextIO, contestant: str) -> None:
        self.requests = requests
        self.answers = answers
        self.contestant = contestant
        self.memory = PeakMemory()
        self.started: tuple[float, float, float] | None = None

    def before_model(self) -> None:
        """Called when data and libraries are loaded and the model is not yet built."""
        self.memory = PeakMemory()

    def ready(self, loss: float) -> None:
        """Called when the model is built; `loss` is its squared error on the first batch."""
        name = DISTRIBUTIONS.get(self.contestant.removesuffix("_bf16"), "sae_fast")
        versions = {name: distribution_version(name), "torch": torch.__version__}
        self.answer({"loss": loss, "versions": versions})

    def wait(self) -> None:
        """Report the step that ends here, if any, and block until the parent says go."""
        if self.started is not None:
            seconds = time.perf_counter() - self.started[0]
            cpu = time.process_time() - self.started[1]
            others = max(0.0, machine_busy_seconds() - self.started[2] - cpu) / seconds
            above = self.memory.above()
            self.answer(
                {"seconds": seconds, "cpu_seconds": cpu, "others": others, "peak_bytes": above}
            )
        if self.requests.readline().strip() != "go":
            raise TrainingOver
        self.started = (time.perf_counter(), time.process_time(), machine_busy_seconds())

    def batches(self, job: Job) -> Iterator[Tensor]:
        """Batches for a loop that takes an iterator."""
        for step in range(job.steps):
            self.wait()
            yield job.batch(step)

    def answer(self, content: dict[str, Any]) -> None:
        """One line to the parent."""
        self.answers.write(json.dumps(content) + "\n")
        self.answers.flush()


def load_torch() -> None:
    """Make torch load what it loads at first use, so that no contestant is charged for it."""
    weight = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = torch.optim.Adam([weight])
    (weight @ weight).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def main() -> None:
    """Serve one parent until it closes the pipe."""
    # Libraries print; the real standard output is kept for answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    job = Job(request["contestant"], Size(**request["size"]), request["n_batches"])
    adapter = importlib.import_module(request["adapter"])
    _ = job.activations, job.weights  # made before memory is counted
    load_torch()
    try:
        adapter.train(job, Turns(sys.stdin, answers, job.contestant))
    except TrainingOver:
        return


if __name__ == "__main__":
    main()
