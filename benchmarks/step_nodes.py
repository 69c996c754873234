"""Count the nodes of a training step's CUDA graph, by name, on a machine without a GPU.

    python -m benchmarks.step_nodes --size G1

A step of a small model is made on the CPU, and every call that would launch a kernel on a GPU is
written down: calls of PyTorch's operators as one node each, views and empty tensors as none. For an
op of this package the nodes are the ones of csrc/tests/cuda_nodes.h, to which the tests of the
emulated kernels hold its launchers. Some reductions of PyTorch are two kernels where tensors are
large, which is not counted. jumprelu cannot be captured in a graph: for it the numbers are
launches.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.support.problem import Size, parse_size
from benchmarks.support.tables import add_run_arguments, markdown_table, publish
from sae_fast.activations import Rows
from sae_fast.autoencoder import SparseAutoencoder, losses
from sae_fast.autoencoder.architecture import StepSettings
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.optimizer.loss_scaler import LossScaler
from sae_fast.training.optimizer.row_optimizer import make_optimizer
from sae_fast.training.step import TrainingStep

LIMITS = Path(__file__).resolve().parent.parent / "csrc/tests/cuda_nodes.h"
N_TOKENS, D_IN, D_SAE, K, K_AUX = 96, 32, 256, 8, 16
KINDS = {"topk": ("topk", 0), "topk with AuxK": ("topk", K_AUX), "jumprelu": ("jumprelu", 0)}

# Operators that launch nothing: they make views, reserve memory or fill a number of the host.
_NOTHING = {
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "alias", "detach", "expand"),
    *("select", "slice", "split", "permute", "transpose", "t", "squeeze", "unsqueeze", "unbind"),
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize_"),
    *("scalar_tensor", "_local_scalar_dense"),
}
_ROUNDED_PRODUCT = 5  # of PyTorch: both operands are rounded and back, and the product
_PRODUCT_ELEMENTS, _MOST_ROWS = 48 << 20, 8192  # plan_encode of csrc/kernels/common/encode_plan.h


class Limit(NamedTuple):
    """The nodes of a launcher: kernels and fills of memory."""

    kernels: int
    fills: int

    @property
    def nodes(self) -> int:
        """The kernels and fills together."""
        return self.kernels + self.fills


def read_limits(path: Path = LIMITS) -> dict[str, Limit]:
    """Return the limits of all launchers, by name."""
    lines = re.findall(r'\{"(\w+)", (\d+), (\d+)\}', path.read_text("utf-8"))
    return {name: Limit(*map(int, numbers)) for name, *numbers in lines}


def chunks(size: Size) -> int:
    """Return how many products the encoder makes for a batch."""
    rows = min(size.n_tokens, _MOST_ROWS)
    return -(-size.n_tokens // rows) * -(-size.d_sae // (_PRODUCT_ELEMENTS // rows))


class Call(NamedTuple):
    """A call of an operator, and its arguments that decide how many nodes it is."""

    name: str
    k_aux: int = 0
    follow_ups: int = 0  # of dense_product: a bias is added, ReLU is taken


class _Recorder(TorchDispatchMode):
    """Write down all calls of operators. It keeps no tensor, which autograd would then copy."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "sae_fast::encode_topk":
            self.calls.append(Call(name, k_aux=args[7]))
        elif name == "sae_fast::dense_product":
            self.calls.append(Call(name, follow_ups=(args[2] is not None) + args[3]))
        else:
            self.calls.append(Call(name))
        return func(*args, **(kwargs or {}))


def recorded_step(arch: str, k_aux: int) -> list[Call]:
    """Return the calls of one step of a small model, as a GPU would make it."""
    torch.manual_seed(0)
    own = {"k": K} if arch == "topk" else {}
    sae = SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=D_SAE, arch=arch, **own))
    if k_aux:
        sae.tokens_since_fired[: D_SAE // 2] = 10**12
    if arch == "jumprelu":
        sae.get_buffer("listed_per_token").fill_(K)
    config = TrainConfig(amp="bf16")
    optimizer = make_optimizer(sae, config)
    step = TrainingStep(sae, optimizer, LossScaler(enabled=False), config.precision)
    batch = [Rows(torch.randn(N_TOKENS, D_IN), {})]
    rate = torch.tensor(1e-3, dtype=torch.float64)
    settings = StepSettings(rate, torch.tensor(1.0), None, k_aux)
    with mock.patch.object(losses, "is_on_gpu", return_value=True):
        step.run(batch, settings)  # makes the working copies
        with _Recorder() as recorder:
            step.run(batch, settings)
    return recorder.calls


def count_nodes(kind: str, size: Size) -> Counter[str]:
    """Return the nodes of a step by the name of the operator, products of the encoder apart."""
    arch, k_aux = KINDS[kind]
    limits = read_limits()
    nodes: Counter[str] = Counter()
    for call in recorded_step(arch, k_aux):
        namespace, operator = call.name.split("::")
        if namespace == "sae_fast":
            if operator == "encode_topk":
                of_aux = "_with_aux" if call.k_aux else ""
                for part in (f"begin_topk{of_aux}", f"finish_topk{of_aux}"):
                    nodes[part] += limits[part].nodes
                selected = limits[f"select_topk{of_aux}"].nodes
                nodes["select_topk"] += chunks(size) * selected
                nodes["product of a chunk"] += chunks(size)
            elif operator == "dense_product":
                nodes[operator] += _ROUNDED_PRODUCT + call.follow_ups
            else:
                nodes[operator] += limits[operator].nodes
        elif operator not in _NOTHING:
            nodes[call.name] += 1
    return nodes


def own_and_other(nodes: Counter[str]) -> tuple[int, int]:
    """Return how many nodes are of this package, chunks of the encoder left out, and of PyTorch."""
    other = sum(count for name, count in nodes.items() if name.startswith("aten::"))
    of_chunks = nodes["select_topk"] + nodes["product of a chunk"]
    return nodes.total() - other - of_chunks, other


def main() -> None:
    """Count the nodes of all kinds of steps, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.step_nodes")
    parser.add_argument("--size", default="G1", help="G1…G3 or NxDxFxK")
    add_run_arguments(parser)
    options = parser.parse_args()
    size = parse_size(options.size)
    counted = {kind: count_nodes(kind, size) for kind in KINDS}
    tables = []
    for kind, nodes in counted.items():
        own, other = own_and_other(nodes)
        rows = [[f"`{name}`", str(count)] for name, count in sorted(nodes.items())]
        told = f"{own} nodes of this package and {other} of PyTorch"
        if nodes["select_topk"]:
            of_chunk = (nodes["select_topk"] + nodes["product of a chunk"]) // chunks(size)
            told += f", and {of_chunk} for each of {chunks(size)} chunks of the encoder's product"
        tables.append(f"## {kind}\n\n{told}.\n\n{markdown_table(['operator', 'nodes'], rows)}")
    text = f"# Nodes of a step, {size.describe()}\n\n" + "\n\n".join(tables)
    publish({"size": options.size, "nodes": counted}, text, options.json, options.markdown)


if __name__ == "__main__":
    main()
