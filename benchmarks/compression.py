"""Measure the size and the speed of writing and reading shards, by compression.

    python -m benchmarks.compression --shard-dir DIR --json results/compression.json

The rows of a directory are written as one shard of each kind by `ShardWriter` (checksum, flush to
disk and rename included) and read in whole blocks from the page cache, as training reads them. One
thread is used; rates count the bytes of the rows before compression.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.machine import command_line, describe_machine
from benchmarks.support.tables import (
    add_run_arguments,
    machine_line,
    markdown_table,
    percent,
    publish,
    ratio,
)
from benchmarks.support.timing import interleave, measure, median_ratio, summarize
from sae_fast.activations import HeldOut, open_shards, write_shard
from sae_fast.activations.compression import COMPRESSIONS
from sae_fast.activations.shard import ShardFile, inspect_shard, iterate_stored
from sae_fast.activations.storage import BFLOAT16, FLOAT16


def read_through(path: Path) -> None:
    """Read all rows of a shard, in blocks."""
    with ShardFile(inspect_shard(path)) as file:
        for _ in iterate_stored(file):
            pass


def compare(rows: Tensor, rounds: int) -> dict[str, dict[str, Any]]:  # rows [N, D]
    """Write and read the rows with every compression, interleaved; return sizes and rates."""
    samplers = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.h5" for name in COMPRESSIONS}
        for name, path in paths.items():
            write = partial(write_shard, path, rows, compression=name)
            write()
            samplers[f"write {name}"] = partial(measure, write)
            samplers[f"read {name}"] = partial(measure, partial(read_through, path))
        samples = interleave(samplers, rounds)
        sizes = {name: path.stat().st_size / rows.nbytes for name, path in paths.items()}
    found = {}
    for name in COMPRESSIONS:
        summaries = {what: summarize(samples[f"{what} {name}"]) for what in ("write", "read")}
        found[name] = {
            "size": sizes[name],
            **{f"{what}_bytes_per_second": rows.nbytes / s.median for what, s in summaries.items()},
            "read_over_gzip": median_ratio(samples["read gzip"], samples[f"read {name}"]),
            "quiet_rounds": min(s.quiet_rounds for s in summaries.values()),
        }
    return found


def report(result: dict[str, Any]) -> str:
    """Return the explanations and the tables as Markdown."""
    parts = ["# Compression of shards", "", __doc__.split("\n\n")[2].strip(), "", result["rows"]]
    for dtype, found in result["dtypes"].items():
        body = [
            [
                name,
                percent(one["size"]),
                f"{one['write_bytes_per_second'] / 1e6:.0f}",
                f"{one['read_bytes_per_second'] / 1e6:.0f}",
                ratio(one["read_over_gzip"]),
                f"{one['quiet_rounds']}/{result['rounds']}",
            ]
            for name, one in found.items()
        ]
        headings = [dtype, "size", "write MB/s", "read MB/s", "read speed / gzip", "quiet rounds"]
        parts += ["", markdown_table(headings, body)]
    parts += ["", machine_line(result["machine"]), "", f"`{result['command']}`"]
    return "\n".join(parts)


def main() -> None:
    """Run, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.compression")
    parser.add_argument("--shard-dir", type=Path, required=True, help="activations to compress")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-rows", type=int, default=16384, help="take the first rows only")
    add_run_arguments(parser, threads=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shards = open_shards(options.shard_dir)
    rows = next(iter(HeldOut(shards, batch_size=options.max_rows, max_rows=options.max_rows)))
    result: dict[str, Any] = {"rounds": options.rounds, "dtypes": {}}
    result["rows"] = f"{len(rows):,} rows of {rows.shape[1]}, stored as {shards.storage.name}."
    for storage in (FLOAT16, BFLOAT16):
        result["dtypes"][storage.name] = compare(rows.to(storage.torch_dtype), options.rounds)
    result |= {"machine": describe_machine(), "command": command_line("benchmarks.compression")}
    table = report(result)
    publish(result, table, options.json, options.markdown)


if __name__ == "__main__":
    main()
