"""Runs contestants against each other in heats that fit in memory.

sae_fast takes part in every heat, so that every ratio comes from rounds both were in.
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

from benchmarks.contestants import StepTrainer, adapter_module, in_bf16, make_local
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
COMPILE_SECONDS = 45.0  # that torch.compile takes before its first step is done, about


@dataclass
class Outcome:
    """What a contestant did in the heats it took part in."""

    first_loss: float = math.nan
    samples: list[Sample] = field(default_factory=list)
    rivals: dict[str, list[Sample]] = field(default_factory=dict)  # sae_fast in the same rounds
    peak_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    failure: str | None = None  # why there are no samples


@dataclass
class Field:
    """Everybody who is to be measured at one size, and how."""

    size: Size
    ours: list[str]
    local: list[str]
    peers: dict[str, str]  # name to interpreter
    rounds: int
    warmup: int
    threads: int
    device: torch.device = CPU
    deadline: float = math.inf  # of time.monotonic: nobody new is built after it


class LocalRunner:
    """A contestant in this process, fed batch after batch."""

    def __init__(self, trainer: StepTrainer, batches: Sequence[Tensor]) -> None:
        self.trainer = trainer
        self.batches = batches
        self.device = batches[0].device
        self.calls = 1  # steps of a sample
        self.steps = 0

    def run(self) -> Tensor:
        """One step on the next batch."""
        x = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        return self.trainer.step(x)

    def sample(self) -> Sample:
        """One timed step, or on a GPU the mean of some."""
        return measure(self.run, self.device, self.calls)

    def warm_up(self, samples: int) -> float:
        """Untimed steps; returns what a step took at best, and makes samples long enough."""
        seconds = min(self.sample().seconds for _ in range(samples))
        self.calls = calls_per_sample(seconds, self.device)
        return seconds


def run_heats(entrants: Field) -> dict[str, Outcome]:
    """Measure everybody; who computes another loss at step 0, or fails, is not timed."""
    outcomes: dict[str, Outcome] = {}
    weights = make_weights(entrants.size, device=entrants.device)
    activations = make_activations(entrants.size, N_BATCHES, device=entrants.device)
    batches = list(activations.split(entrants.size.n_tokens))  # type: ignore[no-untyped-call]
    speed: dict[str, float] = {}
    for heat in split_heats(entrants):
        say(f"  heat: {', '.join([*entrants.ours, *heat])}")
        run_heat(entrants, heat, weights, batches, speed, outcomes)
    return outcomes


def split_heats(entrants: Field) -> list[list[str]]:
    """Groups of contestants whose parameters and optimiser states fit in memory together."""
    size = entrants.size
    states = 12 * size.parameters  # weights and both moments
    transient = 4 * (2 * size.parameters + 4 * size.n_tokens * size.d_sae)
    budget = MEMORY_SHARE * available_bytes(entrants.device) - transient
    budget -= len(entrants.ours) * states
    heats: list[list[str]] = [[]]
    used = 0.0
    for name in [*entrants.local, *entrants.peers]:
        # A peer's process keeps its own transient memory between its steps.
        extra = transient + PEER_LIBRARY_BYTES if name in entrants.peers else 0
        if heats[-1] and used + states + extra > budget:
            heats.append([])
            used = 0.0
        heats[-1].append(name)
        used += states + extra
    return heats


def run_heat(
    entrants: Field,
    heat: list[str],
    weights: Weights,
    batches: Sequence[Tensor],
    speed: dict[str, float],  # of baselines already seen: decides what `compile` compiles
    outcomes: dict[str, Outcome],
) -> None:
    """One heat: build, check, warm up, time, and add to the outcomes."""
    processes: dict[str, PeerProcess] = {}
    with ExitStack() as stack:

        def enter(name: str) -> Callable[[], Sample]:
            if name not in entrants.peers:
                return enter_local(name, entrants, weights, batches, speed, outcomes)
            arguments = (adapter_module(name), entrants.peers[name], entrants.size, N_BATCHES)
            peer = PeerProcess(name, *arguments, entrants.threads, entrants.device)
            processes[name] = stack.enter_context(peer)
            return enter_peer(peer, entrants, outcomes)

        samplers: dict[str, Callable[[], Sample]] = {}
        for name in [*entrants.ours, *heat]:
            outcomes.setdefault(name, Outcome())
            sampler = entered(name, enter, entrants, outcomes[name])
            if sampler is not None:
                samplers[name] = sampler
        pause = PAUSE_SECONDS if entrants.device.type == "cpu" else 0.0
        samples = interleave(samplers, entrants.rounds, pause, entrants.deadline)
    for name, series in samples.items():
        outcome = outcomes[name]
        outcome.samples += series
        for own in entrants.ours:
            outcome.rivals.setdefault(own, []).extend(samples.get(own, []))
        if name in processes:
            outcome.peak_bytes = processes[name].peak_bytes
            outcome.versions = processes[name].versions


def entered(
    name: str,
    enter: Callable[[str], Callable[[], Sample]],
    entrants: Field,
    outcome: Outcome,
) -> Callable[[], Sample] | None:
    """A contestant ready to be timed; what stops it stops it alone, and stands in the table."""
    needed = COMPILE_SECONDS if name.startswith("compile") else 0.0
    if time.monotonic() + needed > entrants.deadline and name not in entrants.ours:
        outcome.failure = "no time left"
        return None
    try:
        return enter(name)
    except torch.cuda.OutOfMemoryError:
        outcome.failure = "out of memory"
    except Exception as error:  # a compiler or a peer may raise anything
        outcome.failure = (str(error).strip() or repr(error)).splitlines()[0]
        say(f"    {name}: {error!r}")
    return None


def enter_local(
    name: str,
    entrants: Field,
    weights: Weights,
    batches: Sequence[Tensor],
    speed: dict[str, float],
    outcomes: dict[str, Outcome],
) -> Callable[[], Sample]:
    """Build a contestant in this process, check its loss, warm it up."""
    device = entrants.device
    memory = peak_since_now(device)
    build_as = compiled_baseline(name, speed) if name.startswith("compile") else name
    size = entrants.size
    runner = LocalRunner(make_local(build_as, weights, size.k, learning_rate(size)), batches)
    record_first_loss(outcomes, name, float(runner.run()), device.type)
    speed[name] = runner.warm_up(entrants.warmup)
    if device.type == "cuda":
        outcomes[name].peak_bytes = memory.above()
        torch.cuda.empty_cache()  # others, in this process and beside it, need the memory
    return runner.sample


def enter_peer(
    peer: PeerProcess, entrants: Field, outcomes: dict[str, Outcome]
) -> Callable[[], Sample]:
    """Check the loss of a contestant in a process of its own, warm it up."""
    record_first_loss(outcomes, peer.contestant, peer.first_loss, entrants.device.type)
    peer.step()
    seconds = min(peer.step().seconds for _ in range(entrants.warmup))
    calls = calls_per_sample(seconds, entrants.device)
    return lambda: peer.step(calls)


def record_first_loss(
    outcomes: dict[str, Outcome], name: str, loss: float, device_type: str = "cpu"
) -> None:
    """Keep the loss; raise if it is not that of the first contestant: speeds mean nothing then."""
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
    """The fastest baseline so far of that precision, as the contestant that compiles it."""
    suffix = name.removeprefix("compile")
    candidates = [base + suffix for base in ("eager", "tuned", "gather") if base + suffix in speed]
    best = min(candidates or [f"tuned{suffix}"], key=lambda base: speed.get(base, 0.0))
    return f"compile:{best}"


def measure_memory(name: str, size: Size, threads: int, steps: int) -> int:
    """Peak memory of a local contestant's steps above the state before its model, alone."""
    build_as = name.replace("compile", "compile:tuned") if name.startswith("compile") else name
    with PeerProcess(build_as, adapter_module(name), sys.executable, size, 1, threads) as process:
        for _ in range(steps):
            process.step()
        return process.peak_bytes


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
