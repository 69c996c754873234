"""A check, on a few tokens, that attn_out and mlp_out are what a block adds to its stream.

The output of the module called attention or MLP is that in most models. Some models normalise it
first (Gemma 2, OLMo 2), some scale it (Granite), and some modules add the residual stream
themselves (BLOOM). Two tensors s and t of the stream have to be found with s + output = t, or s +
attention + MLP = t in a block that runs both in parallel; s and t are inputs of modules or the
block's output. An output may be multiplied by a scale that the block or the configuration has.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast.activations.capture.hooks import (
    ATTENTION,
    DECODER,
    FEED_FORWARD,
    Blocks,
    HookPoint,
    find_parts,
    find_stacks,
    named_hooks,
    resolve_hooks,
)
from sae_fast.activations.capture.image_model import probe_pixels, row_kinds, run_on_pixels
from sae_fast.activations.capture.loading import device_of
from sae_fast.activations.capture.probe import (
    as_evaluated,
    probe_tokens,
    run_on_tokens,
    whole_source,
)

_SCALE_NAMES = re.compile(r"multiplier|scal")
RELATIVE = 1e-3  # beyond the rounding of the model's type, by which the stream is added up


@dataclass
class _Block:
    """Tensors of a block in one pass, [T, width] in float64.

    Attributes:
        stream: the input of the block, inputs of its modules, and last its output.
        outputs: outputs of its modules, by path, in the order in which they ended.
        eps: rounding of the model's type.
    """

    stream: list[Tensor] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    eps: float = 0.0

    @property
    def shape(self) -> torch.Size:
        """Shape [T, D] of the residual stream."""
        return self.stream[-1].shape

    def adds(self, added: Tensor, starts: Sequence[Tensor]) -> bool | None:
        """Return whether one of `starts` plus `added` is in the stream; None: rounding hides it."""
        hidden = False
        for start, end in itertools.product(starts, self.stream):
            if start is end or not start.shape == end.shape == added.shape == self.shape:
                continue
            slack = RELATIVE * float(added.norm()) + 4 * self.eps * float(end.norm())
            if float((end - start - added).norm()) <= slack:
                if slack <= min(float(start.norm()), float(added.norm())) / 2:
                    return True
                hidden = True
        return None if hidden else False


def checked_hooks(
    network: nn.Module,
    hooks: Sequence[HookPoint],
    tokens: Tensor,
    pixels: Tensor | None = None,
) -> tuple[HookPoint, ...]:
    """Replace attn_out and mlp_out by the module whose output is added, or add its scale.

    Args:
        network: the model.
        hooks: hook points; those with other names are left as they are.
        tokens: [1, T] int64, ordinary ones; of a model that reads images only T counts.
        pixels: [1, 3, H, W], an image that such a model reads.

    Raises:
        ValueError: in one line, if no module's output is what is added.
    """
    stacks = {blocks.prefix: blocks for blocks in find_stacks(network)}
    seen: dict[tuple[str, int], _Block | None] = {}
    found = []
    for hook in hooks:
        if _kind(hook) is None or hook.layer is None:
            found.append(hook)
            continue
        blocks, place = stacks[_prefix(hook)], (_prefix(hook), hook.layer)
        if place not in seen:
            path = f"{blocks.path}.{hook.layer}"
            seen[place] = _look(network, blocks.modules[hook.layer], path, tokens, pixels)
        found.append(_checked(network, hook, blocks, seen[place]))
    return tuple(found)


def find_hook(network: nn.Module, name: str) -> HookPoint:
    """Return the one hook point of a name, checked as `checked_hooks` does where that is needed.

    Raises ValueError in one line, where there is none of this name, or several, or it cannot be
    told which module's output is added to the residual stream.
    """
    hooks = resolve_hooks(network, (), (name,))
    if len(hooks) > 1:
        raise ValueError(
            f"hook: {name!r} means {len(hooks)} hook points, from {hooks[0].name} to "
            f"{hooks[-1].name}: give one"
        )
    if _kind(hooks[0]) is None:
        return hooks[0]
    pixels = probe_pixels(network)
    if pixels is not None:
        kinds = row_kinds(network, pixels)
        if kinds is None:
            return hooks[0]
        (hook,) = checked_hooks(network, hooks, torch.zeros(1, len(kinds)).long(), pixels)
        return hook
    tokens = probe_tokens(network)
    if tokens is None:
        return hooks[0]
    (hook,) = checked_hooks(network, hooks, tokens.to(device_of(network)))
    return hook


def _prefix(hook: HookPoint) -> str:
    return DECODER if hook.name.startswith(DECODER) else ""


def _kind(hook: HookPoint) -> str | None:
    kind = hook.name.removeprefix(DECODER).partition(".")[0]
    return kind if kind in (ATTENTION, FEED_FORWARD) and hook.layer is not None else None


def _checked(
    network: nn.Module, hook: HookPoint, blocks: Blocks, block: _Block | None
) -> HookPoint:
    output = None if block is None else block.outputs.get(hook.module)
    if block is None or output is None:  # what is wrong with it is said when it is captured
        return hook
    kind = _kind(hook)
    starts = block.stream[:1] if kind == ATTENTION else block.stream
    other_kind = FEED_FORWARD if kind == ATTENTION else ATTENTION
    other = named_hooks(blocks).get(f"{blocks.prefix}{other_kind}.{hook.layer}")
    beside = None if other is None else block.outputs.get(other.module)
    if block.adds(output, starts) is not False:
        return hook
    both = output + beside if beside is not None and beside.shape == output.shape else None
    if both is not None and block.adds(both, block.stream[:1]) is not False:
        return hook
    for scale in _stated_scales(network, blocks.modules[hook.layer or 0]):
        alone, together = scale * output, None if both is None else scale * both
        if block.adds(alone, starts) or (together is not None and block.adds(together, starts[:1])):
            return replace(hook, scale=scale)
    for path in _candidates(hook.module, block):
        if block.adds(block.outputs[path], starts):
            return replace(hook, module=path)
    raise ValueError(
        f"{hook.name}: {type(network).__name__} does not add the output of {hook.module} to the "
        f"residual stream{_scale(output, block, starts)}, and no module puts out what it adds; to "
        f"capture that output as it is give --hook-points {hook.module}"
    )


def _candidates(path: str, block: _Block) -> Iterator[str]:
    """Yield the modules that ran in a module or after it, the nearest first."""
    paths = list(block.outputs)  # in the order in which they ended
    place = paths.index(path)
    inside = [other for other in paths[:place] if other.startswith(f"{path}.")]
    yield from reversed(inside)
    yield from paths[place + 1 :]


def _stated_scales(network: nn.Module, block: nn.Module) -> list[float]:
    """Return the numbers, called a scale, that a block or a model's configuration has."""
    config: Any = getattr(network, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = [vars(block), getattr(text, "__dict__", {})]
    found = [
        value
        for numbers in stated
        for name, value in numbers.items()
        if isinstance(value, float) and value not in (0.0, 1.0) and _SCALE_NAMES.search(name)
    ]
    return list(dict.fromkeys(found))


def _scale(added: Tensor, block: _Block, starts: Sequence[Tensor]) -> str:
    """Return the factor by which the output is multiplied, if that is the only difference."""
    for start, end in itertools.product(starts, block.stream):
        if start is not end and start.shape == end.shape == added.shape == block.shape:
            change = end - start
            scale = float((change * added).sum() / added.square().sum())
            if scale > 0 and float((change - scale * added).norm()) < RELATIVE * change.norm():
                return f" (it adds {scale:.4g} times it)"
    return ""


def _look(
    network: nn.Module, block: nn.Module, path: str, tokens: Tensor, pixels: Tensor | None
) -> _Block | None:
    """Run a network once and record a block's stream; None: the run does not reach the block."""
    seen = _Block()

    def rows_in(given: Iterable[Any]) -> Tensor | None:
        for value in given:
            if isinstance(value, Tensor) and value.shape[:-1] in (tokens.shape, tokens.shape[1:]):
                seen.eps = max(seen.eps, torch.finfo(value.dtype).eps)
                return value.detach().reshape(tokens.shape[1], -1).double().cpu()
        return None

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        rows = rows_in((*args, *kwargs.values()))
        if rows is not None and not any(torch.equal(rows, other) for other in seen.stream):
            seen.stream.append(rows)

    def behind(module: nn.Module, _args: Any, output: Any) -> None:
        rows = rows_in(output if isinstance(output, tuple | list) else (output,))
        if module is block and rows is not None:
            seen.stream.append(rows)
        elif rows is not None:
            seen.outputs.setdefault(paths[module], rows)
        if module is block:
            raise _Left

    parts = find_parts(network)
    in_decoder = parts is not None and parts.is_in_decoder(path)
    paths = {module: f"{path}.{name}" for name, module in block.named_modules()}
    handles: list[Any] = [
        handle
        for module in paths
        for handle in (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(behind),
        )
    ]
    try:
        with as_evaluated(network):
            if pixels is not None:
                run_on_pixels(network, pixels)
            else:
                source = whole_source(tokens) if in_decoder else None
                run_on_tokens(network, tokens, source=source)
    except _Left:
        return seen
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError):
        return None  # it does not run on tokens alone
    finally:
        for handle in handles:
            handle.remove()
    return None


class _Left(Exception):
    """Ends a forward pass after the block."""
