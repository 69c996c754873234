"""Train with one implementation's own loop in this process, as many steps as the parent asks for.

`support/peer_process.py` starts it as `python -m benchmarks.worker`, in the implementation's
interpreter, which need not have sae_fast. Standard input carries one JSON line, the job, and then
one line `go N` for every sample of N steps; each is answered by one JSON line on standard output. A
step lasts from the moment the implementation receives a batch to the moment it asks for the next
one; on a GPU the last step of a sample lasts until the device has finished.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
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

# More steps than any run takes, so that it is always the parent that ends the loop.
STEPS = 100_000
# The learning rate of a run of known length: the shares at its start and end of rise and fall.
RISE, FALL = 0.05, 0.4


class TrainingOver(BaseException):
    """Ends an implementation's loop; a BaseException, so that no loop catches it."""


@dataclass(frozen=True)
class Job:
    """Model size, data and first weights of a training, equal for all implementations."""

    implementation: str
    size: Size
    n_batches: int
    device: torch.device = CPU
    steps: int = STEPS
    length: int | None = None  # steps of the run, None: unknown, and a constant learning rate
    data: str | None = None  # file of torch.save with "rows" and "heldout"; None: made rows
    rate: float | None = None  # learning rate; None: sae_fast's default at this size
    seed: int = 0  # of the first weights

    @property
    def autocast(self) -> bool:
        """Whether to train in bf16 autocast."""
        return self.implementation.endswith("_bf16")

    @property
    def learning_rate(self) -> float:
        """The learning rate: the one asked for, or sae_fast's default at this size."""
        return learning_rate(self.size) if self.rate is None else self.rate

    @property
    def rise_steps(self) -> int:
        """Steps at the start in which the learning rate rises; 0 in a run of unknown length."""
        return round(RISE * (self.length or 0))

    @property
    def fall_steps(self) -> int:
        """Steps at the end in which the learning rate falls; 0 in a run of unknown length."""
        return round(FALL * (self.length or 0))

    @cached_property
    def activations(self) -> Tensor:
        """The rows of all batches, [n_batches * N, D]."""
        if self.data is not None:
            rows: Tensor = torch.load(self.data)["rows"]
            return rows.to(self.device)
        return make_activations(self.size, self.n_batches, device=self.device)

    @property
    def heldout(self) -> Tensor | None:
        """Rows [H, D] to evaluate on, where the data are given."""
        if self.data is None:
            return None
        rows: Tensor = torch.load(self.data)["heldout"]
        return rows.to(self.device)

    @cached_property
    def weights(self) -> Weights:
        """The weights before the first step."""
        return make_weights(self.size, seed=1 + self.seed, device=self.device)

    def first_row(self, step: int) -> int:
        """Return the index of the first row of a step's batch."""
        return step % self.n_batches * self.size.n_tokens

    def batch(self, step: int) -> Tensor:
        """Return the batch [N, D] of a step."""
        first = self.first_row(step)
        return self.activations[first : first + self.size.n_tokens]


class WorkerProtocol:
    """The worker's side of the exchange: gives out batches on request and reports the times."""

    def __init__(
        self, requests: TextIO, answers: TextIO, implementation: str, device: torch.device = CPU
    ) -> None:
        self.requests = requests
        self.answers = answers
        self.implementation = implementation
        self.device = device
        self.memory = peak_since_now(device)
        self.heldout: Tensor | None = None
        self.reconstruct: Callable[[Tensor], Tensor] | None = None
        self.started: tuple[float, float, float] | None = None
        self.asked = self.left = 0  # steps in this sample, and how many of them are left

    def before_model(self) -> None:
        """Start to count memory; call it when data and libraries are loaded, before the model."""
        self.memory = peak_since_now(self.device)

    def ready(self, loss: float, reconstruct: Callable[[Tensor], Tensor]) -> None:
        """Report that the model is built.

        Args:
            loss: its squared error on the first batch.
            reconstruct: the implementation's own inference, x [N, D] to x_hat [N, D].
        """
        self.reconstruct = reconstruct
        name = DISTRIBUTIONS.get(self.implementation.removesuffix("_bf16"), "sae_fast")
        versions = {name: distribution_version(name), "torch": torch.__version__}
        self.answer({"loss": loss, "versions": versions})

    def wait(self) -> None:
        """Count a step; after a sample's last one report the sample and wait for the next request.

        A request to evaluate is answered at once, outside the times of the samples. Raises
        TrainingOver when the parent sends no further request.
        """
        if self.left > 0:
            self.left -= 1
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.started is not None:
            self.report(*self.started)
        while (line := self.requests.readline().strip()) == "evaluate":
            self.answer({"fvu": self.heldout_fvu()})
        word, _, count = line.partition(" ")
        if word != "go":
            raise TrainingOver
        self.asked = int(count)
        self.left = self.asked - 1
        self.started = (time.perf_counter(), time.process_time(), machine_busy_seconds())

    @torch.no_grad()
    def heldout_fvu(self) -> float:
        """Return Σ|x − x̂|² / Σ|x − mean(x)|² over the held-out rows."""
        assert self.heldout is not None
        assert self.reconstruct is not None
        error = 0.0
        for x in self.heldout.split(4096):  # type: ignore[no-untyped-call]
            error += float((x - self.reconstruct(x)).double().square().sum())
        centred = self.heldout - self.heldout.mean(0)
        return error / float(centred.double().square().sum())

    def report(self, start: float, cpu_start: float, busy_start: float) -> None:
        """Send the mean step of the sample that began at these times."""
        seconds = time.perf_counter() - start
        cpu = time.process_time() - cpu_start
        busy = machine_busy_seconds() - busy_start
        # Other programs on the CPU do not slow a GPU down.
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
        """Yield the batches [N, D], for a loop that takes an iterator."""
        for step in range(job.steps):
            self.wait()
            yield job.batch(step)

    def answer(self, content: dict[str, Any]) -> None:
        """Send one JSON line to the parent."""
        self.answers.write(json.dumps(content) + "\n")
        self.answers.flush()


def load_torch(device: torch.device) -> None:
    """Make torch load its libraries now, so that no implementation's memory includes them."""
    weight = torch.nn.Parameter(torch.ones(64, 64, device=device))
    optimizer = torch.optim.Adam([weight])
    (weight @ weight).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def main() -> None:
    """Serve one parent process until it closes the pipe."""
    # Libraries may print; the original standard output carries only answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    device = torch.device(request["device"])
    job = Job(
        request["implementation"],
        Size(**request["size"]),
        request["n_batches"],
        device,
        # One step beyond the run's length, so that it is the parent that ends the loop.
        steps=STEPS if request["length"] is None else request["length"] + 1,
        length=request["length"],
        data=request["data"],
        rate=request["rate"],
        seed=request["seed"],
    )
    adapter = importlib.import_module(request["adapter"])
    _ = job.activations, job.weights  # created before memory is counted
    load_torch(device)
    protocol = WorkerProtocol(sys.stdin, answers, job.implementation, device)
    protocol.heldout = job.heldout
    try:
        adapter.train(job, protocol)
    except TrainingOver:
        return


if __name__ == "__main__":
    main()
