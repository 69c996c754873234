"""Train supervised slots on biographies; measure relations, answers, and swaps of relations.

    python -m benchmarks.biographies --json benchmarks/results/biographies.json

The data are invented people with six facts each, and a small GPT-2 that has learned the facts, both
made by `sae_fast.biographies`. Slots are trained jointly on the sentences of most people, once for
each layer. On the layer from which a linear probe reads answers best, latents and value heads are
also trained one after the other. All figures are measured on the held-out people, which the
language model knows and the autoencoder has never seen.

A value head reads an answer from one number, the strength of its slot, which is linear in the
activation. *Spread* shows whether this is possible: a linear map is fitted that places the answers
of a relation on a line, at equal distances, and the spread is the root mean square distance of
held-out activations from their answer's place, in units of half the distance between neighbours. If
the deviations are normal, 95 % of them stay on the right side up to a spread of 0.51.

A swap sets the slot of the relation in the question to 0 and the slot of another relation to a
strength, in units of its typical strength. It succeeds if the language model then gives this
person's answer to the other question (in brackets: any answer to it). Its upper limit is a patch,
which inserts the activation of the other question in the same phrasing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.machine import command_line, describe_machine, distribution_version
from benchmarks.support.tables import add_run_arguments, machine_line, markdown_table, publish
from sae_fast import SAEConfig, SparseAutoencoder, TrainConfig, Trainer
from sae_fast.biographies import main as make_biographies
from sae_fast.ground_truth.biographies import files
from sae_fast.ground_truth.biographies.language_model import BiographyModel
from sae_fast.ground_truth.biographies.swap import swap_success
from sae_fast.ground_truth.biographies.text import RELATIONS

MODES = ("joint", "separate_activation", "separate_value")
FIGURES = ("slot_accuracy", "value_accuracy", "fvu", "l0")


def make_data(
    options: argparse.Namespace, answers: int, directory: Path
) -> tuple[BiographyModel, dict[str, Any]]:
    """Return the language model and the figures of its making; make both if they do not exist."""
    if not (directory / files.BIOGRAPHIES).exists():
        sizes = {
            "--entities": options.entities,
            "--answers": answers,
            "--steps": options.language_model_steps,
            "--blocks": options.blocks,
            "--d-model": options.d_model,
            "--num-threads": options.threads,
        }
        flags = [word for name, value in sizes.items() for word in (name, str(value))]
        if make_biographies([*flags, "--out", str(directory)]) != 0:
            raise SystemExit("the biographies could not be made")
    content = json.loads((directory / files.BIOGRAPHIES).read_text(encoding="utf-8"))
    return files.load(directory), content["measured"]


def spread_of_answers(model: BiographyModel, layer: int) -> float:
    """Return the root mean square distance of held-out activations from their answers' places.

    For each relation a linear map is fitted (ridge, on the people that are not held out) that sends
    the activation of answer a to the number a. The unit is half the distance between neighbours: if
    the deviations are normal, 95 % of them stay on the right side up to 0.51.
    """
    sides = []
    for heldout in (False, True):
        sentences = model.biographies.sentences(heldout=heldout)
        parts = [found[layer] for _, found in model.activations(model.prompts(sentences), [layer])]
        sides.append((torch.cat(parts).double(), files.label_columns(model.biographies, sentences)))
    (x, labels), (x_heldout, heldout_labels) = sides
    mean = x.mean(0)
    scale = (x - mean).square().mean().rsqrt()
    squares = []
    for relation in range(len(RELATIONS)):
        rows, others = labels["relation"] == relation, heldout_labels["relation"] == relation
        fitted, target = (x[rows] - mean) * scale, labels["answer"][rows].double()
        gram = fitted.t() @ fitted + torch.eye(x.size(1), dtype=x.dtype)
        weights = torch.linalg.solve(gram, fitted.t() @ (target - target.mean()))
        found = (x_heldout[others] - mean) * scale @ weights + target.mean()
        squares.append((found - heldout_labels["answer"][others]).square())
    return float(torch.cat(squares).mean().sqrt()) / 0.5


class Training:
    """Trainings of slots.

    The coefficients are not the defaults. Beside a reconstruction error summed over 128 dimensions,
    value heads and alignment need larger weights. The penalty keeps the free slots from taking over
    relations. With a target near the norm that a relation adds to an activation, a swap at strength
    1 has an effect.
    """

    def __init__(self, options: argparse.Namespace, data: Path, runs: Path) -> None:
        self.options, self.data, self.runs = options, data, runs

    def run(self, layer: int, mode: str) -> tuple[SparseAutoencoder, dict[str, Any]]:
        """Train one mode on one layer; return the model and its figures.

        separate_value starts from the model of separate_activation, which must be trained before.
        """
        runs = self.runs / f"layer_{layer}"
        config = self._train_config(layer, mode, runs)
        trainer = Trainer(self._sae_config(mode), config, show_progress=False)
        begin = time.monotonic()
        sae = trainer.train()
        last = trainer.history[-1]
        found: dict[str, Any] = {
            name: last[f"heldout_{name}"] for name in FIGURES if f"heldout_{name}" in last
        }
        found |= {"steps": trainer.step, "seconds": time.monotonic() - begin}
        print(f"layer {layer}, {mode}: {found}", flush=True)
        return sae, found

    def _sae_config(self, mode: str) -> SAEConfig:
        options = self.options
        terms = {"slot_target": options.slot_target}
        if mode != "separate_value":
            terms["l1_penalty_coeff"] = options.l1_penalty_coeff
            terms["alignment_coeff"] = options.alignment_coeff
        if mode != "separate_activation":
            terms["value_loss_coeff"] = options.value_loss_coeff
        d_sae = options.free_slots + len(RELATIONS)
        return SAEConfig(arch="slots", d_sae=d_sae, slots_mode=mode, **terms)

    def _train_config(self, layer: int, mode: str, runs: Path) -> TrainConfig:
        options, alone = self.options, mode == "separate_value"
        first = 0 if alone else options.reconstruction_epochs
        return TrainConfig(
            shard_dir=str(files.layer_directory(self.data, layer)),
            batch_size=options.batch_size,
            learning_rate=options.lr,
            optimizer="adamw",
            weight_decay=0.01,
            reconstruction_epochs=first,
            max_epochs=first + options.epochs,
            start_from=str(runs / "feature_activation") if alone else None,
            checkpoint_dir=str(runs),
            log_every=1000,
            eval_every=0,
            checkpoint_every=0,
            num_threads=options.threads,
        )


def measure(options: argparse.Namespace, answers: int, directory: Path) -> dict[str, Any]:
    """Make data with `answers` answers a relation, train, and swap slots; return the figures."""
    begin = time.monotonic()
    data = (options.data or directory) / f"answers_{answers}"
    model, measured = make_data(options, answers, data)
    seconds = time.monotonic() - begin
    probes = {int(layer): found for layer, found in measured["probes"].items()}
    best = max(probes, key=lambda layer: probes[layer]["answer"])
    training = Training(options, data, directory / "runs" / data.name)
    heldout = model.biographies.sentences(heldout=True)
    layers: dict[str, Any] = {}
    for layer, probe in probes.items():
        if layer != best and answers != options.answers[0]:
            continue
        modes = MODES if layer == best else MODES[:1]
        found = {mode: training.run(layer, mode) for mode in modes}
        swaps = swap_success(found["joint"][0], model, heldout, layer, options.strengths)
        print(swaps, flush=True)
        layers[str(layer)] = {
            "probe": probe,
            "spread": spread_of_answers(model, layer),
            "slots": {mode: figures for mode, (_, figures) in found.items()},
            "swaps": swaps.to_dict(),
        }
    return {
        "people": len(model.biographies.entities),
        "heldout_people": sum(entity.heldout for entity in model.biographies.entities),
        "language_model": {**measured["language_model"], "accuracy": measured["accuracy"]},
        "language_model_seconds": seconds,
        "layers": layers,
    }


def accuracy_table(data: dict[str, Any]) -> str:
    """Return the table of probes and slots by answers, layer and mode."""
    headings = ["answers", "layer", "mode", "probe, relation", "probe, answer", "spread"]
    headings += ["slot accuracy", "value accuracy", "FVU", "L0", "steps"]
    rows = []
    for answers, result in data.items():
        for layer, found in result["layers"].items():
            for mode, figures in found["slots"].items():
                probe = [f"{found['probe'][name]:.1%}" for name in ("relation", "answer")]
                shares = [
                    f"{figures[name]:.1%}" if name in figures else ""
                    for name in ("slot_accuracy", "value_accuracy")
                ]
                size = [f"{figures['fvu']:.3f}", f"{figures['l0']:.0f}", f"{figures['steps']:,}"]
                place = [answers, layer, mode, *probe, f"{found['spread']:.2f}"]
                rows.append([*place, *shares, *size])
    return markdown_table(headings, rows)


def swap_table(data: dict[str, Any], strengths: list[float]) -> str:
    """Return the table of answers given after replacing the activation, by answers and layer."""
    headings = ["answers", "layer", "nothing replaced", "reconstruction", "patch"]
    headings += [f"swap at {strength:g}" for strength in strengths]
    rows = []
    for answers, result in data.items():
        for layer, found in result["layers"].items():
            swaps = found["swaps"]
            names = ("model_accuracy", "reconstruction_accuracy", "patch_success")
            shares = [f"{swaps[name]:.1%}" for name in names]
            shares += [
                f"{row['success']:.1%} ({row['relation_success']:.1%})"
                for row in swaps["strengths"]
            ]
            rows.append([answers, layer, *shares])
    return markdown_table(headings, rows)


def report(result: dict[str, Any]) -> str:
    """Return the explanations and the tables as Markdown."""
    parts = ["# Slots on biographies", *(__doc__ or "").strip().split("\n\n")[2:]]
    for answers, found in result["data"].items():
        model = found["language_model"]
        parts.append(
            f"{answers} answers a relation: {found['people']} people, {found['heldout_people']} of "
            f"them held out; language model of {model['layers']} blocks of width "
            f"{model['d_model']}, {model['steps']:,} steps, {model['accuracy']:.2%} of all "
            "answers right."
        )
    parts += [accuracy_table(result["data"]), swap_table(result["data"], result["strengths"])]
    machine = f"{machine_line(result['machine'])} transformers {result['transformers']}."
    return "\n\n".join([*parts, machine, f"`{result['command']}`"])


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.biographies")
    parser.add_argument(
        "--data", type=Path, help="folder for the biographies; existing ones are used"
    )
    parser.add_argument("--entities", type=int, default=300)
    parser.add_argument(
        "--answers", type=int, nargs="+", default=[16, 4], help="answers of a relation"
    )
    parser.add_argument("--language-model-steps", type=int, default=4000)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--free-slots", type=int, default=2000)
    parser.add_argument("--reconstruction-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=35, help="further epochs, with all terms")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--l1-penalty-coeff", type=float, default=0.3)
    parser.add_argument("--alignment-coeff", type=float, default=2.0)
    parser.add_argument("--value-loss-coeff", type=float, default=20.0)
    parser.add_argument("--slot-target", type=float, default=6.0)
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 2.0, 5.0])
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Run, print the tables, write the files."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = {str(answers): measure(options, answers, directory) for answers in options.answers}
    result: dict[str, Any] = {"data": data, "strengths": options.strengths}
    result |= {"machine": describe_machine(), "command": command_line("benchmarks.biographies")}
    result["transformers"] = distribution_version("transformers")
    table = report(result)
    publish(result, table, options.json, options.markdown)


if __name__ == "__main__":
    main()
