"""Matrix products in the dtype of their factors, whatever autocast would make of them.

Autocast, in which models are often run, rounds the factors of torch's matrix products. The
functions here have a precision of their own: their results and gradients do not depend on autocast,
also if backward runs inside it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_DEVICES = ("cpu", "cuda")


def is_autocast_on() -> bool:
    """Tell if autocast is on for a device that ops run on."""
    return any(torch.is_autocast_enabled(device) for device in _DEVICES)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function to run as if no autocast were on; gradients may still meet one."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if not is_autocast_on():
            return function(*arguments)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*arguments)

    return run


def full_precision(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a function of tensors to run, and be differentiated, as if no autocast were on."""
    quiet = without_autocast(function)

    @functools.wraps(function)
    def run(*arguments: Any) -> Tensor:
        needs_grad = torch.is_grad_enabled() and any(
            isinstance(argument, Tensor) and argument.requires_grad for argument in arguments
        )
        if not needs_grad or not is_autocast_on() or torch.compiler.is_compiling():
            result: Tensor = quiet(*arguments)
            return result
        result = _FullPrecision.apply(quiet, *arguments)  # type: ignore[no-untyped-call]
        return result

    return run


class _FullPrecision(torch.autograd.Function):
    """Run a function in a graph of its own, which backward traverses without autocast."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        ctx.inputs = [
            a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
            for a in arguments
        ]
        with torch.enable_grad():
            ctx.output = function(*ctx.inputs)
        result: Tensor = ctx.output.detach()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [a for a in ctx.inputs if isinstance(a, Tensor) and a.requires_grad]
        differentiate = without_autocast(
            lambda: torch.autograd.grad(ctx.output, wanted, grad, retain_graph=True)
        )
        grads = iter(differentiate())
        return None, *(
            next(grads) if isinstance(a, Tensor) and a.requires_grad else None for a in ctx.inputs
        )


@full_precision
def matmul(
    a: Tensor,
    b: Tensor,
) -> Tensor:
    """Return a @ b."""
    return a @ b


@full_precision
def addmm(
    bias: Tensor,  # [M] or [N, M]
    a: Tensor,  # [N, K]
    b: Tensor,  # [K, M]
) -> Tensor:
    """Return bias + a @ b, [N, M]."""
    return torch.addmm(bias, a, b)
