"""Hook points: the places of a transformers model whose activations are captured or replaced.

`residual.L` is the residual stream after block L, counted from 0: the output of that block.
`resid_pre.L` is the residual stream before it. `attn_out.L` and `mlp_out.L` are what its attention
and its feed-forward part add to that stream, which stream_check.py makes sure of. `mlp_in.L` is
the input of its feed-forward part, and `z.L` the input of the last matrix of its attention: the
heads' results side by side, of which `z.L.H` is head H. Anything else is the path of a module and
means that module's output, or with `:in` after it that module's input. `*` in a name stands for
every block, or for every name at that place of a path. Where the blocks are is found from the
model's structure. Names of TransformerLens mean the hook points that correspond to them.

In a model with an encoder and a decoder these names mean the encoder, and with `decoder.` in front
of them (`decoder.residual.L`) the decoder.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

RESIDUAL, ATTENTION, FEED_FORWARD = "residual", "attn_out", "mlp_out"
BEFORE, FEED_FORWARD_INPUT, HEADS = "resid_pre", "mlp_in", "z"
DECODER = "decoder."  # in front of the names of hook points
INPUT = ":in"  # behind the path of a module

_ATTENTION_NAMES = re.compile(r"attn|attention")
_FEED_FORWARD_NAMES = re.compile(r"mlp|ffn|feed_?forward|moe|^ff$|^densereludense$")
_OTHER_SENSES = re.compile(r"visual|vision|image|video|audio|speech")
_NORM_NAMES = re.compile(r"norm|ln|dropout", re.IGNORECASE)
_LAST_MATRIX = re.compile(r"(^|\.)(o_proj|out_proj|c_proj|dense|out_lin|wo|o)$")
_LENS = re.compile(r"(^|\.)hook_\w+$")
# Attributes of attention modules that hold the width of a head's result.
_HEAD_WIDTHS = (
    *("v_head_dim", "head_dim", "attention_head_size", "head_size"),
    "key_value_proj_dim",  # T5
)

# Names of TransformerLens, of block L, and the kinds of hook points that they mean. Of each kind
# the first is the usual one.
LENS_NAMES = {
    "hook_resid_post": RESIDUAL,
    "hook_resid_pre": BEFORE,
    "hook_attn_out": ATTENTION,
    "hook_mlp_out": FEED_FORWARD,
    "mlp.hook_out": FEED_FORWARD,
    "mlp.hook_in": FEED_FORWARD_INPUT,
    "ln2.hook_normalized": FEED_FORWARD_INPUT,
    "attn.hook_z": HEADS,
    "hook_out": RESIDUAL,  # from here on as version 4 calls them
    "hook_in": BEFORE,
    "attn.hook_out": ATTENTION,
    "attn.o.hook_in": HEADS,
}


@dataclass(frozen=True)
class HookPoint:
    """One place whose activations are captured or replaced.

    Attributes:
        name: as it is asked for, such as residual.3; also names its folder of shards.
        module: path of the module whose output or input it is.
        layer: the block it is in or after; None: it is outside of all blocks.
        is_input: whether it is the input of the module.
        scale: by which the model multiplies what the module puts out before it adds it to the
            residual stream; the activations are the product.
        columns: the first column and the one after the last, of one head; None: all.
    """

    name: str
    module: str
    layer: int | None
    is_input: bool = False
    scale: float = 1.0
    columns: tuple[int, int] | None = None

    @property
    def place(self) -> str:
        """The module whose output it is, or with `:in` the module whose input it is."""
        return self.module + (INPUT if self.is_input else "")

    def recorded(self) -> dict[str, Any]:
        """Return the fields as a dictionary, without the ones that have their defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}


@dataclass(frozen=True)
class Blocks:
    """The place of the blocks in a model."""

    path: str  # of the list that holds them
    modules: nn.ModuleList
    prefix: str = ""  # of the names of their hook points: "" or DECODER

    def layer_of(self, path: str) -> int | None:
        """Return the number of the block that a module is in; None: it is in no block."""
        match = re.match(re.escape(self.path) + r"\.(\d+)(\.|$)", path)
        return None if match is None else int(match[1])


def find_blocks(network: nn.Module) -> Blocks:
    """Find the list of blocks: as long as the configuration says, or else the longest list.

    Of a model with an encoder and a decoder it is the list of the encoder. Lists of a part that
    sees pictures or hears sounds come after all others. Lists inside of another list, such as the
    experts of a block, do not count. Raises ValueError where there is no list at all.
    """
    parts = find_parts(network)
    return _longest(network, "") if parts is None else _longest(network, parts.encoder)


def find_stacks(network: nn.Module) -> tuple[Blocks, ...]:
    """Find the lists of blocks of a model: one, or the encoder's and the decoder's."""
    parts = find_parts(network)
    if parts is None:
        return (find_blocks(network),)
    return find_blocks(network), replace(_longest(network, parts.decoder), prefix=DECODER)


