"""A transformers model and its tokenizer, and the activations of its hook points.

The model runs as it is, without gradients and in evaluation mode. A forward pass ends as soon as
the last hook point has given its activations, which are the very bits of a whole pass.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast.activations.capture.hooks import HookPoint, find_parts
from sae_fast.activations.capture.image_model import run_on_pixels
from sae_fast.activations.capture.loading import (
    AUTO,
    NONE,
    Placement,
    checked_device,
    device_of,
    explained,
    load_network,
    model_dtype,
    quiet,
    weights_digest,
)
from sae_fast.activations.capture.packages import capture_package
from sae_fast.activations.capture.probe import (
    Source,
    probe_tokens,
    run_on_tokens,
    sees_later_tokens,
    whole_source,
)
from sae_fast.activations.capture.splicing import hooked

PROTEIN_MODELS = ("esm",)  # model_type of ESM-1b and ESM-2


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer.

    Attributes:
        network: the PreTrainedModel, in evaluation mode on its device.
        tokenizer: of transformers.
        name: a folder or the name on the hub.
        revision: the commit on the hub, or None for a folder.
        causal: a token sees only those before it, so documents can be packed one after another.
    """

    network: Any
    tokenizer: Any
    name: str
    revision: str | None
    causal: bool

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return device_of(self.network)

    @property
    def context(self) -> int | None:
        """The longest sequence that the model takes; None: it does not say."""
        return context_length(self.network, self.tokenizer)

    @property
    def reads_proteins(self) -> bool:
        """Whether its texts are sequences of amino acids, in which special tokens mean nothing."""
        return self.network.config.model_type in PROTEIN_MODELS

    def weights_digest(self) -> str:
        """Return a hash of the first numbers of each parameter, by which models are told apart."""
        return weights_digest(self.network)

    def tokenizer_digest(self) -> str:
        """Return a hash of all that decides how text becomes tokens.

        Truncation and padding are left out: each use of a tokenizer sets them anew.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and (backend.truncation or backend.padding):
            backend = copy.deepcopy(backend)
            backend.no_truncation()
            backend.no_padding()
        content = (
            sorted(self.tokenizer.get_vocab().items()) if backend is None else backend.to_str()
        )
        special = sorted(map(str, self.tokenizer.special_tokens_map.items()))
        return f"sha256:{hashlib.sha256(repr((content, special)).encode()).hexdigest()}"


def load_language_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = AUTO,
    device: str = "cpu",
    device_map: str | None = None,
    quantization: str = NONE,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a model from a folder or the hub, as the class that its checkpoint names.

    Args:
        name: a folder with a config.json, or a name on the hub.
        revision: a branch, tag or commit on the hub.
        dtype: one of MODEL_DTYPES; auto: the type of the checkpoint.
        device: where it runs.
        device_map: how accelerate divides it over devices, one of DEVICE_MAPS; None: it does not.
        quantization: bits of its matrices, one of QUANTIZATIONS, by bitsandbytes.
        trust_remote_code: whether code that comes with the model is run.

    Raises:
        ValueError: in one line, where there is no such model or it cannot be captured from.
    """
    kind = model_dtype(dtype)
    placement = Placement(device, device_map, quantization)
    checked_device(device)
    transformers = capture_package("transformers")
    with quiet(transformers), explained(name):
        # False: code that comes with a model is neither run nor asked about.
        where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(name, **where)
        _check_reads_texts(config, transformers)
        loader = getattr(transformers, _class_of(config, transformers))
        network, _ = load_network(loader, name, kind, placement, **where)
        _check_parts(network)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **where)
    commit = getattr(config, "_commit_hash", None)
    return LanguageModel(network, tokenizer, name, commit, _sees_only_earlier(network, tokenizer))


def loaded_language_model(network: Any, tokenizer: Any) -> LanguageModel:
    """Describe a transformers model in memory and its tokenizer; raise ValueError for another."""
    config = getattr(network, "config", None)
    if config is None or not hasattr(network, "get_output_embeddings"):
        kind = type(network).__name__
        raise ValueError(f"model must be a transformers model or the name of one, got {kind}")
    if not hasattr(tokenizer, "special_tokens_map"):
        raise ValueError(
            f"tokenizer must be the model's, of transformers, got {type(tokenizer).__name__}"
        )
    _check_parts(network)
    name = getattr(network, "name_or_path", "") or type(network).__name__
    return LanguageModel(network, tokenizer, name, None, _sees_only_earlier(network, tokenizer))


