"""Measure `sae_fast.accelerate`: a dictionary of SAELens by its own code and by the kernels here.

    python -m benchmarks.accelerate --json results/accelerate.json

The same `TopKSAE` in float32 encodes rows to a dense code, decodes that code, and does both,
without gradients. Codes are dense [tokens, d_sae], as SAELens gives and takes them. It needs
sae-lens.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.encode_calls import table_of_calls, time_calls
from benchmarks.support.machine import command_line, describe_machine, device_or_exit
from benchmarks.support.problem import Size, make_activations, make_weights, parse_size
from benchmarks.support.tables import add_run_arguments, machine_line, publish
from sae_fast import accelerate


def make_theirs(size: Size, device: torch.device) -> Any:
    """Return a dictionary of SAELens with the weights of the benchmarks."""
    sae_lens = importlib.import_module("sae_lens")
    config = sae_lens.TopKSAEConfig(
        d_in=size.d_in, d_sae=size.d_sae, k=size.k, dtype="float32", device=str(device)
    )
    sae, weights = sae_lens.TopKSAE(config), make_weights(size, device=device)
    with torch.no_grad():
        sae.W_enc.copy_(weights.W_enc.t())
        sae.W_dec.copy_(weights.W_dec)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


@torch.no_grad()
def time_size(size: Size, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the times of encode, decode and both, by SAELens and by the kernels here."""
    theirs = make_theirs(size, device)
    ours = accelerate(copy.deepcopy(theirs))
    x = make_activations(size, 1, device=device)
    code = theirs.encode(x)
    kinds: dict[str, Callable[[Any], Callable[[], object]]] = {
        "encode": lambda sae: lambda: sae.encode(x),
        "decode": lambda sae: lambda: sae.decode(code),
        "both": lambda sae: lambda: sae(x),
    }
    return {
        name: time_calls({"SAELens": call(theirs), "accelerated": call(ours)}, rounds)
        for name, call in kinds.items()
    }


def report(result: dict[str, Any]) -> str:
    """Return the explanations and the tables as Markdown."""
    parts = ["# Dictionaries of SAELens, accelerated", "", __doc__.split("\n\n")[2].strip()]
    for name, found in result["sizes"].items():
        table = table_of_calls(("call", "by", "SAELens / this"), found)
        parts += ["", f"## {name}", "", table]
    parts += ["", f"sae-lens {result['sae_lens']}. {machine_line(result['machine'])}"]
    parts += ["", f"`{result['command']}`"]
    return "\n".join(parts)


def main() -> None:
    """Run, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.accelerate")
    parser.add_argument("--sizes", default="S1,S2", help="S1…S4 or NxDxFxK")
    parser.add_argument("--rounds", type=int, default=20)
    add_run_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = device_or_exit("cpu")
    result: dict[str, Any] = {"sizes": {}, "sae_lens": importlib.metadata.version("sae-lens")}
    for size in map(parse_size, options.sizes.split(",")):
        name = f"{size.n_tokens} tokens, d_in {size.d_in}, d_sae {size.d_sae}, k {size.k}"
        result["sizes"][name] = time_size(size, device, options.rounds)
    result |= {"machine": describe_machine(device)}
    result["command"] = command_line("benchmarks.accelerate")
    publish(result, report(result), options.json, options.markdown)


if __name__ == "__main__":
    main()
