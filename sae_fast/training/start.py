"""Starting from a trained model: `start_from`, and what separate_value needs of it."""

from __future__ import annotations

from pathlib import Path

import torch

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.checkpoint import CheckpointError, find_checkpoint

_COUNTERS = ("tokens_since_fired",)


def start_model(sae: SAEConfig, config: TrainConfig) -> SparseAutoencoder | None:
    """The model that `start_from` names; None where a new one is to be made.

    Raises ValueError, naming the setting, where it cannot be what this training starts from.
    """
    if config.start_from is None:
        if sae.slots_mode == "separate_value":
            raise ValueError(
                "slots_mode separate_value trains the value heads alone: "
                "name the model with trained slots by --start-from"
            )
        return None
    path = Path(config.start_from)
    try:
        if not (path / "sae.safetensors").exists():
            path = find_checkpoint(config.start_from, None) or path
    except CheckpointError:
        raise ValueError(f"start_from: {path} is no model, no checkpoint and no run") from None
    try:
        known = SparseAutoencoder.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"start_from: {error}") from error
    for name in ("arch", "d_in", "d_sae", "normalize_activations", "n_relations"):
        before, now = getattr(known.config, name), getattr(sae, name)
        if before != now:
            raise ValueError(
                f"start_from: {path} is of a model with {name} = {before}, this one has {now}"
            )
    return known


@torch.no_grad()
def start_from_(sae: SparseAutoencoder, known: SparseAutoencoder) -> None:
    """Copy what both models have, normalisation included; the dead-latent counters start anew.

    Raises ValueError where a tensor has another shape.
    """
    state = known.state_dict()
    for name, tensor in sae.state_dict().items():
        if name not in state or name in _COUNTERS:
            continue
        if state[name].shape != tensor.shape:
            shapes = tuple(state[name].shape), tuple(tensor.shape)
            raise ValueError(f"start_from: {name} has shape {shapes[0]}, this model's {shapes[1]}")
        tensor.copy_(state[name])
