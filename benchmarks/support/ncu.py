"""Read the output of `ncu --csv --page raw`, and shorten the names of kernels."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.support.tables import markdown_table

# ncu's name of a metric: the heading of its column.
METRICS = {
    "gpu__time_duration.sum": "µs",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "lts__t_sector_hit_rate.pct": "L2 hits %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
}
TIME = "gpu__time_duration.sum"
MICROSECONDS = {
    **{"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0},
    **{"msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6},
}


@dataclass(frozen=True)
class Launch:
    """One profiled launch: its kernel's bare name, and its metrics, times in microseconds."""

    kernel: str
    metrics: Mapping[str, float]


def base_name(name: str) -> str:
    """Return a kernel's name without types, namespaces and arguments, as in ncu's --kernel-name.

    The name of `void a::(anonymous namespace)::f<float, 4>(int*)` is `f`.
    """
    if name.startswith(("Memcpy", "Memset")):
        return name
    name = name.replace("(anonymous namespace)", "").removeprefix("void ")
    # Template arguments nest and contain parentheses; the name is the text outside of all.
    depth = 0
    outside: list[str] = []
    for letter in name:
        if letter in "<(" and depth == 0 and not outside:
            return name
        if letter in "<(":
            depth += 1
        if depth == 0:
            outside.append(letter)
        if letter in ">)":
            depth -= 1
        if letter == "(" and depth == 1:
            break  # the function's arguments follow
    bare = "".join(outside).strip()
    return re.split(r"::|\s", bare)[-1] or name


def read_launches(text: str) -> list[Launch]:
    """Return the launches in a raw page; raise ValueError if there are none."""
    # The program's own output and ncu's messages, which begin with ==, come before the table.
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith('"ID",')]
    if not heads:
        last = next((line for line in reversed(lines) if line.strip()), "nothing")
        raise ValueError(f"ncu wrote no table, but at the end: {last}")
    rows = list(csv.DictReader(line for line in lines[heads[0] :] if line.startswith('"')))
    units, *measured = rows  # the second line of the page holds the units
    if not measured:
        raise ValueError("ncu met none of the kernels")
    return [
        Launch(
            base_name(row["Kernel Name"]),
            {name: number(row[name], units[name]) for name in METRICS if row.get(name)},
        )
        for row in measured
    ]


def number(text: str, unit: str) -> float:
    """Return a value of the page; times become microseconds, because ncu chooses their unit."""
    return float(text.replace(",", "")) * MICROSECONDS.get(unit, 1.0)


def summary_table(launches: Sequence[Launch], order: Sequence[str]) -> str:
    """Return a table of medians over each kernel's launches, first the kernels in `order`."""
    names = dict.fromkeys([name for name in order if any(name == x.kernel for x in launches)])
    names |= dict.fromkeys(launch.kernel for launch in launches)
    rows = []
    for name in names:
        own = [launch.metrics for launch in launches if launch.kernel == name]
        values = [[metrics[metric] for metrics in own if metric in metrics] for metric in METRICS]
        cells = [f"{statistics.median(found):.1f}" if found else "-" for found in values]
        rows.append([name, str(len(own)), *cells])
    return markdown_table(["kernel", "launches", *METRICS.values()], rows)
