"""An autoencoder attached to a transformers model: `SparseAutoencoder.attached`."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae_fast import ops
from sae_fast.activations import TARGETS
from sae_fast.activations.capture.hooks import HookPoint
from sae_fast.activations.capture.passes import PassWatch
from sae_fast.activations.capture.splicing import Change, hooked
from sae_fast.activations.capture.stream_check import find_hook
from sae_fast.activations.origin import short_name
from sae_fast.autoencoder.intervention import Intervention, Mode

if TYPE_CHECKING:
    from sae_fast.autoencoder.model import SparseAutoencoder


@contextmanager
def attach(
    sae: SparseAutoencoder,
    model: nn.Module,
    hook: str | None,
    mode: Mode,
    target_hook: str | None = None,
    *,
    record: bool = True,
    gradients: bool = False,
) -> Iterator[Intervention]:
    """Put an autoencoder into a model inside this context, see `SparseAutoencoder.attached`."""
    run = Intervention(sae, mode, record=record, gradients=gradients)
    source, target = _places(sae, model, hook, target_hook)
    with ExitStack() as stack:
        watch = PassWatch()
        stack.enter_context(watch.watching(model, source.module))
        if target is None:

            def both(x: Any) -> Tensor | None:
                x = _activations(x, source)
                return run.write(x, run.read(x, watch.tokens))

            stack.enter_context(hooked(model, source, _uncompiled(both)))
        else:
            _attach_both_sides(stack, model, run, watch, source, target)
        yield run
    if not run.has_run:
        warnings.warn(
            f"{source.name} of {type(model).__name__} never ran while the autoencoder was attached "
            "to it, so nothing was changed or recorded: run that model in the context, and not "
            "one that torch.compile compiled before",
            stacklevel=3,  # the line of `with`, past contextlib
        )


def _attach_both_sides(
    stack: ExitStack,
    model: nn.Module,
    run: Intervention,
    watch: PassWatch,
    source: HookPoint,
    target: HookPoint,
) -> None:
    """Read at one hook point and write at another, which the model comes to later."""
    waiting = threading.local()  # of each thread what was read in its pass

    def read(x: Any) -> None:
        waiting.read = run.read(_activations(x, source), watch.tokens)

    def write(y: Any) -> Tensor | None:
        if "read" not in waiting.__dict__:
            raise ValueError(
                f"target_hook: the model comes to {target.name} before {source.name}, which the "
                "transcoder reads"
            )
        own, width = _activations(y, target), run.target_width
        if own.shape[-1] != width:
            raise ValueError(
                f"the transcoder has d_out {width}, the activations at {target.name} have "
                f"{own.shape[-1]} columns: it is of another hook point or model"
            )
        return run.write(own, waiting.__dict__.pop("read"))

    stack.enter_context(hooked(model, source, _uncompiled(read)))
    stack.enter_context(hooked(model, target, _uncompiled(write)))


def attribute(
    sae: SparseAutoencoder,
    metric: Callable[[Any], Tensor],
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    hook: str | None,
    mode: Mode,
    target_hook: str | None,
    patched_inputs: Mapping[str, Any] | Tensor | None,
    steps: int | None,
) -> ops.SparseCode:
    """Return the effects of latents on a metric, see `SparseAutoencoder.attribution`."""
    if steps is not None and (not hasattr(steps, "__index__") or steps < 1):
        raise ValueError(f"steps must be a whole number from 1, got {steps!r}")
    other = None
    if patched_inputs is not None or steps is not None:
        ends = inputs if patched_inputs is None else patched_inputs
        with torch.no_grad(), attach(sae, model, hook, "observe", target_hook) as run:
            _outputs(model, ends)
        other = run.codes[0] if patched_inputs is not None else run.codes[0].mask(latents=[])
    attached = attach(sae, model, hook, mode, target_hook, gradients=True)
    effects: list[ops.SparseCode] = []
    with torch.enable_grad(), attached as run:
        for share in [0.0] if steps is None else [(step + 0.5) / steps for step in range(steps)]:
            run.clear()
            if other is not None:
                run.patch(other, share)
            effects.append(run.attribution(metric(_outputs(model, inputs))))
    mean = torch.stack([effect.values for effect in effects]).mean(0)
    return replace(effects[0], values=mean)


def _outputs(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _places(
    sae: SparseAutoencoder, model: nn.Module, hook: str | None, target_hook: str | None
) -> tuple[HookPoint, HookPoint | None]:
    """Return where an autoencoder reads, and where a transcoder writes."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a model in memory, got {type(model).__name__}: "
            "transformers.AutoModelForCausalLM.from_pretrained loads one"
        )
    known = sae.origin
    _check_model(known.get("model"), model, is_placed=hook is not None)
    source = find_hook(model, _given("hook", hook, known.get("hook")))
    if not sae.config.transcoder:
        if target_hook is not None:
            raise ValueError("target_hook belongs to a transcoder, and this model is none")
        return source, None
    targets = known.get(TARGETS) or {}
    return source, find_hook(model, _given("target_hook", target_hook, targets.get("hook")))


def _check_model(name: object, model: nn.Module, *, is_placed: bool) -> None:
    """Refuse a model of another name than the autoencoder's, or warn if a hook point is given."""
    theirs = _name_of(model)
    if name is None or not theirs or short_name(theirs) == short_name(str(name)):
        return
    difference = f"the autoencoder is of model {name!r}, this one is {theirs!r}"
    if not is_placed:
        raise ValueError(f"{difference}: name the hook point, hook=…, to attach it all the same")
    warnings.warn(difference, stacklevel=5)  # the line of `with`, past contextlib


def _name_of(model: Any) -> str:
    """Return the name or folder that transformers loaded a model from; "" for any other model."""
    with suppress(AttributeError):
        return str(model.config.name_or_path or "")
    return ""


def _given(argument: str, name: str | None, known: Any) -> str:
    """Return the name of a hook point: as it was given, or as the autoencoder's origin has it."""
    if name is None and known is None:
        raise ValueError(
            f"{argument} must be given, such as residual.3: the autoencoder does not say of which "
            "activations it is"
        )
    return str(known if name is None else name)


def _uncompiled(change: Change) -> Change:
    """Return a function that torch.compile leaves out of what it makes of the model."""
    outside: Change = torch.compiler.disable(change)  # type: ignore[no-untyped-call, unused-ignore]
    return outside


def _activations(rows: Any, hook: HookPoint) -> Tensor:
    if not isinstance(rows, Tensor):
        side = "read" if hook.is_input else "put out"
        raise ValueError(
            f"{hook.name}: {hook.module} does not {side} a tensor, got {type(rows).__name__}"
        )
    return rows
