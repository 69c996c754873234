"""Measure what a call of `encode` costs that trusts no copy of the weights from an earlier call.

    python -m benchmarks.encode_calls --json results/encode_calls.json

A topk model encodes few and many tokens: as it is, where each call packs W_enc anew; inside
`kept_copies`, where the packed copy stays; and with parameters in bfloat16, which are widened in
each call too. Beside these stand one packing, and one pass over W_enc that adds up its bits, which
is the least that a comparison with an earlier state of W_enc would take.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
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
    publish,
    ratio,
)
from benchmarks.support.timing import interleave, measure, median_ratio, summarize
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig

TOKENS = (1, 64, 4096)


def make_model(size: Size, device: torch.device) -> SparseAutoencoder:
    """Return a model for inference with the weights of the benchmarks."""
    sae = SparseAutoencoder(SAEConfig(d_in=size.d_in, d_sae=size.d_sae, k=size.k)).to(device)
    weights = make_weights(size, device=device)
    with torch.no_grad():
        sae.W_enc.copy_(weights.W_enc)
        sae.W_dec.copy_(weights.W_dec)
    return sae.eval().requires_grad_(False)


def time_calls(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Return the seconds of each call, interleaved, and the median ratio of the first to it."""
    for call in calls.values():
        call()
        call()
    device = torch.device("cpu")
    samplers = {name: lambda call=call: measure(call, device) for name, call in calls.items()}
    samples = interleave(samplers, rounds)
    first = samples[next(iter(calls))]
    return {
        name: {
            "seconds": (found := summarize(samples[name])).median,
            "quiet_rounds": found.quiet_rounds,
            "rounds": found.rounds,
            "first_over_this": median_ratio(first, samples[name]),
        }
        for name in calls
    }


def table_of_calls(headings: tuple[str, str, str], found: dict[str, Any]) -> str:
    """Return a table of the results of `time_calls` by name.

    Args:
        headings: of the names, of the calls, and of the ratios of the first call to them.
        found: the results.
    """
    body = [
        (
            *(name, call, milliseconds(row["seconds"]), ratio(row["first_over_this"])),
            f"{row['quiet_rounds']}/{row['rounds']}",
        )
        for name, rows in found.items()
        for call, row in rows.items()
    ]
    names, calls, ratios = headings
    return markdown_table([names, calls, "ms", ratios, "quiet rounds"], body)


def time_tokens(size: Size, x: Tensor, rounds: int) -> dict[str, Any]:
    """Return the times of encoding `x` in the three ways."""
    sae = make_model(size, x.device)
    narrow = copy.deepcopy(sae).bfloat16()
    kept = copy.deepcopy(sae)
    calls = {
        "as it is": lambda: sae.encode(x),
        "kept_copies": lambda: kept.encode(x),
        "bfloat16": lambda: narrow.encode(x),
    }
    with kept.kept_copies():
        return time_calls(calls, rounds)


def time_weights(size: Size, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the times of packing W_enc and of one pass over its bits."""
    W_enc = make_weights(size, device=device).W_enc
    bits = W_enc.view(torch.int64) if size.d_in % 2 == 0 else W_enc.view(torch.int32)
    pack = torch.ops.sae_fast.pack_encoder.default
    calls = {"packing": lambda: pack(W_enc, "screened"), "sum of the bits": lambda: bits.sum()}
    return time_calls(calls, rounds)


def report(result: dict[str, Any]) -> str:
    """Return the explanations and the tables as Markdown."""
    parts = ["# Calls of encode", "", __doc__.split("\n\n")[2].strip()]
    for name, found in result["sizes"].items():
        parts += ["", f"## {name}", "", table_of_calls(("of", "call", "first / this"), found)]
    parts += ["", machine_line(result["machine"]), "", f"`{result['command']}`"]
    return "\n".join(parts)


def main() -> None:
    """Run, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.encode_calls")
    parser.add_argument("--sizes", default="S2", help="S1…S4 or NxDxFxK (N is not used)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="tokens of a call")
    parser.add_argument("--rounds", type=int, default=40)
    add_run_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = device_or_exit("cpu")
    result: dict[str, Any] = {"sizes": {}}
    for size in map(parse_size, options.sizes.split(",")):
        found = result["sizes"][f"d_in {size.d_in}, d_sae {size.d_sae}, k {size.k}"] = {}
        for count in map(int, options.tokens.split(",")):
            own = Size(size.name, count, size.d_in, size.d_sae, size.k)
            x = make_activations(own, 1, device=device)
            name = "1 token" if count == 1 else f"{count} tokens"
            found[name] = time_tokens(own, x, options.rounds)
        found["W_enc"] = time_weights(size, device, options.rounds)
    result |= {"machine": describe_machine(device)}
    result["command"] = command_line("benchmarks.encode_calls")
    publish(result, report(result), options.json, options.markdown)


if __name__ == "__main__":
    main()
