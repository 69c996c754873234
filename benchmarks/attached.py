"""Measure what a forward pass costs with an autoencoder attached to the model.

    python -m benchmarks.attached --json results/attached.json

A random GPT-2 reads sequences with a topk autoencoder at its third block: attached in each mode,
beside the bare pass, and beside the bare pass followed by one `encode` and one `decode` of the same
activations, which is the work that cannot be avoided. The last column is the median ratio of that
to each of them, round by round.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.encode_calls import make_model, table_of_calls, time_calls
from benchmarks.support.machine import command_line, describe_machine, device_or_exit
from benchmarks.support.problem import Size, parse_size
from benchmarks.support.tables import add_run_arguments, machine_line, publish
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.intervention import Intervention

HOOK = "residual.2"
SHAPES = ("2x64", "1x1")
LAYERS, VOCABULARY, HEAD_WIDTH = 6, 5000, 64
FLOOR = "bare, encode, decode"


def make_network(width: int) -> nn.Module:
    """Return a random GPT-2 of a width."""
    from transformers import GPT2Config, GPT2LMHeadModel

    heads = max(1, width // HEAD_WIDTH)
    sizes = {"n_embd": width, "n_layer": LAYERS, "n_head": heads, "n_positions": 256}
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)
    torch.manual_seed(0)
    network: nn.Module = GPT2LMHeadModel(config).eval().requires_grad_(False)
    return network


def time_shape(
    network: nn.Module, sae: SparseAutoencoder, tokens: Tensor, rounds: int
) -> dict[str, Any]:
    """Return the times of the passes over tokens [B, T]."""
    with sae.attached(network, HOOK, "observe") as run:
        network(tokens)
    latent = int(run.codes[0].indices.flatten()[0])
    x = network(tokens, output_hidden_states=True).hidden_states[3].clone()

    def floor() -> None:
        network(tokens)
        sae.decode(sae.encode(x))

    def bare() -> None:
        network(tokens)

    calls: dict[str, Callable[[], None]] = {FLOOR: floor, "bare": bare}
    with ExitStack() as stack:

        def attached(mode: Any) -> tuple[Intervention, Callable[[], None]]:
            shared = {id(parameter): parameter for parameter in network.parameters()}
            own = copy.deepcopy(network, shared)  # other modules of the same parameters
            run = stack.enter_context(sae.attached(own, HOOK, mode))

            def call() -> None:
                run.clear()
                own(tokens)

            return run, call

        _, calls["attached, observe"] = attached("observe")
        run, calls["attached, error, one latent steered"] = attached("error")
        run.add(latent, 2.0)
        _, calls["attached, replace"] = attached("replace")
        run, calls["attached, replace, one latent steered"] = attached("replace")
        run.add(latent, 2.0)
        return time_calls(calls, rounds)


def report(result: dict[str, Any]) -> str:
    """Return the explanation and the tables as Markdown."""
    parts = ["# A model with an autoencoder attached", "", __doc__.split("\n\n")[2].strip()]
    for name, found in result["sizes"].items():
        table = table_of_calls(("tokens", "pass", f"({FLOOR}) / this"), found)
        parts += ["", f"## {name}", "", table]
    parts += ["", machine_line(result["machine"]), "", f"`{result['command']}`"]
    return "\n".join(parts)


def main() -> None:
    """Run, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.attached")
    parser.add_argument("--sizes", default="S2", help="S1…S4 or NxDxFxK (N is not used)")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="sequences x tokens of a pass")
    parser.add_argument("--rounds", type=int, default=40)
    add_run_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = device_or_exit("cpu")
    result: dict[str, Any] = {"sizes": {}}
    with torch.no_grad():
        for size in map(parse_size, options.sizes.split(",")):
            result["sizes"][_name(size)] = _time_size(size, device, options)
    result |= {"machine": describe_machine(device)}
    result["command"] = command_line("benchmarks.attached")
    publish(result, report(result), options.json, options.markdown)


def _time_size(
    size: Size, device: torch.device, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    network, sae = make_network(size.d_in), make_model(size, device)
    found = {}
    for shape in options.shapes.split(","):
        batch, length = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
        found[shape] = time_shape(network, sae, tokens, options.rounds)
    return found


def _name(size: Size) -> str:
    return f"GPT-2 with {LAYERS} blocks of width {size.d_in}; d_sae {size.d_sae}, k {size.k}"


if __name__ == "__main__":
    main()
