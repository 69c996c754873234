"""Reading and replacing the activations at a hook point while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sae_fast.activations.capture.hooks import HookPoint
from sae_fast.activations.capture.probe import is_probing

# Takes the activations at a hook point, or whatever its module puts out or reads in place of a
# tensor; returns what takes their place, in their shape, or None to leave them.
Change = Callable[[Any], Tensor | None]

_INPUT_NAMES = ("hidden_states", "input", "x")  # of modules that are called by keywords


@contextmanager
def hooked(network: nn.Module, hook: HookPoint, change: Change) -> Iterator[None]:
    """Call `change` whenever the model comes to a hook point, inside this context.

    Args:
        network: the model.
        hook: one of its hook points.
        change: sees the activations, and may give others in their place.
    """
    module = network.get_submodule(hook.module)

    def behind(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = _changed(first_of(output), hook, change)
        return None if new is None else with_first(output, new)

    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        place = _place_of_input(args, kwargs)
        own = args[place] if isinstance(place, int) else kwargs.get(place)
        new = _changed(own, hook, change)
        if new is None:
            return None
        if isinstance(place, int):
            return (*args[:place], new, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: new}

    if hook.is_input:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(behind)
    try:
        yield
    finally:
        handle.remove()


def first_of(output: Any) -> Any:
    """Return the activations that a module puts out: its output, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


def with_first(output: Any, new: Tensor) -> Any:
    """Return a module's output with other activations in it."""
    if isinstance(output, tuple | list):
        return type(output)((new, *output[1:]))
    return new


def _changed(own: Any, hook: HookPoint, change: Change) -> Tensor | None:
    """Return what takes the place of a module's output or input; None: it stays."""
    if is_probing():
        return None
    if not isinstance(own, Tensor):
        return change(own)
    rows = own if hook.columns is None else own[..., slice(*hook.columns)]
    if hook.scale != 1:
        rows = rows * hook.scale
    new = change(rows)
    if new is None:
        return None
    if hook.scale != 1:
        new = new / hook.scale
    if hook.columns is None:
        return new
    whole = own.clone()
    whole[..., slice(*hook.columns)] = new
    return whole


def _place_of_input(args: Any, kwargs: Any) -> int | str:
    """Return the number or the name of the argument that holds a module's activations."""
    for number, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return number
    tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    named = [name for name in _INPUT_NAMES if name in tensors]
    return (named or [name for name in tensors if kwargs[name].is_floating_point()] or ["input"])[0]
