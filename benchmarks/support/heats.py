"""Runs contestants against each other in heats that fit in memory.

sae_fast takes part in every heat, so that every ratio comes from rounds both were in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.contestants import StepTrainer, adapter_module, make_local
from benchmarks.support.memory import available_bytes
from benchmarks.support.peer_process import PeerProcess
from benchmarks.support.problem import (
    Size,
    Weights,
    learning_rate,
    make_activations,
    make_weights,
)
from benchmarks.support.timing import Sample, interleave, measure

N_BATCHES = 4
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
PAUSE_SECONDS = 0.05
MEMORY_SHARE = 0.75
PEER_LIBRARY_BYTES = 700 * 2**20


@dataclass
class Outcome:
    """What a contestant did in the heats it took part in."""

    first_loss: float
    samples: list[Sample] = field(default_factory=list)
    rivals: dict[str, list[Sample]] = field(default_factory=dict)  # sae_fast in the same rounds
    peak_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)


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


class LocalRunner:
    """A contestant in this process, fed batch after batch."""

    def __init__(self, trainer: StepTrainer, batches: Sequence[Tensor]) -> None:
        self.trainer = trainer
        self.batches = batches
        self.steps = 0

    def run(self) -> Tensor:
        """One step on the next batch."""
        x = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        return self.trainer.step(x)

    def sample(self) -> Sample:
        """One timed step."""
        return measure(self.run)


def run_heats(entrants: Field) -> dict[str, Outcome]:
    """Measure everybody; raises RuntimeError if one computes another loss at step 0."""
    outcomes: dict[str, Outcome] = {}
    weights = make_weights(entrants.size)
    activations = make_activations(entrants.size, N_BATCHES)
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
    budget = MEMORY_SHARE * available_bytes() - transient
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
    size, samplers = entrants.size, dict[str, Callable[[], Sample]]()
    processes: dict[str, PeerProcess] = {}
    with ExitStack() as stack:
        for name in [*entrants.ours, *(name for name in heat if name not in entrants.peers)]:
            build_as = compiled_baseline(speed) if name == "compile" else name
            trainer = make_local(build_as, weights, size.k, learning_rate(size))
            runner = LocalRunner(trainer, batches)
            record_first_loss(outcomes, name, float(runner.run()))
            speed[name] = min(runner.sample().seconds for _ in range(entrants.warmup))
            samplers[name] = runner.sample
        for name in (name for name in heat if name in entrants.peers):
            peer = PeerProcess(
                name, adapter_module(name), entrants.peers[name], size, N_BATCHES, entrants.threads
            )
            processes[name] = stack.enter_context(peer)
            record_first_loss(outcomes, name, peer.first_loss)
            for _ in range(entrants.warmup + 1):
                peer.step()
            samplers[name] = peer.step
        samples = interleave(samplers, entrants.rounds, pause=PAUSE_SECONDS)
    for name, series in samples.items():
        outcome = outcomes[name]
        outcome.samples += series
        for own in entrants.ours:
            outcome.rivals.setdefault(own, []).extend(samples[own])
        if name in processes:
            outcome.peak_bytes = processes[name].peak_bytes
            outcome.versions = processes[name].versions


def record_first_loss(outcomes: dict[str, Outcome], name: str, loss: float) -> None:
    """Keep the loss; raise if it is not that of the first contestant: speeds mean nothing then."""
    outcomes.setdefault(name, Outcome(loss))
    reference = next(iter(outcomes.values())).first_loss
    # A peer's own autocast starts after this loss was taken, but the wider tolerance does no harm.
    tolerance = LOSS_TOLERANCE["bf16" if name.endswith("_bf16") else "fp32"]
    if not abs(loss - reference) <= tolerance * abs(reference):
        raise RuntimeError(
            f"{name}: loss at step 0 is {loss}, expected {reference} within {tolerance:g} relative"
        )
    say(f"    {name}: loss at step 0 {loss:.4f}")


def compiled_baseline(speed: dict[str, float]) -> str:
    """The fastest fp32 baseline so far, as the contestant that compiles it."""
    candidates = [name for name in ("eager", "tuned", "gather") if name in speed]
    return f"compile:{min(candidates or ['tuned'], key=lambda name: speed.get(name, 0.0))}"


def measure_memory(name: str, size: Size, threads: int, steps: int) -> int:
    """Peak memory of a local contestant's steps above the state before its model, alone."""
    build_as = "compile:tuned" if name == "compile" else name
    with PeerProcess(build_as, adapter_module(name), sys.executable, size, 1, threads) as process:
        for _ in range(steps):
            process.step()
        return process.peak_bytes


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
