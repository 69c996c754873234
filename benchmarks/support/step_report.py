"""The results of `train_step.py`: the JSON entry of a size, and the tables made from it.

On a GPU the tables take sae_fast's times from its CUDA graph if that was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.implementations import PRECISIONS, describe
from benchmarks.support.floors import FORMULA, Floor, Rates
from benchmarks.support.groups import Outcome
from benchmarks.support.problem import Size
from benchmarks.support.tables import machine_line, markdown_table, milliseconds, percent, ratio
from benchmarks.support.timing import median_ratio, summarize


def size_result(
    size: Size,
    outcomes: Mapping[str, Outcome],
    rates: Mapping[str, Rates],
    floors: Mapping[str, Floor],
) -> dict[str, Any]:
    """Return the measurements of one size as they are stored in JSON."""
    implementations: dict[str, dict[str, Any]] = {}
    for name, outcome in outcomes.items():
        if not outcome.samples:
            implementations[name] = {"failure": outcome.failure or "not measured"}
            continue
        summary = summarize(outcome.samples)
        implementations[name] = {
            **asdict(summary),
            "tokens_per_second": size.n_tokens / summary.median,
            "ratios": {
                mode: median_ratio(outcome.samples, series)
                for mode, series in outcome.sae_fast_samples.items()
                if series
            },
            "loss_at_step_0": outcome.first_loss,
            "peak_bytes_above_start": outcome.peak_bytes,
            "versions": outcome.versions,
            "share_of_floor": share_of_floor(name, summary.median, floors),
            "samples": [asdict(sample) for sample in outcome.samples],
        }
    return {
        "size": asdict(size),
        "contestants": implementations,
        "rates": {precision: asdict(rate) for precision, rate in rates.items()},
        "floors": {precision: floor.as_dict() for precision, floor in floors.items()},
    }


def share_of_floor(name: str, median: float, floors: Mapping[str, Floor]) -> float | None:
    """Return floor / median time for a mode of sae_fast, None for another implementation."""
    precision = PRECISIONS.get(name)
    return None if precision is None else floors[precision].total / median


def read_results(path: Path | None) -> dict[str, Any]:
    """Return the sizes in the JSON file of an earlier run; none if there is no such file."""
    if path is None or not path.exists():
        return {}
    sizes: dict[str, Any] = json.loads(path.read_text())["sizes"]
    return sizes


def report(results: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    parts = [
        "# One training step",
        "Select, decode, loss, AuxK bookkeeping, backward, projection, clip, Adam, unit norm, dead "
        "counters; all implementations have the same rows, weights, k and clip. Times are "
        "milliseconds over interleaved rounds; a ratio is the median over rounds of (its time / "
        "sae_fast's time in that round), so above 1 sae_fast is faster. Memory is the peak of a "
        "step above the state before the model is built, parameters and optimiser included: "
        "resident memory in a process of its own, on a GPU the memory that torch has allocated.",
        "## Summary",
    ]
    on_cpu = {name: result for name, result in results.items() if not on_gpu(result)}
    on_cuda = {name: result for name, result in results.items() if on_gpu(result)}
    parts += [summary_table(on_cpu)] if on_cpu else []
    parts += [cuda_summary_table(on_cuda)] if on_cuda else []
    for result in results.values():
        parts += size_section(result)
    return "\n\n".join(parts)


def summary_table(results: Mapping[str, Any]) -> str:
    """Return the summary for a CPU: per size the main ratios and the share of the floor."""
    headings = [
        "size",
        "default vs eager fp32",
        "default vs tuned fp32",
        "bf16 mode vs eager fp32",
        "bf16 mode vs tuned bf16 autocast",
        "default vs sparsify",
        "share of floor, default / bf16",
    ]
    rows = []
    for name, result in results.items():
        implementations = result["contestants"]
        modes = ("sae_fast", "sae_fast_bf16")
        shares = [implementations.get(own, {}).get("share_of_floor") for own in modes]
        rows.append(
            [
                name,
                ratio(ratio_to(implementations, ["eager"], "sae_fast")),
                ratio(ratio_to(implementations, ["tuned", "gather"], "sae_fast")),
                ratio(ratio_to(implementations, ["eager"], "sae_fast_bf16")),
                ratio(ratio_to(implementations, ["tuned_bf16", "gather_bf16"], "sae_fast_bf16")),
                ratio(ratio_to(implementations, ["sparsify"], "sae_fast")),
                " / ".join(percent(share) for share in shares),
            ]
        )
    note = '"tuned" is the faster of the two gather-based PyTorch versions at that size.'
    return markdown_table(headings, rows) + "\n\n" + note


def on_gpu(result: Mapping[str, Any]) -> bool:
    """Return whether a size was measured on a GPU."""
    return "gpu" in result["machine"]


def graph_if_measured(implementations: Mapping[str, Any], name: str) -> str:
    """Return the name of a mode's CUDA graph if that was measured, otherwise `name`."""
    graph = name.replace("sae_fast", "sae_fast_graph")
    return graph if "median" in implementations.get(graph, {}) else name


