"""Time implementations beside each other, in groups that fit in memory.

Every group contains sae_fast, so that a ratio always compares two times of one round.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.implementations import StepTrainer, adapter_module, in_bf16, make_local
from benchmarks.support.memory import available_bytes, peak_since_now
from benchmarks.support.peer_process import PeerProcess
from benchmarks.support.problem import (
    CPU,
    Size,
    Weights,
    learning_rate,
    make_activations,
    make_weights,
)
from benchmarks.support.timing import Sample, calls_per_sample, interleave, measure

N_BATCHES = 4
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
PAUSE_SECONDS = 0.05
MEMORY_SHARE = 0.75
PEER_LIBRARY_BYTES = 700 * 2**20
COMPILE_SECONDS = 45.0  # rough time of torch.compile before its first step is done


@dataclass
class Outcome:
    """Measurements of one implementation over the groups that contained it."""

    first_loss: float = math.nan
    samples: list[Sample] = field(default_factory=list)
    # Samples of each mode of sae_fast in the rounds of `samples`.
    sae_fast_samples: dict[str, list[Sample]] = field(default_factory=dict)
    peak_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    failure: str | None = None  # the reason if there are no samples


@dataclass
class Comparison:
    """The implementations measured at one size, and the settings of the measurement."""

    size: Size
    ours: list[str]
    local: list[str]
    peers: dict[str, str]  # name to interpreter
    rounds: int
    warmup: int
    threads: int
    device: torch.device = CPU
    deadline: float = math.inf  # on time.monotonic's clock; no implementation is built after it


class LocalRunner:
    """An implementation that runs in this process, on one batch after the other."""

    def __init__(self, trainer: StepTrainer, batches: Sequence[Tensor]) -> None:
        self.trainer = trainer
        self.batches = batches
        self.device = batches[0].device
        self.calls = 1  # steps in a sample
        self.steps = 0

    def run(self) -> Tensor:
        """Take one training step on the next batch; return its loss."""
        x = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        return self.trainer.step(x)

    def sample(self) -> Sample:
        """Time one step, or on a GPU the mean of `calls` steps."""
        return measure(self.run, self.device, self.calls)

    def warm_up(self, samples: int) -> float:
        """Take untimed samples, set the steps of later ones, return the fastest step in seconds."""
        seconds = min(self.sample().seconds for _ in range(samples))
        self.calls = calls_per_sample(seconds, self.device)
        return seconds


def run_groups(comparison: Comparison) -> dict[str, Outcome]:
    """Measure every implementation of a comparison; return the outcomes by name.

    An implementation that fails, or whose loss at step 0 differs from the first one's, is not
    timed; its outcome says why.
    """
    outcomes: dict[str, Outcome] = {}
    weights = make_weights(comparison.size, device=comparison.device)
    activations = make_activations(comparison.size, N_BATCHES, device=comparison.device)
    batches = list(activations.split(comparison.size.n_tokens))  # type: ignore[no-untyped-call]
    speed: dict[str, float] = {}
    for group in split_groups(comparison):
        say(f"  group: {', '.join([*comparison.ours, *group])}")
        run_group(comparison, group, weights, batches, speed, outcomes)
    return outcomes


def split_groups(comparison: Comparison) -> list[list[str]]:
    """Split the baselines and peers into groups whose training states fit in memory together."""
    size = comparison.size
    states = 12 * size.parameters  # weights and both moments
    transient = 4 * (2 * size.parameters + 4 * size.n_tokens * size.d_sae)
    budget = MEMORY_SHARE * available_bytes(comparison.device) - transient
    budget -= len(comparison.ours) * states
    groups: list[list[str]] = [[]]
    used = 0.0
    for name in [*comparison.local, *comparison.peers]:
        # A peer's process keeps its own transient memory between its steps.
        extra = transient + PEER_LIBRARY_BYTES if name in comparison.peers else 0
        if groups[-1] and used + states + extra > budget:
            groups.append([])
            used = 0.0
        groups[-1].append(name)
        used += states + extra
    return groups


def run_group(
    comparison: Comparison,
    group: list[str],
    weights: Weights,
    batches: Sequence[Tensor],
    speed: dict[str, float],  # seconds a step of the baselines so far: `compile` takes the fastest
    outcomes: dict[str, Outcome],
) -> None:
    """Build, check, warm up and time one group; add the samples to `outcomes`."""
    processes: dict[str, PeerProcess] = {}
    with ExitStack() as stack:

        def build(name: str) -> Callable[[], Sample]:
            if name not in comparison.peers:
                return prepare_local(name, comparison, weights, batches, speed, outcomes)
            arguments = (adapter_module(name), comparison.peers[name], comparison.size, N_BATCHES)
            peer = PeerProcess(name, *arguments, comparison.threads, comparison.device)
            processes[name] = stack.enter_context(peer)
            return prepare_peer(peer, comparison, outcomes)

        samplers: dict[str, Callable[[], Sample]] = {}
        for name in [*comparison.ours, *group]:
            outcomes.setdefault(name, Outcome())
            sampler = prepare(name, build, comparison, outcomes[name])
            if sampler is not None:
                samplers[name] = sampler
        pause = PAUSE_SECONDS if comparison.device.type == "cpu" else 0.0
        samples = interleave(samplers, comparison.rounds, pause, comparison.deadline)
    for name, series in samples.items():
        outcome = outcomes[name]
        outcome.samples += series
        for mode in comparison.ours:
            outcome.sae_fast_samples.setdefault(mode, []).extend(samples.get(mode, []))
        if name in processes:
            outcome.peak_bytes = processes[name].peak_bytes
            outcome.versions = processes[name].versions


def prepare(
    name: str,
    build: Callable[[str], Callable[[], Sample]],
    comparison: Comparison,
    outcome: Outcome,
) -> Callable[[], Sample] | None:
    """Build an implementation and return its sampler, or None if it fails or time has run out.

    The reason is kept in the outcome, for the table; other implementations are still measured.
    """
    needed = COMPILE_SECONDS if name.startswith("compile") else 0.0
    if time.monotonic() + needed > comparison.deadline and name not in comparison.ours:
        outcome.failure = "no time left"
        return None
    try:
        return build(name)
    except torch.cuda.OutOfMemoryError:
        outcome.failure = "out of memory"
    except Exception as error:  # a compiler or a peer may raise any type
        outcome.failure = (str(error).strip() or repr(error)).splitlines()[0]
        say(f"    {name}: {error!r}")
    return None


def prepare_local(
    name: str,
    comparison: Comparison,
    weights: Weights,
    batches: Sequence[Tensor],
    speed: dict[str, float],
    outcomes: dict[str, Outcome],
) -> Callable[[], Sample]:
    """Build an implementation in this process, check its first loss and warm it up."""
    device = comparison.device
    memory = peak_since_now(device)
    build_as = compiled_baseline(name, speed) if name.startswith("compile") else name
    size = comparison.size
    runner = LocalRunner(make_local(build_as, weights, size.k, learning_rate(size)), batches)
    record_first_loss(outcomes, name, float(runner.run()), device.type)
    speed[name] = runner.warm_up(comparison.warmup)
    if device.type == "cuda":
        outcomes[name].peak_bytes = memory.above()
        torch.cuda.empty_cache()  # the other implementations need the memory
    return runner.sample


def prepare_peer(
    peer: PeerProcess, comparison: Comparison, outcomes: dict[str, Outcome]
) -> Callable[[], Sample]:
    """Check the first loss of an implementation in a process of its own and warm it up."""
    record_first_loss(outcomes, peer.implementation, peer.first_loss, comparison.device.type)
    peer.step()
    seconds = min(peer.step().seconds for _ in range(comparison.warmup))
    calls = calls_per_sample(seconds, comparison.device)
    return lambda: peer.step(calls)


def record_first_loss(
    outcomes: dict[str, Outcome], name: str, loss: float, device_type: str = "cpu"
) -> None:
    """Keep a first loss; raise RuntimeError if it differs from the first implementation's.

    Times of implementations that compute different losses cannot be compared.
    """
    known = [outcome.first_loss for outcome in outcomes.values()]
    reference = next((value for value in known if math.isfinite(value)), loss)
    # A peer's own autocast starts after this loss was taken, but the wider tolerance does no harm.
    tolerance = LOSS_TOLERANCE["bf16" if in_bf16(name, device_type) else "fp32"]
    if not abs(loss - reference) <= tolerance * abs(reference):
        raise RuntimeError(
            f"{name}: loss at step 0 is {loss}, expected {reference} within {tolerance:g} relative"
        )
    outcomes.setdefault(name, Outcome()).first_loss = loss
    say(f"    {name}: loss at step 0 {loss:.4f}")


def compiled_baseline(name: str, speed: dict[str, float]) -> str:
    """Return `compile:NAME` for the fastest eager baseline so far in the precision of `name`."""
    suffix = name.removeprefix("compile")
    candidates = [base + suffix for base in ("eager", "tuned", "gather") if base + suffix in speed]
    best = min(candidates or [f"tuned{suffix}"], key=lambda base: speed.get(base, 0.0))
    return f"compile:{best}"


def measure_memory(name: str, size: Size, threads: int, steps: int) -> int:
    """Return how far memory rises, in bytes, in steps of an implementation in its own process.

    It is counted from the state before the model is built.
    """
    build_as = name.replace("compile", "compile:tuned") if name.startswith("compile") else name
    with PeerProcess(build_as, adapter_module(name), sys.executable, size, 1, threads) as process:
        for _ in range(steps):
            process.step()
        return process.peak_bytes


def say(text: str) -> None:
    """Print a line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)
