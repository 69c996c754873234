"""Change parameters and keep the function: decoder norms and the normalisation folded in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_fast.autoencoder.transcoder import SKIP
from sae_fast.config import SAEConfig

if TYPE_CHECKING:
    from sae_fast.autoencoder.model import SparseAutoencoder

_UNIT = 1e-5  # how far the norm of a row may be from 1 and still be called 1


@torch.no_grad()
def fold_decoder_norms_(sae: SparseAutoencoder) -> None:
    """Scale decoder rows to unit length and codes by their norms, in place.

    See `SparseAutoencoder.fold_decoder_norms`.
    """
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    if sae.architecture.compares_latents:
        if bool(((norms - 1).abs() <= _UNIT).all()):
            return
        raise ValueError(
            f"decoder rows must have norm 1 with arch {sae.config.arch}, which chooses the "
            f"largest values: folding would change the choice, got norms from "
            f"{float(norms.min()):g} to {float(norms.max()):g}"
        )
    factor = torch.where(norms > 0, norms, 1.0)
    if sae.config.arch == "slots":
        factor[sae.config.group_split :] = 1.0
    sae.W_dec.div_(factor[:, None])
    sae.W_enc.mul_(factor[:, None])
    sae.b_enc.mul_(factor)
    _rescale_(sae, factor)


@torch.inference_mode(False)
@torch.no_grad()
def folded_normalization(sae: SparseAutoencoder, *, shares: bool = False) -> SparseAutoencoder:
    """Return a model of raw activations with the same function.

    Args:
        sae: the model.
        shares: whether matrices that stay as they are share their memory with `sae`.
    """
    if sae.config.normalizes_tokens:
        raise ValueError(
            f"normalize_activations {sae.config.normalize_activations} cannot be folded in: each "
            "token is normalised by numbers of its own"
        )
    values = {**sae.config.to_dict(), "normalize_activations": "none"}
    with torch.device("meta"):
        folded = type(sae)(SAEConfig.from_dict(values))
    kept = ("W_dec", "W_enc") if sae.no_bias is None else ("W_dec",)
    state = {
        name: tensor if shares and name in kept else tensor.clone()
        for name, tensor in sae.state_dict().items()
    }
    folded.load_state_dict(state, assign=True)
    if sae.no_bias is not None:
        folded.no_bias = sae.no_bias.clone()
    folded.origin = dict(sae.origin)
    fold_normalization_(folded, sae)
    for own, parameter in zip(folded.parameters(), sae.parameters(), strict=True):
        own.requires_grad_(parameter.requires_grad)
    return folded.train(sae.training)


@torch.no_grad()
def fold_normalization_(folded: SparseAutoencoder, sae: SparseAutoencoder) -> None:
    """Let `folded`, a copy of the parameters of `sae`, take and give raw activations.

    See `SparseAutoencoder.fold_normalization`.
    """
    folded.b_enc.div_(sae.output_scale)
    folded.b_dec.div_(sae.output_scale).add_(sae.output_mean)
    _rescale_(folded, 1 / sae.output_scale)
    if sae.no_bias is not None:
        _fold_input_(folded, sae)
    for mean, scale in (
        (folded.activation_mean, folded.activation_scale),
        (folded.output_mean, folded.output_scale),
    ):
        mean.zero_()
        scale.fill_(1.0)


@torch.no_grad()
def unfold_normalization_(sae: SparseAutoencoder) -> None:
    """Change parameters of raw activations into ones of normalised activations, in place.

    The model's mean and scale are set; its other tensors are of a model without normalisation. It
    is the inverse of `fold_normalization_`: the function of raw activations stays.
    """
    ratio, mean = sae.output_scale / sae.activation_scale, sae.activation_mean
    if sae.no_bias is not None:
        moved = sae.W_enc @ mean
        sae.b_enc.add_(moved)
        sae.architecture.rebase_(sae.weights, -moved)
        if sae.config.skip_connection:
            sae.b_dec.add_(sae.get_parameter(SKIP) @ mean)
            sae.get_parameter(SKIP).mul_(ratio)
        sae.W_enc.mul_(ratio)
    sae.b_dec.sub_(sae.output_mean).mul_(sae.output_scale)
    sae.b_enc.mul_(sae.output_scale)
    _rescale_(sae, sae.output_scale)


def _rescale_(sae: SparseAutoencoder, factor: Tensor) -> None:
    """Change what has the code's unit to fit values multiplied by `factor`, 0-d or [F]."""
    sae.architecture.rescale_(sae.weights, factor)
    sae.guidance.rescale_(sae.weights.own, factor)


def _fold_input_(folded: SparseAutoencoder, sae: SparseAutoencoder) -> None:
    """Let an encoder that subtracts no b_dec, and a skip connection, take raw activations.

    With s and t the scales of x and y (of x alone unless it is a transcoder), the output
    already folded: W_enc' = W_enc s / t, b_enc loses W_enc' mean, and so the latents are
    the ones of `sae` by t; W_skip' = W_skip s / t, and b_dec loses W_skip' mean.
    """
    ratio, mean = sae.activation_scale / sae.output_scale, sae.activation_mean
    folded.W_enc.mul_(ratio)
    moved = folded.W_enc @ mean
    folded.b_enc.sub_(moved)
    folded.architecture.rebase_(folded.weights, moved)
    if folded.config.skip_connection:
        folded.get_parameter(SKIP).mul_(ratio)
        folded.b_dec.sub_(folded.get_parameter(SKIP) @ mean)
