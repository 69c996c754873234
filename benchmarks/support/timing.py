"""Timing on a machine that others use too: interleaved rounds, and how busy the others were.

A sample is quiet when other processes together took less than `QUIET_SHARE` of one CPU while it
ran. Statistics use the quiet rounds when there are enough of them and say how many there were.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

QUIET_SHARE = 0.15
ENOUGH_QUIET_ROUNDS = 3


@dataclass(frozen=True)
class Sample:
    """One timed call."""

    seconds: float
    cpu_seconds: float  # of the process that did the work
    others: float  # CPUs that other processes kept busy meanwhile

    @property
    def quiet(self) -> bool:
        """Whether the machine was nearly ours."""
        return self.others < QUIET_SHARE


@dataclass(frozen=True)
class Summary:
    """Median, minimum and maximum of a series of times in seconds."""

    median: float
    minimum: float
    maximum: float
    cpu_median: float
    rounds: int
    quiet_rounds: int


def machine_busy_seconds() -> float:
    """CPU seconds that all processes have used since boot; 0 where the system does not tell."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return 0.0
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")


def measure(call: Callable[[], object]) -> Sample:
    """Time one call."""
    busy, cpu, start = machine_busy_seconds(), time.process_time(), time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu
    others = max(0.0, machine_busy_seconds() - busy - cpu_seconds) / seconds
    return Sample(seconds, cpu_seconds, others)


def interleave(
    samplers: Mapping[str, Callable[[], Sample]], rounds: int, pause: float = 0.0
) -> dict[str, list[Sample]]:
    """Let every sampler take one sample a round, in an order that rotates from round to round."""
    names = list(samplers)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if pause:
                time.sleep(pause)  # threads of the one before stop spinning
            samples[name].append(samplers[name]())
    return samples


def quiet_rounds(series: Sequence[Sequence[Sample]]) -> list[int]:
    """Rounds in which every given series was quiet; all rounds when those are too few."""
    rounds = range(min(len(samples) for samples in series))
    quiet = [turn for turn in rounds if all(samples[turn].quiet for samples in series)]
    return quiet if len(quiet) >= ENOUGH_QUIET_ROUNDS else list(rounds)


def summarize(samples: Sequence[Sample]) -> Summary:
    """Statistics over the quiet rounds; the minimum and maximum over all of them."""
    chosen = [samples[turn] for turn in quiet_rounds([samples])]
    times = [sample.seconds for sample in samples]
    return Summary(
        median=statistics.median(sample.seconds for sample in chosen),
        minimum=min(times),
        maximum=max(times),
        cpu_median=statistics.median(sample.cpu_seconds for sample in chosen),
        rounds=len(samples),
        quiet_rounds=sum(sample.quiet for sample in samples),
    )


def median_ratio(slower: Sequence[Sample], faster: Sequence[Sample]) -> float:
    """Median over rounds of slower / faster, both measured in the same round."""
    rounds = quiet_rounds([slower, faster])
    return statistics.median(slower[turn].seconds / faster[turn].seconds for turn in rounds)


def best_seconds(call: Callable[[], object], repeats: int = 5, warmup: int = 1) -> float:
    """The fastest of several calls: what the hardware can do, for rates that floors are made of."""
    for _ in range(warmup):
        call()
    return min(measure(call).seconds for _ in range(repeats))