class HookedModel:
    """A network that gives the activations of some hook points.

    Args:
        network: a PreTrainedModel, or any module that takes input_ids and attention_mask.
        hooks: where to look.
    """

    def __init__(self, network: nn.Module, hooks: Sequence[HookPoint]) -> None:
        if not hooks:
            raise ValueError("hooks: at least one is needed")
        self.network = network
        self.hooks = tuple(hooks)
        for hook in hooks:
            network.get_submodule(hook.module)
        self.decodes = decodes(network, hooks)
        """Whether the hook points are in a decoder, which needs a source for its encoder."""

    @torch.no_grad()
    def activations(
        self,
        tokens: Tensor,  # [B, T] int64
        mask: Tensor | None = None,  # [B, T] bool, False for padding; None: there is none
        source: Source | None = None,
        pixels: Tensor | None = None,  # [B, 3, H, W] float32, of a model that reads images
    ) -> dict[str, Tensor]:
        """Run the model; return the activations [B, T, D] of each hook point by its name.

        Where the hook points are in a decoder, it reads the tokens, and its encoder the source. A
        model that reads images reads the pixels; of the tokens only the shape counts.

        Raises ValueError where a hook point has something else, or runs more than once.
        """
        if self.decodes != (source is not None):
            raise ValueError(
                "a decoder needs a source" if self.decodes else "only a decoder has a source"
            )
        outputs: dict[str, Tensor] = {}
        versions: dict[str, int] = {}
        with ExitStack() as handles:
            for hook in self.hooks:
                keep = self._keeper(hook, tokens, outputs, versions)
                handles.enter_context(hooked(self.network, hook, keep))
            with suppress(_AllFoundError):
                if pixels is not None:
                    run_on_pixels(self.network, pixels)
                else:
                    run_on_tokens(self.network, tokens, mask, source)
        for hook in self.hooks:
            if hook.name not in outputs:
                raise ValueError(f"{hook.name}: the model does not run {hook.module}")
            if outputs[hook.name]._version != versions[hook.name]:
                side = "input" if hook.is_input else "output"
                raise ValueError(f"{hook.name}: the model changes this {side} in place afterwards")
        return {hook.name: outputs[hook.name] for hook in self.hooks}

    def widths(self, pixels: Tensor | None = None, rows: int = 1) -> dict[str, int]:
        """Return the width D of each hook point by its name.

        It is found by running one token, or an image [1, 3, H, W] with its number of rows.
        """
        tokens = torch.zeros(1, rows, dtype=torch.int64, device=device_of(self.network))
        source = whole_source(tokens) if self.decodes else None
        found = self.activations(tokens, source=source, pixels=pixels)
        return {name: activations.shape[-1] for name, activations in found.items()}

    def _keeper(
        self, hook: HookPoint, tokens: Tensor, outputs: dict[str, Tensor], versions: dict[str, int]
    ) -> Callable[[Any], None]:
        def keep(rows: Any) -> None:
            if hook.name in outputs:
                raise ValueError(f"{hook.name}: {hook.module} runs more than once in a pass")
            if isinstance(rows, Tensor) and rows.shape[:-1] == (tokens.numel(),):
                rows = rows.view(*tokens.shape, -1)  # OPT's feed-forward part has no sequences
            if not isinstance(rows, Tensor) or rows.shape[:-1] != tokens.shape:
                got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise ValueError(
                    f"{hook.name}: {hook.module} must {'read' if hook.is_input else 'put out'} one "
                    f"vector a token, [{tokens.shape[0]}, {tokens.shape[1]}, D], got {got}"
                )
            outputs[hook.name] = rows
            versions[hook.name] = rows._version
            if len(outputs) == len(self.hooks):
                raise _AllFoundError

        return keep


