"""A process that trains with one contestant's own loop, one step whenever the parent says so.

Started as `python -m benchmarks.worker` by `support/peer_process.py`, in the interpreter of the
contestant, which need not have sae_fast. Standard input brings one JSON line, the job, and then a
line `go N` for every sample, of N steps; standard output answers with one JSON line each. A step
lasts from the moment the contestant is handed a batch to the moment it asks for the next, and on a
GPU the last of a sample until the device has finished.
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
from benchmarks.support.memory import peak_since_now
from benchmarks.support.problem import (
    CPU,
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
    device: torch.device = CPU
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
        return make_activations(self.size, self.n_batches, device=self.device)

    @cached_property
    def weights(self) -> Weights:
        """Where training starts."""
        return make_weights(self.size, device=self.device)

    def first_row(self, step: int) -> int:
        """Where the batch of a step begins."""
        return step % self.n_batches * self.size.n_tokens

    def batch(self, step: int) -> Tensor:
        """The batch of a step.  # [N, D]"""
        first = self.first_row(step)
        return self.activations[first : first + self.size.n_tokens]


class Turns:
    """Hands batches out in turn with other processes, and reports how long each step took."""

    def __init__(
        self, requests: TextIO, answers: TextIO, contestant: str, device: torch.device = CPU
    ) -> None:
        self.requests = requests
        self.answers = answers
        self.contestant = contestant
        self.device = device
        self.memory = peak_since_now(device)
        self.started: tuple[float, float, float] | None = None
        self.asked = self.left = 0  # steps of this sample

    def before_model(self) -> None:
        """Called when data and libraries are loaded and the model is not yet built."""
        self.memory = peak_since_now(self.device)

    def ready(self, loss: float) -> None:
        """Called when the model is built; `loss` is its squared error on the first batch."""
        name = DISTRIBUTIONS.get(self.contestant.removesuffix("_bf16"), "sae_fast")
        versions = {name: distribution_version(name), "torch": torch.__version__}
        self.answer({"loss": loss, "versions": versions})

    def wait(self) -> None:
        """Report the sample that ends here, if one does, and block until the parent says go."""
        if self.left > 0:
            self.left -= 1
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.started is not None:
            self.report(*self.started)
        word, _, count = self.requests.readline().strip().partition(" ")
        if word != "go":
            raise TrainingOver
        self.asked = int(count)
        self.left = self.asked - 1
        self.started = (time.perf_counter(), time.process_time(), machine_busy_seconds())

    def report(self, start: float, cpu_start: float, busy_start: float) -> None:
        """The mean step of the sample that began then."""
        seconds = time.perf_counter() - start
        cpu = time.process_time() - cpu_start
        busy = machine_busy_seconds() - busy_start
        # A GPU does not care who uses the CPU.
        others = max(0.0, busy - cpu) / seconds if self.device.type == "cpu" else 0.0
        self.answer(
            {
                "seconds": seconds / self.asked,
                "cpu_seconds": cpu / self.asked,
                "others": others,
                "peak_bytes": self.memory.above(),
            }
        )

    def batches(self, job: Job) -> Iterator[Tensor]:
        """Batches for a loop that takes an iterator."""
        for step in range(job.steps):
            self.wait()
            yield job.batch(step)

    def answer(self, content: dict[str, Any]) -> None:
        """One line to the parent."""
        self.answers.write(json.dumps(content) + "\n")
        self.answers.flush()


def load_torch(device: torch.device) -> None:
    """Make torch load what it loads at first use, so that no contestant is charged for it."""
    weight = torch.nn.Parameter(torch.ones(64, 64, device=device))
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
    device = torch.device(request["device"])
    job = Job(request["contestant"], Size(**request["size"]), request["n_batches"], device)
    adapter = importlib.import_module(request["adapter"])
    _ = job.activations, job.weights  # made before memory is counted
    load_torch(device)
    try:
        adapter.train(job, Turns(sys.stdin, answers, job.contestant, device))
    except TrainingOver:
        return


if __name__ == "__main__":
    main()
