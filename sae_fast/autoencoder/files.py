"""A model's directory: its tensors in `sae.safetensors`, its configuration in `config.json`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_fast.config import SAEConfig

CONFIG_FILE = "config.json"
TENSOR_FILE = "sae.safetensors"


def write_model(directory: str | Path, config: SAEConfig, tensors: dict[str, Tensor]) -> None:
    """Write both files, each beside its final name and then renamed."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / f".{TENSOR_FILE}.partial"
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
        os.replace(beside, directory / TENSOR_FILE)
        config.save(beside)
        os.replace(beside, directory / CONFIG_FILE)
    except SafetensorError as error:  # what a full disk raises
        raise OSError(f"{directory / TENSOR_FILE}: cannot be written ({error})") from None
    finally:
        beside.unlink(missing_ok=True)


def read_model(
    directory: str | Path, device: str | torch.device
) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Configuration and tensors; raises ValueError, naming the file, where they do not fit."""
    directory = Path(directory)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory}: not a saved model, it has no {name}")
    config = SAEConfig.load(directory / CONFIG_FILE)
    if not config.is_complete:
        raise ValueError(f"{directory / CONFIG_FILE}: d_in must be given for a saved model, got 0")
    path = directory / TENSOR_FILE
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    for name, shape in expected_shapes(config).items():
        if name not in tensors:
            raise ValueError(f"{path}: has no tensor {name}")
        found = tuple(tensors[name].shape)
        if found != shape:
            raise ValueError(
                f"{path}: {name} must have shape {shape} for d_in = {config.d_in} and "
                f"d_sae = {config.d_sae}, got {found}"
            )
    unknown = sorted(tensors.keys() - expected_shapes(config).keys())
    if unknown:
        raise ValueError(f"{path}: unknown tensor {unknown[0]}")
    floats = {
        name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()
    }
    return config, {**tensors, **floats}


def expected_shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model."""
    matrix, latents, width = (config.d_sae, config.d_in), (config.d_sae,), (config.d_in,)
    own = {"batch_topk": {"threshold": (), "threshold_updates": ()}}
    return {
        **own.get(config.arch, {}),
        "W_enc": matrix,
        "b_enc": latents,
        "W_dec": matrix,
        "b_dec": width,
        "activation_mean": width,
        "activation_scale": (),
        "tokens_since_fired": latents,
    }