def cuda_summary_table(results: Mapping[str, Any]) -> str:
    """Return the summary for a GPU: per size and mode time, ratios, memory, share of the floor."""
    headings = [
        *("size", "mode", "ms", "vs eager bf16 autocast", "vs gather bf16 autocast"),
        *("vs sparsify", "vs eager fp32", "peak GiB", "share of floor"),
    ]
    others = ("eager_bf16", "gather_bf16", "sparsify", "eager")
    rows = []
    for name, result in results.items():
        implementations = result["contestants"]
        for mode in ("sae_fast", "sae_fast_bf16"):
            own = graph_if_measured(implementations, mode)
            data = implementations.get(own, {})
            if "median" not in data:
                continue
            peak = data["peak_bytes_above_start"]
            rows.append(
                [
                    name,
                    describe(own, "cuda"),
                    milliseconds(data["median"]),
                    *(ratio(ratio_to(implementations, [other], own)) for other in others),
                    "-" if peak is None else f"{peak / 2**30:.2f}",
                    percent(data["share_of_floor"]),
                ]
            )
    return markdown_table(headings, rows)


def ratio_to(implementations: Mapping[str, Any], names: Sequence[str], own: str) -> float | None:
    """Return the fastest of `names` over a mode of sae_fast; None if there is no such ratio."""
    measured = [
        implementations[name] for name in names if "ratios" in implementations.get(name, {})
    ]
    ratios = [data["ratios"].get(own) for data in measured]
    known = [value for value in ratios if value is not None]
    return min(known) if known else None


def size_section(result: Mapping[str, Any]) -> list[str]:
    """Return the heading, table, floor and origin of one size."""
    size, implementations = Size(**result["size"]), result["contestants"]
    kind = "cuda" if on_gpu(result) else "cpu"
    own = [graph_if_measured(implementations, name) for name in ("sae_fast", "sae_fast_bf16")]
    headings = [
        *("implementation", "median ms", "min", "max", "tokens/s"),
        *("vs default", "vs bf16 mode", "peak MiB", "loss at step 0", "quiet rounds"),
    ]
    rows = []
    for name, data in implementations.items():
        if "failure" in data:
            rows.append([describe(name, kind), f"did not run: {data['failure']}", *["-"] * 8])
            continue
        peak = data["peak_bytes_above_start"]
        rows.append(
            [
                describe(name, kind),
                milliseconds(data["median"]),
                milliseconds(data["minimum"]),
                milliseconds(data["maximum"]),
                f"{data['tokens_per_second']:,.0f}",
                *(ratio(data["ratios"].get(base)) for base in own),
                "-" if peak is None else f"{peak / 2**20:,.0f}",
                f"{data['loss_at_step_0']:.3f}",
                f"{data['quiet_rounds']}/{data['rounds']}",
            ]
        )
    parts = [f"## {size.describe()}", markdown_table(headings, rows), *floor_lines(result)]
    parts.append(memory_line(size))
    if result["missing"]:
        parts.append("Not installed, so not measured: " + ", ".join(result["missing"]) + ".")
    versions = [
        f"{package} {version}"
        for data in implementations.values()
        for package, version in data.get("versions", {}).items()
        if package not in ("torch", "sae_fast")
    ]
    if versions:
        parts.append("Peers: " + ", ".join(dict.fromkeys(versions)) + ".")
    parts.append(f"{machine_line(result['machine'])}\n`{result['command']}`")
    return parts


def memory_line(size: Size) -> str:
    """Return a sentence about the memory that every trainer needs, to compare the column with."""
    states, gradients = 12 * size.parameters, 4 * size.parameters
    batch, pre_acts = 4 * size.n_tokens * size.d_in, 4 * size.n_tokens * size.d_sae
    mebi = [f"{count / 2**20:,.0f}" for count in (states, batch, pre_acts, gradients)]
    return (
        f"Memory that any trainer needs: weights and both moments {mebi[0]} MiB; one [N, d_in] "
        f"array takes {mebi[1]} MiB. A dense step adds [N, d_sae] arrays of {mebi[2]} MiB each "
        f"and dense gradients of {mebi[3]} MiB."
    )


def floor_lines(result: Mapping[str, Any]) -> list[str]:
    """Return each mode's floor: its parts, the rates behind them, and the share reached."""
    lines = [f"Floor of a step, {FORMULA}:"]
    for mode in ("sae_fast", "sae_fast_bf16"):
        name = graph_if_measured(result["contestants"], mode)
        if "median" not in result["contestants"].get(name, {}):
            continue
        precision = PRECISIONS[name]
        floor, rates = result["floors"][precision], result["rates"][precision]
        share = result["contestants"][name]["share_of_floor"]
        lines.append(
            f"- {precision}: {milliseconds(floor['product'])} + {milliseconds(floor['gathers'])} + "
            f"{milliseconds(floor['optimizer'])} = {milliseconds(floor['total'])} ms, "
            f"{percent(share)} reached; product {rates['product'] / 1e9:.0f} GFLOP/s "
            f"({rates['product_source']}), gathers {rates['gather_latents'] / 1e9:.0f} GB/s from "
            f"W_dec and {rates['gather_tokens'] / 1e9:.0f} GB/s from a batch, stream "
            f"{rates['stream'] / 1e9:.0f} GB/s"
        )
    return ["\n".join(lines)]
