"""Measure the rate of streaming shards beside reading their files, and the shuffle's quality.

    python -m benchmarks.stream --shard-dir DIR --json results/stream.json

Files are written for the measurement, removed from the page cache (`posix_fadvise`, DONTNEED) and
read from end to end, with plain reads of 4 MiB and by the stream, which also checks, shuffles and
widens the rows. The time includes the first window, which must be full before a row is served. The
shuffle is measured on whole epochs: on the rows of a directory, and on generated documents of 512
tokens, in shards with as many rows in a chunk as shards of width 768 have.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from benchmarks.support.machine import command_line, describe_machine
from benchmarks.support.shuffle_quality import NEAR_TOKENS, measure_shuffle
from benchmarks.support.tables import (
    add_run_arguments,
    machine_line,
    markdown_table,
    percent,
    publish,
)
from benchmarks.support.timing import interleave, measure, median_ratio, summarize
from sae_fast.activations import ActivationStream, open_shards, write_shard
from sae_fast.activations.compression import COMPRESSIONS
from sae_fast.activations.shard_set import ShardSet

BATCH = 4096
READ_BYTES = 4 << 20
D_IN = 768
CHUNK_ROWS = 2730  # ShardWriter's chunk of float16 rows of width D_IN
DOCUMENT_TOKENS = 512
COLUMNS = ("doc_id", "position")


def forget(paths: list[Path]) -> None:
    """Remove files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(paths: list[Path]) -> None:
    """Read all bytes of the files, one file after the other."""
    buffer = bytearray(READ_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def stream_through(shards: ShardSet, pool_rows: int) -> None:
    """Read one epoch from a stream."""
    with ActivationStream(shards, batch_size=BATCH, pool_rows=pool_rows) as stream:
        while stream.tokens_served < shards.rows:
            stream.next_batch()


def time_streams(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure the rates of every compression, from the disk and from the page cache."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for name in options.compressions:
            paths = [Path(folder) / name / f"shard_{number:02d}.h5" for number in range(4)]
            paths[0].parent.mkdir()
            for path in paths:
                rows = torch.randn(options.rows // len(paths), D_IN, generator=generator).half()
                write_shard(path, rows, compression=name)
            shards = open_shards(paths, verify=False)
            for cold in (True, False):
                prepare = partial(forget if cold else read_plainly, paths)
                work = {
                    "plain": partial(read_plainly, paths),
                    "stream": partial(stream_through, shards, options.pool_rows),
                }
                samplers = {
                    what: partial(_prepared, prepare, partial(measure, task))
                    for what, task in work.items()
                }
                samples = interleave(samplers, options.rounds)
                summaries = {what: summarize(samples[what]) for what in work}
                found[f"{name}, {'disk' if cold else 'page cache'}"] = {
                    **{
                        f"{what}_rows_per_second": shards.rows / s.median
                        for what, s in summaries.items()
                    },
                    "stored_bytes_per_row": sum(p.stat().st_size for p in paths) / shards.rows,
                    "share_of_plain": median_ratio(samples["plain"], samples["stream"]),
                    "quiet_rounds": min(s.quiet_rounds for s in summaries.values()),
                }
    return found


def _prepared(prepare: Any, sample: Any) -> Any:
    prepare()
    return sample()


def made_documents(directory: Path, rows: int) -> ShardSet:
    """Write four shards of documents whose rows are a vector of the document plus noise."""
    rng = np.random.default_rng(0)
    for number in range(4):
        first, count = rows * number // 4, rows // 4
        doc_id = np.arange(first, first + count) // DOCUMENT_TOKENS
        own = np.random.default_rng(1).standard_normal((rows // DOCUMENT_TOKENS + 1, 4))
        x = own[doc_id] + rng.standard_normal((count, 4))
        with h5py.File(directory / f"{number}.h5", "w") as file:
            file.create_dataset("activations", data=x.astype(np.float16), chunks=(CHUNK_ROWS, 4))
            file["doc_id"] = doc_id.astype(np.int32)
            file["position"] = (np.arange(first, first + count) % DOCUMENT_TOKENS).astype(np.int32)
    return open_shards(directory, columns=COLUMNS)


def measure_pools(shards: ShardSet, batch_size: int, pools: list[int], epochs: int) -> list[Any]:
    """Measure the quality of the shuffle with each size of the pool."""
    found = []
    for pool_rows in pools:
        with ActivationStream(
            shards, batch_size=batch_size, pool_rows=pool_rows, columns=COLUMNS
        ) as stream:
            quality = measure_shuffle(stream, epochs)
        found.append({"pool_rows": pool_rows, "batch_size": batch_size, **asdict(quality)})
    return found


def measure_shuffles(options: argparse.Namespace) -> dict[str, list[Any]]:
    """Measure the quality of the shuffle on a directory and on generated documents."""
    found = {}
    if options.shard_dir is not None:
        shards = open_shards(options.shard_dir, columns=COLUMNS)
        pools = [shards.rows // part for part in (8, 4, 2, 1)]
        what = f"{options.shard_dir.name}, {shards.rows:,} rows"
        found[what] = measure_pools(shards, 512, pools, epochs=4)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        shards = made_documents(Path(folder), options.made_rows)
        pools = [shards.rows // part for part in (64, 16, 4, 1)]
        what = f"{shards.rows:,} made rows, {DOCUMENT_TOKENS} a document"
        found[what] = measure_pools(shards, min(BATCH, shards.rows // 8), pools, epochs=1)
    return found


def report(result: dict[str, Any]) -> str:
    """Return the explanations and the tables as Markdown."""
    paragraphs = (__doc__ or "").split("\n\n")
    parts = ["# The stream", "", paragraphs[2].strip(), "", "## Reading", ""]
    parts += [f"{result['rows']:,} rows of {D_IN} in float16, pool of {result['pool_rows']:,}.", ""]
    body = [
        [
            name,
            f"{one['stored_bytes_per_row']:.0f}",
            f"{one['plain_rows_per_second']:,.0f}",
            f"{one['stream_rows_per_second']:,.0f}",
            percent(one["share_of_plain"]),
            f"{one['quiet_rounds']}/{result['rounds']}",
        ]
        for name, one in result["reading"].items()
    ]
    headings = ["files from", "bytes/row", "plain rows/s", "stream rows/s", "stream / plain"]
    headings.append("quiet rounds")
    parts += [markdown_table(headings, body), "", "## Shuffling", ""]
    parts += [
        "Three numbers are relative to a full shuffle: in a batch, the pairs of rows of one "
        f"document and the pairs that are also at most {NEAR_TOKENS} tokens apart; and the "
        "variance of the batches' means. *Companions* are the other rows of its document that a "
        "row meets in its batch."
    ]
    headings = ["pool rows", "batch", "same document", "near", "variance of means", "companions"]
    for name, pools in result["shuffling"].items():
        body = [
            [
                f"{one['pool_rows']:,}",
                f"{one['batch_size']:,}",
                f"{one['document_ratio']:.2f}×",
                f"{one['near_ratio']:.2f}×",
                f"{one['variance_ratio']:.2f}×",
                f"{one['companions']:.1f}",
            ]
            for one in pools
        ]
        parts += ["", f"{name}:", "", markdown_table(headings, body)]
    parts += ["", machine_line(result["machine"]), "", f"`{result['command']}`"]
    return "\n".join(parts)


def main() -> None:
    """Run, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.stream")
    parser.add_argument("--shard-dir", type=Path, help="activations with doc_id and position")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the files to read")
    parser.add_argument(
        "--made-rows", type=int, default=1 << 20, help="rows of generated documents"
    )
    parser.add_argument("--pool-rows", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compressions", nargs="+", default=("none", "zstd"), choices=COMPRESSIONS)
    parser.add_argument("--scratch", type=Path, help="folder for temporary files; default: /tmp")
    add_run_arguments(parser, threads=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {name: getattr(options, name) for name in ("rows", "pool_rows")}
    result |= {"rounds": options.rounds, "reading": time_streams(options)}
    result |= {"shuffling": measure_shuffles(options)}
    result |= {"machine": describe_machine(), "command": command_line("benchmarks.stream")}
    table = report(result)
    publish(result, table, options.json, options.markdown)


if __name__ == "__main__":
    main()