def decodes(network: nn.Module, hooks: Sequence[HookPoint]) -> bool:
    """Return whether hook points are in the decoder of a model that has an encoder too.

    Raises ValueError where some are in the one and some in the other, or one is in neither.
    """
    parts = find_parts(network)
    if parts is None:
        return False
    inside = {}
    for hook in hooks:
        in_encoder = parts.is_in_encoder(hook.module)
        if in_encoder == parts.is_in_decoder(hook.module):
            raise ValueError(f"{hook.name}: it is neither in the encoder nor in the decoder")
        inside[in_encoder] = hook.name
    if len(inside) == 2:
        raise ValueError(
            f"hook_points: {inside[True]} is in the encoder and {inside[False]} in the decoder, "
            "which read other tokens: capture one after the other"
        )
    return False in inside


def context_length(network: Any, tokenizer: Any) -> int | None:
    """Return the longest sequence that a model takes; None: nothing says."""
    config = network.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    for path, module in network.named_modules():
        # RoBERTa's positions begin after the padding's.
        is_table = isinstance(module, nn.Embedding) and path.endswith("position_embeddings")
        if is_table and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 1 << 31]
    return min(known, default=None)


def _sees_only_earlier(network: Any, tokenizer: Any) -> bool:
    """Return whether tokens see only earlier ones: by trying, or by the names of the model."""
    tokens = probe_tokens(network, tokenizer, context_length(network, tokenizer))
    looks_ahead = None if tokens is None else sees_later_tokens(network, tokens)
    return is_causal(network.config) if looks_ahead is None else not looks_ahead


def is_causal(config: Any) -> bool:
    """Return whether a configuration names a model whose tokens see only those before them."""
    if getattr(config, "is_decoder", False) or _class_named(config, "ForCausalLM", "LMHeadModel"):
        return True
    if _class_named(config, "ForMaskedLM"):
        return False
    auto = capture_package("transformers.models.auto.modeling_auto")
    return (
        config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def _check_parts(network: nn.Module) -> None:
    """Raise ValueError unless an encoder and a decoder in one can be told apart and read tokens."""
    if not getattr(network.config, "is_encoder_decoder", False):
        return
    kind, parts = type(network).__name__, find_parts(network)
    if parts is None:
        raise ValueError(f"{kind} does not say which part of it is the encoder")
    for path in (parts.encoder, parts.decoder):
        if "input_ids" not in inspect.signature(network.get_submodule(path).forward).parameters:
            raise ValueError(f"{kind} reads no tokens in its {path}, only texts are read by both")


def _check_reads_texts(config: Any, transformers: Any) -> None:
    """Raise ValueError for a model that reads images alone."""
    auto = capture_package("transformers.models.auto.modeling_auto")
    kind = auto.MODEL_MAPPING_NAMES.get(config.model_type)
    if hasattr(config, "text_config") or not isinstance(kind, str):
        return
    if getattr(getattr(transformers, kind, None), "main_input_name", None) == "pixel_values":
        raise ValueError(
            "it reads images, and the documents are texts: give a folder of image files, or name "
            "the column of images with --image-column"
        )


def check_reads_once(network: nn.Module) -> None:
    """Raise ValueError for a model with an encoder and a decoder, whose losses need two texts."""
    if find_parts(network) is not None:
        raise ValueError(
            f"the losses of a model need a single text: {type(network).__name__} has an encoder "
            "and a decoder, which read two (loss_fn mse and fvu need no losses of the model)"
        )


def _class_of(config: Any, transformers: Any) -> str:
    """Return the class to load, with the head if the checkpoint has one, for losses of a model."""
    alone: list[str] = [
        name for name in config.architectures or () if name.endswith("EncoderModel")
    ]
    if alone and hasattr(transformers, alone[0]):  # T5EncoderModel, half of what AutoModel loads
        return alone[0]
    if getattr(config, "is_encoder_decoder", False):
        has_head = _class_named(config, "ForConditionalGeneration", "MTModel", "LMHeadModel")
        return "AutoModelForSeq2SeqLM" if has_head else "AutoModel"
    if _class_named(config, "ForCausalLM", "LMHeadModel"):
        return "AutoModelForCausalLM"
    if _class_named(config, "ForMaskedLM", "ForPreTraining"):
        return "AutoModelForMaskedLM"
    return "AutoModel"


def _class_named(config: Any, *endings: str) -> bool:
    return any(name.endswith(endings) for name in config.architectures or ())


class _AllFoundError(Exception):
    """Ends a forward pass when every hook point has been seen."""