@dataclass(frozen=True)
class Parts:
    """The paths of the encoder and of the decoder in a model that has both."""

    encoder: str
    decoder: str

    def is_in_decoder(self, path: str) -> bool:
        """Return whether the decoder is, or holds, the module at a path."""
        return f"{path}.".startswith(f"{self.decoder}.")

    def is_in_encoder(self, path: str) -> bool:
        """Return whether the encoder is, or holds, the module at a path."""
        return f"{path}.".startswith(f"{self.encoder}.")


def find_parts(network: nn.Module) -> Parts | None:
    """Return where a model has its encoder and its decoder; None: it does not have both."""
    config: Any = getattr(network, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    paths = {module: path for path, module in network.named_modules()}
    found = [
        paths.get(part()) if callable(part := getattr(network, name, None)) else None
        for name in ("get_encoder", "get_decoder")
    ]
    if not found[0] or not found[1]:  # the network itself is one of them
        return None
    return Parts(found[0], found[1])


def _longest(network: nn.Module, part: str) -> Blocks:
    """Return the list of blocks in a part of a network, see `find_blocks`."""
    lists = [
        Blocks(path, module)
        for path, module in network.named_modules()
        if isinstance(module, nn.ModuleList)
        and not _is_in_list(network, path)
        and path.startswith(f"{part}." if part else "")
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
    stacks = find_stacks(network)
    count = len(stacks[0].modules)
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(
                f"layers: {type(network).__name__} has blocks 0 to {count - 1}, got {layer}"
            )
    known = {name: hook for blocks in stacks for name, hook in named_hooks(blocks).items()}
    chosen = [known[f"{RESIDUAL}.{layer}"] for layer in layers]
    for pattern in hook_points:
        matching = _matching(pattern, known, network, stacks)
        if not matching:
            raise ValueError(_unknown(pattern, known, network))
        if layer_stride is not None and "*" in pattern:
            matching = [hook for hook in matching if (hook.layer or 0) % layer_stride == 0]
        chosen += matching
    return tuple({hook.name: hook for hook in chosen}.values())


def named_hooks(blocks: Blocks) -> dict[str, HookPoint]:
    """Return all hook points of some blocks that have a name of their own, by that name."""
    hooks = {}
    parts: tuple[tuple[str, Callable[[nn.Module], str | None]], ...] = (
        (RESIDUAL, lambda _block: ""),
        (ATTENTION, _attention_path),
        (FEED_FORWARD, _feed_forward_path),
        (BEFORE, lambda _block: ""),
        (FEED_FORWARD_INPUT, _feed_forward_input_path),
        (HEADS, _last_matrix_path),
    )
    for kind, part_of in parts:
        is_input = kind in (BEFORE, FEED_FORWARD_INPUT, HEADS)
        for layer, block in enumerate(blocks.modules):
            part = part_of(block)
            if part is not None:
                path = ".".join(filter(None, (blocks.path, str(layer), part)))
                name = f"{blocks.prefix}{kind}.{layer}"
                hooks[name] = HookPoint(name, path, layer, is_input)
    return hooks


def _single_heads(network: nn.Module, blocks: Blocks) -> dict[str, HookPoint]:
    """Return the hook points of the single heads, by name, where their width is known."""
    hooks = {}
    for layer, block in enumerate(blocks.modules):
        path, attention = _last_matrix_path(block), _parts_named(block, _ATTENTION_NAMES)
        if path is None:
            continue
        matrix, module = block.get_submodule(path), block.get_submodule(attention[0])
        width, heads = _input_width(matrix), _configured(network, "num_attention_heads")
        if blocks.prefix == DECODER:
            heads = _configured(network, "decoder_attention_heads") or heads
        head = next(
            (
                size
                for name in _HEAD_WIDTHS
                for part in module.modules()
                if isinstance(size := getattr(part, name, None), int)
            ),
            None,
        )
        if width is None or heads is None or head is None or heads * head != width:
            continue
        for number in range(heads):
            name = f"{blocks.prefix}{HEADS}.{layer}.{number}"
            whole = f"{blocks.path}.{layer}.{path}"
            columns = (number * head, (number + 1) * head)
            hooks[name] = HookPoint(name, whole, layer, is_input=True, columns=columns)
    return hooks


def _attention_path(block: nn.Module) -> str | None:
    """Return the path of the module whose output attention adds to the residual stream."""
    names = _parts_named(block, _ATTENTION_NAMES)
    if not names:
        return None
    # BERT's attention adds the residual stream and normalises; its `output.dense` does not yet.
    within = f"{names[0]}.output.dense"
    return within if _has(block, within) else names[0]


def _feed_forward_path(block: nn.Module) -> str | None:
    """Return the path of the module whose output a feed-forward network adds."""
    names = _parts_named(block, _FEED_FORWARD_NAMES)
    others = ("output.dense", "fc2")  # BERT, OPT: its last matrix, there is no module of the whole
    return next(iter([*names, *(name for name in others if _has(block, name))]), None)


def _feed_forward_input_path(block: nn.Module) -> str | None:
    """Return the path of the module whose input a feed-forward network reads."""
    names = _parts_named(block, _FEED_FORWARD_NAMES)
    others = ("intermediate", "fc1")  # BERT, OPT: its first matrix
    return next(iter([*names, *(name for name in others if _has(block, name))]), None)


def _last_matrix_path(block: nn.Module) -> str | None:
    """Return the path of the matrix that makes attention's output of the heads' results."""
    names = _parts_named(block, _ATTENTION_NAMES)
    if not names:
        return None
    paths = [
        path
        for path, module in block.get_submodule(names[0]).named_modules()
        if _LAST_MATRIX.search(path) and next(module.children(), None) is None
    ]
    return f"{names[0]}.{paths[-1]}" if paths else None


def _input_width(matrix: nn.Module) -> int | None:
    """Return how many columns a matrix multiplies; None: the module does not say."""
    if isinstance(width := getattr(matrix, "in_features", None), int):
        return width
    if isinstance(width := getattr(matrix, "nx", None), int):  # Conv1D of GPT-2
        return width
    return None


def _parts_named(block: nn.Module, names: re.Pattern[str]) -> list[str]:
    """Return the paths of a block's parts with such names.

    They are its children, or the children of the modules in its lists, as T5 has them.
    """

    def is_named(name: str) -> bool:
        return names.search(name.lower()) is not None and not _NORM_NAMES.search(name)

    own = [name for name, _ in block.named_children() if is_named(name)]
    return own or [
        f"{name}.{number}.{inner}"
        for name, child in block.named_children()
        if isinstance(child, nn.ModuleList)
        for number, part in enumerate(child)
        for inner, _ in part.named_children()
        if is_named(inner)
    ]


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _matching(
    pattern: str, known: dict[str, HookPoint], network: nn.Module, stacks: Sequence[Blocks]
) -> list[HookPoint]:
    hooks = [hook for name, hook in known.items() if _matches(name, pattern)]
    if hooks:
        return hooks
    for blocks in stacks:
        if pattern.startswith(f"{blocks.prefix}{HEADS}."):
            heads = _single_heads(network, blocks)
            hooks += [hook for name, hook in heads.items() if _matches(name, pattern)]
    path, is_input = pattern.removesuffix(INPUT), pattern.endswith(INPUT)
    hooks = hooks or [
        HookPoint(name + (INPUT if is_input else ""), name, _layer_of(name, stacks), is_input)
        for name in _module_paths(network)
        if _matches(name, path)
    ]
    meant = None if hooks else _meant_by_transformer_lens(pattern)
    return hooks if meant is None else _matching(meant, known, network, stacks)


def _layer_of(path: str, stacks: Sequence[Blocks]) -> int | None:
    """Return the number of the block that a module is in; None: it is in no block."""
    layers = (blocks.layer_of(path) for blocks in stacks)
    return next((layer for layer in layers if layer is not None), None)


def _meant_by_transformer_lens(name: str) -> str | None:
    """Return our name of a hook point that has a name of TransformerLens; None: it is another."""
    match = re.fullmatch(r"blocks\.(\d+|\*)\.(.+)", name)
    kind = None if match is None else LENS_NAMES.get(match[2])
    return None if match is None or kind is None else f"{kind}.{match[1]}"


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
    kinds = (RESIDUAL, ATTENTION, FEED_FORWARD, BEFORE, FEED_FORWARD_INPUT, HEADS)
    for kind in (*kinds, *(DECODER + kind for kind in kinds)):
        layers = [hook.layer for name, hook in known.items() if name.startswith(f"{kind}.")]
        if layers:
            there.append(f"{kind}.{layers[0]} to {kind}.{layers[-1]}")
    paths = list(_module_paths(network))
    near = difflib.get_close_matches(pattern, [*known, *paths], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    if _LENS.search(pattern):
        pairs = {kind: f"blocks.L.{name}" for name, kind in reversed(LENS_NAMES.items())}
        hint = " (of TransformerLens's names these are known: "
        hint += ", ".join(f"{name} for {kind}.L" for kind, name in pairs.items()) + ")"
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
    return _configured(network, "num_hidden_layers")


def _configured(network: nn.Module, name: str) -> int | None:
    """Return a number of a model's configuration; None: it does not have it."""
    config: Any = getattr(network, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, name, None)


def transformer_lens_name(hook: str) -> str:
    """Return the name that a hook point such as residual.3 has in TransformerLens; others stay."""
    names = {kind: name for name, kind in reversed(LENS_NAMES.items())}
    kind, _, layer = hook.rpartition(".")
    return f"blocks.{layer}.{names[kind]}" if kind in names and layer.isdigit() else hook
