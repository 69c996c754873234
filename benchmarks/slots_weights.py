"""Measure how the default weights of supervised slots affect sparsity and swaps of relations.

    python -m benchmarks.slots_weights --json benchmarks/results/slots_weights.json

Slots are trained jointly on biographies, once for each row, always from the same first weights. L1
and target are given in units of √d_in, the norm of normalised activations; alignment and values in
units of d_in, the error of reconstructing every activation by the mean. Alignment has its default
weight, d_in divided by the square of the target. *As written* has the paper's weights, with
L_sparse as a mean over slots and L_align after ReLU (`--slots-l1-mean --alignment-after-relu`);
*summed over slots* has the paper's weights with L1 as a sum and alignment before ReLU. A row named
after one weight has the defaults for all others. All figures are measured on people that the
autoencoder has never seen.

L0 and FVU include all slots. *Slots right* is the share of sentences whose relation has the largest
slot; *values right* the share of answers that the value heads give; *reconstruction* the share of
questions that the language model still answers correctly from the reconstruction. A swap sets the
slot of the relation in the question to 0 and the slot of another relation to a strength, in units
of its typical strength. It succeeds if the language model then gives this person's answer to the
other question (in brackets: any answer to it). Its upper limit is a patch, which inserts the
activation of the other question in the same phrasing. The probability of a right
answer by chance is the inverse of the number of answers.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.biographies import make_data
from benchmarks.support.machine import command_line, describe_machine, distribution_version
from benchmarks.support.tables import add_run_arguments, machine_line, markdown_table, publish
from sae_fast import SAEConfig, SparseAutoencoder, TrainConfig, Trainer
from sae_fast.ground_truth.biographies import files
from sae_fast.ground_truth.biographies.language_model import BiographyModel
from sae_fast.ground_truth.biographies.swap import swap_success
from sae_fast.ground_truth.biographies.text import RELATIONS

FIGURES = ("l0", "fvu", "slot_accuracy", "value_accuracy")
AS_WRITTEN = "as written"
DEFAULT = "default"


def settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the settings of each training beside the sizes, by the name of its row."""
    norm = math.sqrt(options.d_model)
    values = {"value_loss_coeff": 0.5 * options.d_model}
    summed = {**values, "l1_penalty_coeff": 1e-3 * options.d_model}
    found: dict[str, dict[str, Any]] = {
        AS_WRITTEN: {**values, "slots_l1_mean": True, "alignment_after_relu": True},
        "summed over slots": {**summed, "slot_target": 1.0},
        "values 0.5": values,
    }
    found |= {f"L1 {share:g}": {"l1_penalty_coeff": share * norm} for share in options.l1_shares}
    found |= {f"target {share:g}": {"slot_target": share * norm} for share in options.targets}
    return {**found, DEFAULT: {}}


def train(options: argparse.Namespace, data: Path, row: dict[str, Any]) -> Trainer:
    """Train slots with the settings of one row; return the trainer."""
    sae = SAEConfig(arch="slots", d_sae=options.free_slots + len(RELATIONS), **row)
    config = TrainConfig(
        shard_dir=str(files.layer_directory(data, options.layer)),
        batch_size=options.batch_size,
        learning_rate=options.lr,
        optimizer="adamw",
        weight_decay=0.01,
        reconstruction_epochs=options.reconstruction_epochs,
        max_epochs=options.reconstruction_epochs + options.epochs,
        log_every=1000,
        eval_every=0,
        checkpoint_every=0,
        num_threads=options.threads,
    )
    trainer = Trainer(sae, config, show_progress=False)
    trainer.train()
    return trainer


def measure(
    options: argparse.Namespace, data: Path, model: BiographyModel, row: dict[str, Any]
) -> dict[str, Any]:
    """Train one row and swap its slots; return the figures."""
    trainer = train(options, data, row)
    sae, last = trainer.model(), trainer.history[-1]
    found: dict[str, Any] = {name: last[f"heldout_{name}"] for name in FIGURES}
    found |= {"steps": trainer.step, **weights(sae)}
    sentences = model.biographies.sentences(heldout=True)
    swaps = swap_success(sae, model, sentences, options.layer, options.strengths)
    return {**found, "swaps": swaps.to_dict()}


