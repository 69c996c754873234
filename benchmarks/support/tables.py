"""Markdown tables and JSON files of results, and the flags that name these files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def add_run_arguments(parser: argparse.ArgumentParser, threads: int = 2) -> None:
    """Add the flags that every benchmark has: --threads, and the files of results."""
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with text in the first column and numbers in the others."""
    lines = ["| " + " | ".join(headings) + " |"]
    lines.append("|" + "|".join(["---", *["---:"] * (len(headings) - 1)]) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def machine_line(machine: Mapping[str, Any]) -> str:
    """Return one sentence about the machine and the versions behind the numbers."""
    gpu = ""
    if "gpu" in machine:
        gpu = (
            f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, driver "
            f"{machine['driver_version']}, CUDA {machine['cuda']}, SM clock "
            f"{machine['clocks_sm']} of {machine['clocks_max_sm']}; "
        )
    date = f"{machine['date']}: " if "date" in machine else ""
    return (
        f"{date}{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"{machine['threads']} threads; torch {machine['torch']} "
        f"({machine['torch_cpu_capability']}), sae_fast {machine['sae_fast']} "
        f"({machine['sae_fast_instruction_set']}), Python {machine['python']}."
    )


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds with three significant digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    """Format a ratio of times; None becomes "-"."""
    return "-" if value is None else f"{value:.2f}×"


def percent(value: float | None) -> str:
    """Format a share as a percentage; None becomes "-"."""
    return "-" if value is None else f"{value * 100:.0f} %"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of results, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a file of tables, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content.rstrip() + "\n")


def publish(
    result: Mapping[str, Any], table: str, json_path: Path | None, markdown_path: Path | None
) -> None:
    """Write the numbers and the table to the given files, if any, and print the table."""
    if json_path:
        write_json(json_path, result)
    if markdown_path:
        write_text(markdown_path, table)
    print(table)
