"""Find the share of active latents from which a step on all latents is faster than on lists.

    python -m benchmarks.dense_switch --json results/dense_switch.json

A whole step of relu, jumprelu and gated (loss, backward, update with learning rate 0) is timed on
lists of the active latents and on all latents, at several shares of active latents, which the
encoder's bias sets. `DENSE_FROM` in autoencoder/thresholded.py is chosen where the curves cross.
"""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.machine import command_line, describe_machine, device_or_exit
from benchmarks.support.problem import Size, make_activations, make_weights, parse_size
from benchmarks.support.tables import (
    add_run_arguments,
    machine_line,
    markdown_table,
    milliseconds,
    percent,
    publish,
    ratio,
)
from benchmarks.support.timing import interleave, measure, median_ratio, quiet_rounds, summarize
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.thresholded import LISTED
from sae_fast.config import SAEConfig
from sae_fast.training.optimizer.row_optimizer import RowOptimizer

ARCHITECTURES = ("relu", "jumprelu", "gated")
SHARES = (0.01, 0.03, 0.06, 0.1, 0.15, 0.25, 0.4)
PATHS = ("sparse", "dense")


class Step:
    """A training step of a model in which a given share of all latents is listed."""

    def __init__(self, arch: str, size: Size, x: Tensor) -> None:
        config = SAEConfig(arch=arch, d_in=size.d_in, d_sae=size.d_sae)  # type: ignore[arg-type]
        self.sae = SparseAutoencoder(config).to(x.device)
        weights = make_weights(size, device=x.device)
        with torch.no_grad():
            self.sae.W_enc.copy_(weights.W_enc)
            self.sae.W_dec.copy_(weights.W_dec)
        self.optimizer = RowOptimizer(self.sae)
        self.x = x

    @torch.no_grad()
    def list_share(self, share: float) -> None:
        """Set the bias so that this share of the entries lies above the limit of the lists."""
        sample = self.x[:512]
        lowest = getattr(self.sae, "threshold", torch.zeros(())) - self._half_window()
        reached = (sample @ self.sae.W_enc.t() - lowest).flatten()
        count = max(1, round(share * reached.numel()))
        self.sae.b_enc.fill_(-float(reached.topk(count).values[-1]))

    def take(self, path: str) -> None:
        """Take one step on the path "sparse" or "dense", and wait until the device has finished."""
        listed = 0.0 if path == "sparse" else float(self.sae.config.d_sae)
        self.sae.get_buffer(LISTED).fill_(listed)
        with self.sae.kept_copies(session=self.optimizer):
            loss = self.sae.training_loss(self.x, dense_grad=False)
            loss.total.backward()  # type: ignore[no-untyped-call]
            self.sae.update_fired_(loss.code, len(self.x))
            self.optimizer.step(0.0)
            self.optimizer.zero_grad()
        if self.x.is_cuda:
            torch.cuda.synchronize()

    def _half_window(self) -> float:
        config = self.sae.config
        return config.jumprelu_bandwidth / 2 if config.arch == "jumprelu" else 0.0


def time_share(step: Step, share: float, rounds: int) -> dict[str, Any]:
    """Time both paths at one share of listed latents, interleaved; return the row of the table."""
    step.list_share(share)
    samplers = {path: lambda path=path: measure(lambda: step.take(path)) for path in PATHS}
    for path in PATHS:
        step.take(path)
    samples = interleave(samplers, rounds)
    seconds = {path: summarize(samples[path]).median for path in PATHS}
    quiet = quiet_rounds([samples[path] for path in PATHS])
    is_quiet = all(samples[path][turn].quiet for path in PATHS for turn in quiet)
    share_ratio = median_ratio(samples["sparse"], samples["dense"])
    found = {"share": share, **seconds, "sparse_over_dense": share_ratio}
    return {**found, "rounds": rounds, "quiet_rounds": len(quiet) if is_quiet else 0}


def crossing(rows: list[dict[str, Any]]) -> float | None:
    """Return the interpolated share at which both paths take equally long; None if none does."""
    for below, above in itertools.pairwise(rows):
        low, high = (math.log(row["sparse_over_dense"]) for row in (below, above))
        if low < 0 <= high:
            part = low / (low - high)
            return float(below["share"] ** (1 - part) * above["share"] ** part)
    return None


def report(result: dict[str, Any]) -> str:
    """Return the explanations and the tables as Markdown."""
    parts = ["# Steps on all latents, and on the listed ones", "", __doc__.split("\n\n")[2].strip()]
    for name, architectures in result["sizes"].items():
        parts += ["", f"## {name}", ""]
        body = []
        for arch, found in architectures.items():
            for row in found["rows"]:
                times = [milliseconds(row[path]) for path in PATHS]
                apart = ratio(row["sparse_over_dense"])
                quiet = f"{row['quiet_rounds']}/{row['rounds']}"
                body.append([f"{arch}, {percent(row['share'])} listed", *times, apart, quiet])
            place = "-" if found["crossing"] is None else percent(found["crossing"])
            body.append([f"{arch}: equal at a share of", "", "", place, ""])
        headings = ["step", "listed ms", "all latents ms", "listed / all", "quiet rounds"]
        parts.append(markdown_table(headings, body))
    parts += ["", machine_line(result["machine"]), "", f"`{result['command']}`"]
    return "\n".join(parts)


def main() -> None:
    """Run, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.dense_switch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sizes", default="S1,S2", help="S1…S4, G1…G3 or NxDxFxK (k is not used)")
    parser.add_argument("--rounds", type=int, default=5)
    add_run_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = device_or_exit(options.device)
    result: dict[str, Any] = {"sizes": {}}
    for size in map(parse_size, options.sizes.split(",")):
        x = make_activations(size, 1, device=device)
        found = result["sizes"][size.describe().rsplit(", ", 1)[0] + ")"] = {}
        for arch in ARCHITECTURES:
            step = Step(arch, size, x)
            rows = [time_share(step, share, options.rounds) for share in SHARES]
            found[arch] = {"rows": rows, "crossing": crossing(rows)}
    result |= {"machine": describe_machine(device)}
    result["command"] = command_line("benchmarks.dense_switch")
    table = report(result)
    publish(result, table, options.json, options.markdown)


if __name__ == "__main__":
    main()
