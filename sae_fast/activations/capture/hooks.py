"""Hook points: the places of a transformers model whose activations are captured.

`residual.L` is the residual stream after block L, counted from 0: the output of that block.
`attn_out.L` and `mlp_out.L` are what its attention and its feed-forward part add to that stream,
which stream_check.py makes sure of. Anything else is the path of a module, and means that module's
output. `*` in a name stands for every block, or for every name at that place of a path. Where the
blocks are is found from the model's structure.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

RESIDUAL, ATTENTION, FEED_FORWARD = "residual", "attn_out", "mlp_out"

_ATTENTION_NAMES = re.compile(r"attn|attention")
_FEED_FORWARD_NAMES = re.compile(r"mlp|ffn|feed_?forward|moe|^ff$")
_OTHER_SENSES = re.compile(r"visual|vision|image|video|audio|speech")
_NORM_NAMES = re.compile(r"norm|ln|dropout", re.IGNORECASE)


@dataclass(frozen=True)
class HookPoint:
    """One place whose activations are captured.

    Attributes:
        name: as it is asked for, such as residual.3; also names its folder of shards.
        module: path of the module whose output it is.
        layer: the block it is in or after; None: it is outside of all blocks.
    """

    name: str
    module: str
    layer: int | None


@dataclass(frozen=True)
class Blocks:
    """The place of the blocks in a model."""

    path: str  # of the list that holds them
    modules: nn.ModuleList

    def layer_of(self, path: str) -> int | None:
        """Return the number of the block that a module is in; None: it is in no block."""
        match = re.match(re.escape(self.path) + r"\.(\d+)(\.|$)", path)
        return None if match is None else int(match[1])


def find_blocks(network: nn.Module) -> Blocks:
    """Find the list of blocks: as long as the configuration says, or else the longest list.

    Lists of a part that sees pictures or hears sounds come behind all others. Lists inside of
    another list, such as the experts of a block, do not count. Raises ValueError where there is no
    list at all.
    """
    lists = [
        Blocks(path, module)
        for path, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and not _is_in_list(network, path)
    ]
    if not lists:
        raise ValueError(f"model: {type(network).__name__} has no list of blocks to hook")
    expected = _configured_layers(network)
    return max(
        lists,
        key=lambda blocks: (
            _OTHER_SENSES.search(blocks.path) is None,
            len(blocks.modules) == expected,
            len(blocks.modules),
        ),
    )


def resolve_hooks(
    network: nn.Module,
    layers: Sequence[int] = (),
    hook_points: Sequence[str] = (),
    layer_stride: int | None = None,
) -> tuple[HookPoint, ...]:
    """Resolve names and patterns to hook points, each of them once.

    Args:
        network: the model.
        layers: blocks after which the residual stream is captured.
        hook_points: names or patterns, see the beginning of this file.
        layer_stride: patterns mean only blocks that are multiples of it; without layers and
            hook points, the residual stream after these blocks. 1 beside layers is no choice.

    Raises:
        ValueError: naming what there is not, with what there is.
    """
    if layer_stride is not None:
        if layers and layer_stride != 1:
            raise ValueError("layer_stride chooses layers by itself, give it or layers")
        if layer_stride < 1:
            raise ValueError(f"layer_stride must be at least 1, got {layer_stride}")
        if not layers:
            hook_points = hook_points or (f"{RESIDUAL}.*",)
    if not layers and not hook_points:
        raise ValueError("no hook: give layers, layer_stride or hook_points")
    blocks = find_blocks(network)
    count = len(blocks.modules)
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(
                f"layers: {type(network).__name__} has blocks 0 to {count - 1}, got {layer}"
            )
    known = named_hooks(network, blocks)
    chosen = [known[f"{RESIDUAL}.{layer}"] for layer in layers]
    for pattern in hook_points:
        matching = _matching(pattern, known, network, blocks)
        if not matching:
            raise ValueError(_unknown(pattern, known, network))
        if layer_stride is not None and "*" in pattern:
            matching = [hook for hook in matching if (hook.layer or 0) % layer_stride == 0]
        chosen += matching
    return tuple({hook.name: hook for hook in chosen}.values())


def named_hooks(network: nn.Module, blocks: Blocks) -> dict[str, HookPoint]:
    """Return all hook points that have a name of their own, by that name."""
    hooks = {}
    parts: tuple[tuple[str, Callable[[nn.Module], str | None]], ...] = (
        (RESIDUAL, lambda _block: ""),
        (ATTENTION, _attention_path),
        (FEED_FORWARD, _feed_forward_path),
    )
    for kind, part_of in parts:
        for layer, block in enumerate(blocks.modules):
            part = part_of(block)
            if part is not None:
                path = ".".join(filter(None, (blocks.path, str(layer), part)))
                hooks[f"{kind}.{layer}"] = HookPoint(f"{kind}.{layer}", path, layer)
    return hooks


def _attention_path(block: nn.Module) -> str | None:
    """Return the path of the module whose output attention adds to the residual stream."""
    names = _children_named(block, _ATTENTION_NAMES)
    if not names:
        return None
    # BERT's attention adds the residual stream and normalises; its `output.dense` does not yet.
    within = f"{names[0]}.output.dense"
    return within if _has(block, within) else names[0]


def _feed_forward_path(block: nn.Module) -> str | None:
    """Return the path of the module whose output a feed-forward network adds."""
    names = _children_named(block, _FEED_FORWARD_NAMES)
    others = ("output.dense", "fc2")  # BERT, OPT: its last matrix, there is no module of the whole
    return next(iter([*names, *(name for name in others if _has(block, name))]), None)


def _children_named(block: nn.Module, names: re.Pattern[str]) -> list[str]:
    return [
        name
        for name, _ in block.named_children()
        if names.search(name.lower()) and not _NORM_NAMES.search(name)
    ]


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _matching(
    pattern: str, known: dict[str, HookPoint], network: nn.Module, blocks: Blocks
) -> list[HookPoint]:
    hooks = [hook for name, hook in known.items() if _matches(name, pattern)]
    if hooks:
        return hooks
    return [
        HookPoint(path, path, blocks.layer_of(path))
        for path in _module_paths(network)
        if _matches(path, pattern)
    ]


def _matches(path: str, pattern: str) -> bool:
    """Return whether a dotted name fits a pattern, part by part."""
    names, patterns = path.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def _module_paths(network: nn.Module) -> Iterator[str]:
    for path, module in network.named_modules():
        if path and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield path


def _unknown(pattern: str, known: dict[str, HookPoint], network: nn.Module) -> str:
    there = []
    for kind in (RESIDUAL, ATTENTION, FEED_FORWARD):
        layers = [hook.layer for name, hook in known.items() if name.startswith(f"{kind}.")]
        if layers:
            there.append(f"{kind}.{layers[0]} to {kind}.{layers[-1]}")
    paths = list(_module_paths(network))
    near = difflib.get_close_matches(pattern, [*known, *paths], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return (
        f"hook_points: {type(network).__name__} has no {pattern!r}{hint}; there are "
        f"{', '.join(there)}, and its modules, such as {', '.join(_examples(paths))}"
    )


def _examples(paths: list[str]) -> list[str]:
    """Return paths of modules at different depths."""
    return [paths[0], paths[len(paths) // 2], paths[-1]]


def _is_in_list(network: nn.Module, path: str) -> bool:
    parts = path.split(".")
    return any(
        isinstance(network.get_submodule(".".join(parts[:length])), nn.ModuleList)
        for length in range(1, len(parts))
    )


def _configured_layers(network: nn.Module) -> int | None:
    config: Any = getattr(network, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "num_hidden_layers", None)
