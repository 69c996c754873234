"""Timing on a machine with other programs: interleaved rounds and the CPU time of the others.

A sample is quiet if other processes together used less than `QUIET_SHARE` of one CPU while it ran.
Statistics use the quiet rounds if there are enough of them, and count them. On a CUDA device a
sample is the mean of several calls between two events, and always quiet.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

QUIET_SHARE = 0.15
ENOUGH_QUIET_ROUNDS = 3
CPU = torch.device("cpu")
# A CUDA sample is so long that neither the events nor a late launch matter.
SAMPLE_SECONDS = 0.02
MOST_CALLS = 32
FLUSH_BYTES = 512 * 2**20  # several times any L2


@dataclass(frozen=True)
class Sample:
    """One timed call."""

    seconds: float
    cpu_seconds: float  # CPU time of the process that did the work
    others: float  # CPUs that other processes kept busy during the sample

    @property
    def quiet(self) -> bool:
        """Whether other processes used less than QUIET_SHARE of a CPU."""
        return self.others < QUIET_SHARE


@dataclass(frozen=True)
class Summary:
    """Median, minimum and maximum of a series of times, in seconds."""

    median: float
    minimum: float
    maximum: float
    cpu_median: float
    rounds: int
    quiet_rounds: int


def machine_busy_seconds() -> float:
    """Return the CPU seconds of all processes since boot; 0 if the system does not report them."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return 0.0
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")


def calls_per_sample(seconds: float, device: torch.device) -> int:
    """Return how many calls of the given length make one sample."""
    if device.type == "cpu":
        return 1
    return min(MOST_CALLS, max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))


def measure(call: Callable[[], object], device: torch.device = CPU, calls: int = 1) -> Sample:
    """Time one call, or on CUDA the mean of `calls` calls launched one after the other."""
    if device.type == "cuda":
        return measure_on_cuda(call, calls)
    busy, cpu, start = machine_busy_seconds(), time.process_time(), time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu
    others = max(0.0, machine_busy_seconds() - busy - cpu_seconds) / seconds
    return Sample(seconds, cpu_seconds, others)


def measure_on_cuda(call: Callable[[], object], calls: int) -> Sample:
    """Time some calls, from the first launch to the last end on the device; return their mean."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    cpu = time.process_time()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    seconds = start.elapsed_time(end) / 1e3
    return Sample(seconds / calls, (time.process_time() - cpu) / calls, 0.0)


def measure_cold(call: Callable[[], object], device: torch.device, calls: int = 1) -> Sample:
    """Time `calls` calls, each after the L2 cache was overwritten; return their mean.

    All calls are enqueued before the device reaches them, so that no launch is late. On a CPU one
    call is timed as `measure` does.
    """
    if device.type == "cpu":
        return measure(call)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    seconds = sum(start.elapsed_time(end) for start, end in pairs) / 1e3 / calls
    return Sample(seconds, 0.0, 0.0)


def interleave(
    samplers: Mapping[str, Callable[[], Sample]],
    rounds: int,
    pause: float = 0.0,
    deadline: float = math.inf,
) -> dict[str, list[Sample]]:
    """Call every sampler once per round, in an order that rotates; return the samples by name.

    No round begins after the deadline, a time of `time.monotonic`, except the first
    ENOUGH_QUIET_ROUNDS.
    """
    names = list(samplers)
    if not names:
        return {}
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in range(rounds):
        if turn >= ENOUGH_QUIET_ROUNDS and time.monotonic() > deadline:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if pause:
                time.sleep(pause)  # until the threads of the previous sampler stop spinning
            samples[name].append(samplers[name]())
    return samples


def quiet_rounds(series: Sequence[Sequence[Sample]]) -> list[int]:
    """Return the rounds in which every series was quiet; all rounds if these are too few."""
    rounds = range(min(len(samples) for samples in series))
    quiet = [turn for turn in rounds if all(samples[turn].quiet for samples in series)]
    return quiet if len(quiet) >= ENOUGH_QUIET_ROUNDS else list(rounds)


def summarize(samples: Sequence[Sample]) -> Summary:
    """Return the medians over the quiet rounds, and minimum and maximum over all rounds."""
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
    """Return the median over rounds of slower / faster, both measured in the same round."""
    rounds = quiet_rounds([slower, faster])
    return statistics.median(slower[turn].seconds / faster[turn].seconds for turn in rounds)


def best_seconds(
    call: Callable[[], object], repeats: int = 5, warmup: int = 1, device: torch.device = CPU
) -> float:
    """Return the seconds of the fastest of several calls, for the rates in the floors."""
    for _ in range(warmup):
        call()
    calls = 1 if device.type == "cpu" else calls_per_sample(measure(call, device).seconds, device)
    return min(measure(call, device, calls).seconds for _ in range(repeats))
