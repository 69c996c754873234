"""A model as a plain dictionary, in which all formats of other libraries are written, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_fast.autoencoder.folding import folded_normalization
from sae_fast.autoencoder.transcoder import SKIP
from sae_fast.config import SAEConfig
from sae_fast.interop import DictionaryError, PlainDictionary
from sae_fast.interop.dictionary import ARCHITECTURES

if TYPE_CHECKING:
    from sae_fast.autoencoder.model import SparseAutoencoder

_UNIT = 1e-5  # how far the norm of a decoder row may be from 1 and be called 1
_STARTS_AT_ONE = ("activation_scale", "target_scale")


@torch.no_grad()
def to_plain(sae: SparseAutoencoder) -> PlainDictionary:
    """Return a model as a dictionary of raw activations, on the CPU in float32.

    Its matrices share their memory with the model where they are equal. Mean and scale are folded
    in. What only training needs is left out: counters, probe.

    Raises DictionaryError for an architecture that no other library has.
    """
    config = sae.config
    if config.arch not in ARCHITECTURES:
        raise DictionaryError(f"arch {config.arch} is of sae_fast alone and no format has it")
    if config.has_scale:
        sae = folded_normalization(sae, shares=True)
    state = {
        name: tensor.detach().to("cpu", torch.float32) if tensor.is_floating_point() else tensor
        for name, tensor in sae.state_dict().items()
    }
    threshold = state.get("threshold")
    if "threshold_updates" in state and int(state["threshold_updates"]) == 0:
        threshold = None
    return PlainDictionary(
        config.arch,
        W_enc=state["W_enc"],
        b_enc=state["b_enc"],
        W_dec=state["W_dec"],
        b_dec=state["b_dec"],
        subtract_b_dec=config.subtract_b_dec and not config.transcoder,
        transcoder=config.transcoder,
        k=config.k,
        activation=config.activation,
        threshold=None if threshold is None else threshold.clamp_min(0),
        r_mag=state.get("r_mag"),
        b_mag=state.get("b_mag"),
        W_skip=state.get(SKIP),
        prefixes=config.matryoshka_prefixes,
        use_relu=config.use_relu,
        token_norm=config.normalize_activations if config.normalizes_tokens else None,
        origin=dict(sae.origin),
    )


def config_for(dictionary: PlainDictionary, place: Path) -> SAEConfig:
    """Return the configuration of a model that is this dictionary, read from a place.

    Raises DictionaryError, naming the place, for values that no configuration has.
    """
    assert not (dictionary.transcoder and dictionary.subtract_b_dec)  # which no model here does
    normalization = dictionary.token_norm or "none"
    settings: dict[str, Any] = {"arch": dictionary.arch, "normalize_activations": normalization}
    if dictionary.k is not None:
        settings["k"] = dictionary.k
    if dictionary.activation != "topk":
        settings["activation"] = dictionary.activation
    if dictionary.prefixes is not None:
        settings["matryoshka_prefixes"] = dictionary.prefixes
    if not dictionary.use_relu:
        settings["use_relu"] = False
    if dictionary.arch in ("relu", "jumprelu", "gated"):
        norms = torch.linalg.vector_norm(dictionary.W_dec, dim=1)
        is_unit = bool(((norms - 1).abs() <= _UNIT).all())
        settings["decoder_norm"] = "unit" if is_unit else "free"
    if dictionary.transcoder:
        settings |= {"transcoder": True, "d_out": dictionary.d_out}
        settings["skip_connection"] = dictionary.W_skip is not None
    elif not dictionary.subtract_b_dec:
        settings["subtract_b_dec"] = False
    try:
        return SAEConfig(d_in=dictionary.d_in, d_sae=dictionary.d_sae, **settings)
    except ValueError as error:
        raise DictionaryError(f"{place}: {error}") from None


def state_for(
    sae: SparseAutoencoder, dictionary: PlainDictionary, device: str | torch.device
) -> dict[str, Tensor]:
    """Return the tensors of a model for a dictionary on a device; counters stand at 0."""
    tensors = dictionary.tensors()
    starts = sae.architecture.buffers()
    state = {}
    for name, like in sae.state_dict().items():
        if name in tensors:
            state[name] = tensors[name]
        elif name in starts:
            state[name] = starts[name]
        else:
            fill = 1 if name in _STARTS_AT_ONE else 0
            state[name] = torch.full(like.shape, fill, dtype=like.dtype)
    if "threshold_updates" in state and dictionary.threshold is not None:
        state["threshold_updates"].fill_(1)
    return {name: tensor.to(device) for name, tensor in state.items()}
