"""Measure what the pages of all latents cost beside encoding the tokens that they are of.

    python -m benchmarks.latents --json results/latents.json

The rows are planted: sums of directions of a dictionary that are drawn with heavy tails, so that
some latents fire a thousand times as often as others; the model is that dictionary. Each round
encodes all tokens and drops their codes, then makes and writes the pages of `sae_fast.latents` with
its default settings, from nothing to the finished folder. Both read the shards ahead with a thread.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.machine import command_line, describe_machine
from benchmarks.support.problem import Size, parse_size
from benchmarks.support.tables import (
    add_run_arguments,
    machine_line,
    markdown_table,
    publish,
    ratio,
)
from benchmarks.support.timing import Sample, interleave, measure
from sae_fast import SparseAutoencoder
from sae_fast.activations import open_shards, write_shard
from sae_fast.config import SAEConfig
from sae_fast.evaluation.code_store import CodeStore
from sae_fast.evaluation.latents import PageSettings, make_pages
from sae_fast.evaluation.text_rows import TextRows
from sae_fast.report.latent_viewer import Viewer

SHARD_ROWS = 1 << 18
DOCUMENT_ROWS = 200
TAIL, FLAT = 0.8, 10.0  # latent j fires in proportion to (j + FLAT)^-TAIL
NOISE = 0.02
VOCABULARY = 30_000
BLOCK_ROWS = 8192  # the default --batch-size


def make_model(size: Size) -> SparseAutoencoder:
    """Return a model whose encoder and decoder are one random dictionary of unit rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(size.d_sae, size.d_in, generator=generator)
    rows = torch.nn.functional.normalize(rows, dim=1)
    sae = SparseAutoencoder(SAEConfig(d_in=size.d_in, d_sae=size.d_sae, k=size.k))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae.eval().requires_grad_(False)


def write_rows(directory: Path, sae: SparseAutoencoder, size: Size) -> None:
    """Write shards of planted rows with tokens and documents."""
    generator = torch.Generator().manual_seed(1)
    rates = (torch.arange(size.d_sae) + FLAT).double() ** -TAIL
    until = rates.cumsum(0) / rates.sum()
    order = torch.randperm(size.d_sae, generator=generator)
    for number in range(-(-size.n_tokens // SHARD_ROWS)):
        count = min(SHARD_ROWS, size.n_tokens - number * SHARD_ROWS)
        drawn = torch.rand(count, size.k, generator=generator).double()
        latents = order[torch.searchsorted(until, drawn).clamp_max(size.d_sae - 1)]
        weights = torch.rand(count, size.k, generator=generator) + 0.5
        x = torch.nn.functional.embedding_bag(
            latents, sae.W_dec, per_sample_weights=weights, mode="sum"
        )
        x += NOISE * torch.randn(count, size.d_in, generator=generator)
        place = torch.arange(count)
        columns = {
            "token_ids": (VOCABULARY * torch.rand(count, generator=generator) ** 4).long(),
            "doc_id": place // DOCUMENT_ROWS + number * SHARD_ROWS,
            "position": place % DOCUMENT_ROWS,
        }
        write_shard(directory / f"train_{number:02d}.h5", x, **columns)


def encode_all(sae: SparseAutoencoder, text: TextRows) -> None:
    """Encode all rows and keep nothing."""
    with sae.kept_copies(), torch.no_grad():
        for _, x, _ in text.read(text.blocks(BLOCK_ROWS)):
            sae.encode(x)


def write_pages(sae: SparseAutoencoder, text: TextRows, settings: PageSettings, out: Path) -> None:
    """Make and write the pages of all latents into a new folder."""
    codes = out / "codes"
    codes.mkdir(parents=True)
    pages = make_pages(CodeStore(codes, sae, text, BLOCK_ROWS), sae.W_dec, settings)
    Viewer(pages, text, "latents", "", settings.intervals).write(out)


def time_size(size: Size, rounds: int) -> dict[str, Any]:
    """Return the seconds of both, round by round, and the ratios of each round."""
    settings = PageSettings()
    sae = make_model(size)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        write_rows(directory, sae, size)
        text = TextRows(open_shards(directory), settings.context_tokens)
        encode_all(sae, text)

        def pages() -> Sample:
            out = directory / "pages"
            sample = measure(lambda: write_pages(sae, text, settings, out))
            shutil.rmtree(out)
            return sample

        samplers = {"encode": lambda: measure(lambda: encode_all(sae, text)), "pages": pages}
        samples = interleave(samplers, rounds)
    return {
        "seconds": {name: [one.seconds for one in series] for name, series in samples.items()},
        "cpu_seconds": {
            name: [one.cpu_seconds for one in series] for name, series in samples.items()
        },
        "others": {name: [one.others for one in series] for name, series in samples.items()},
        "ratios": _ratios(samples, "seconds"),
        "cpu_ratios": _ratios(samples, "cpu_seconds"),
    }


def _ratios(samples: dict[str, list[Sample]], name: str) -> list[float]:
    pairs = zip(samples["pages"], samples["encode"], strict=True)
    return [getattr(slow, name) / getattr(fast, name) for slow, fast in pairs]


def report(result: dict[str, Any]) -> str:
    """Return the explanation and the table as Markdown."""
    parts = ["# Pages of all latents", "", __doc__.split("\n\n")[2].strip(), ""]
    headings = ["tokens, d_in, d_sae, k", "encode s", "pages s", "pages / encode, median"]
    headings += ["min", "max", "of CPU seconds", "CPUs of others", "rounds"]
    body = []
    for name, found in result["sizes"].items():
        seconds, ratios = found["seconds"], sorted(found["ratios"])
        others = found["others"]["encode"] + found["others"]["pages"]
        body.append(
            (
                name,
                f"{_median(seconds['encode']):.1f}",
                f"{_median(seconds['pages']):.1f}",
                ratio(_median(ratios)),
                ratio(ratios[0]),
                ratio(ratios[-1]),
                ratio(_median(found["cpu_ratios"])),
                f"{_median(others):.1f}",
                str(len(ratios)),
            )
        )
    parts += [markdown_table(headings, body), "", machine_line(result["machine"])]
    return "\n".join([*parts, "", f"`{result['command']}`"])


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else sum(ordered[middle - 1 : middle + 1]) / 2


def main() -> None:
    """Run, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.latents")
    parser.add_argument("--sizes", default="1048576x384x16384x32", help="as NxDxFxK")
    parser.add_argument("--rounds", type=int, default=3)
    add_run_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = {
        f"{size.n_tokens:,}, {size.d_in}, {size.d_sae:,}, {size.k}": time_size(size, options.rounds)
        for size in map(parse_size, options.sizes.split(","))
    }
    result = {"sizes": sizes, "machine": describe_machine(torch.device("cpu"))}
    result["command"] = command_line("benchmarks.latents")
    publish(result, report(result), options.json, options.markdown)


if __name__ == "__main__":
    main()