def weights(sae: SparseAutoencoder) -> dict[str, float]:
    """Return the weights that a model was trained with, L1 as the weight of a sum over slots."""
    config = sae.config
    l1 = config.l1_penalty_coeff or 0.0
    if config.slots_l1_mean:
        l1 /= config.group_split
    return {
        "l1_share": l1 / math.sqrt(config.d_in),
        "alignment_share": (config.alignment_coeff or 0.0) / config.d_in,
        "value_share": (config.value_loss_coeff or 0.0) / config.d_in,
        "target_share": (config.slot_target or 0.0) / math.sqrt(config.d_in),
    }


def report(result: dict[str, Any]) -> str:
    """Return the explanations and the table as Markdown."""
    headings = ["weights", "L1", "alignment", "values", "target", "L0", "FVU"]
    headings += ["slots right", "values right", "reconstruction"]
    headings += [f"swap at {strength:g}" for strength in result["strengths"]]
    rows = []
    for name, found in result["rows"].items():
        swaps = found["swaps"]
        shares = ("l1_share", "alignment_share", "value_share", "target_share")
        given = [f"{found[key]:.3g}" for key in shares]
        code = [f"{found['l0']:.0f}", f"{found['fvu']:.3f}"]
        right = [found["slot_accuracy"], found["value_accuracy"], swaps["reconstruction_accuracy"]]
        moved = [
            f"{row['success']:.1%} ({row['relation_success']:.1%})" for row in swaps["strengths"]
        ]
        rows.append([name, *given, *code, *(f"{share:.1%}" for share in right), *moved])
    first = next(iter(result["rows"].values()))
    swaps, model = first["swaps"], result["language_model"]
    about = (
        f"{result['people']} people with {result['answers']} answers a relation; language model of "
        f"{model['layers']} blocks of width {model['d_model']}, {model['accuracy']:.2%} of all "
        f"answers right; layer {swaps['layer']}, {result['free_slots']:,} free slots, "
        f"{first['steps']:,} steps; {swaps['prompts']:,} prompts, patched "
        f"{swaps['patch_success']:.1%}."
    )
    machine = f"{machine_line(result['machine'])} transformers {result['transformers']}."
    parts = ["# Default weights of slots", *(__doc__ or "").strip().split("\n\n")[2:], about]
    return "\n\n".join([*parts, markdown_table(headings, rows), machine, f"`{result['command']}`"])


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.slots_weights")
    parser.add_argument(
        "--data", type=Path, help="folder for the biographies; existing ones are used"
    )
    parser.add_argument("--entities", type=int, default=150)
    parser.add_argument("--answers", type=int, default=8, help="answers of a relation")
    parser.add_argument("--language-model-steps", type=int, default=1500)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--free-slots", type=int, default=500)
    parser.add_argument("--reconstruction-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10, help="further epochs, with all terms")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--l1-shares", type=float, nargs="*", default=[0.05, 0.2])
    parser.add_argument("--targets", type=float, nargs="*", default=[0.25])
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 2.0, 5.0])
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Run, print the table, write the files."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        data = (options.data or Path(name)) / f"answers_{options.answers}"
        model, measured = make_data(options, options.answers, data)
        rows = {}
        for row, given in settings(options).items():
            rows[row] = measure(options, data, model, given)
            print(f"{row}: {rows[row]}", flush=True)
    result: dict[str, Any] = {"rows": rows, "strengths": options.strengths}
    result |= {"people": len(model.biographies.entities), "answers": options.answers}
    result |= {"free_slots": options.free_slots}
    result["language_model"] = {**measured["language_model"], "accuracy": measured["accuracy"]}
    result |= {"machine": describe_machine(), "command": command_line("benchmarks.slots_weights")}
    result["transformers"] = distribution_version("transformers")
    table = report(result)
    publish(result, table, options.json, options.markdown)


if __name__ == "__main__":
    main()
