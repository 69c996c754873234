"""The ops on the device under test, called with CPU tensors and returning CPU tensors.

So a test states inputs, oracle and comparison once, on the CPU, and only the op itself runs on the
device. The fixture `ops_on_device` chooses the device. Tests of gradients, of compilation and of
copies kept on a parameter need tensors that stay on one device: they use `default_device`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae_fast import ops as wrappers
from sae_fast.ops import SparseCode

CPU = torch.device("cpu")


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device with the original's strides, which kernels must support."""
    if tensor.is_contiguous():
        return tensor.to(device, copy=True)
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.as_strided((size,), (1,), 0).to(device, copy=True)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def returned(result: Any) -> Any:
    """Return the results of an op or a wrapper, on the CPU."""
    if isinstance(result, Tensor):
        return result.to(CPU)
    if isinstance(result, SparseCode):
        fields = ("values", "indices", "offsets", "aux")
        return dataclasses.replace(
            result, **{name: returned(getattr(result, name)) for name in fields}
        )
    if isinstance(result, tuple):
        return tuple(returned(part) for part in result)
    return result


class DeviceOps:
    """A namespace of ops, or of their wrappers, that runs on `device`."""

    device = CPU

    def __init__(self, namespace: Any) -> None:
        self.namespace = namespace

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self.namespace, name)
        if self.device.type == "cpu":
            return op

        def run(*arguments: Any, **options: Any) -> Any:
            given = [*arguments, *options.values()]
            there = [moved(a, self.device) if isinstance(a, Tensor) else a for a in given]
            positional = there[: len(arguments)]
            named = dict(zip(options, there[len(arguments) :], strict=True))
            result = returned(op(*positional, **named))
            for place in written_arguments(name):
                if place < len(given) and isinstance(given[place], Tensor):
                    given[place].detach().copy_(there[place])
            return result

        return run


def written_arguments(name: str) -> list[int]:
    """Return the places of the arguments that an op changes."""
    arguments = getattr(torch.ops.sae_fast, name).default._schema.arguments
    return [
        place
        for place, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


ops = DeviceOps(torch.ops.sae_fast)
public = DeviceOps(wrappers)
