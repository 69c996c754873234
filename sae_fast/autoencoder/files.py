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


def read_config(directory: str | Path) -> SAEConfig:
    """The configuration of a saved model; raises ValueError where it is not that of one."""
    directory = Path(directory)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory}: not a saved model, it has no {name}")
    config = SAEConfig.load(directory / CONFIG_FILE)
    if not config.is_complete:
        raise ValueError(f"{directory / CONFIG_FILE}: d_in must be given for a saved model, got 0")
    return config


def read_tensors(
    directory: str | Path, expected: dict[str, Tensor], device: str | torch.device
) -> dict[str, Tensor]:
    """The tensors of a saved model, floats as float32.

    Raises ValueError, naming the file, unless they have the names and shapes of `expected`.
    """
    path = Path(directory) / TENSOR_FILE
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    for name, like in expected.items():
        if name not in tensors:
            raise ValueError(f"{path}: has no tensor {name}")
        if tensors[name].shape != like.shape:
            raise ValueError(
                f"{path}: {name} must have shape {tuple(like.shape)} by {CONFIG_FILE}, "
                f"got {tuple(tensors[name].shape)}"
            )
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise ValueError(f"{path}: unknown tensor {unknown[0]}")
    floats = {
        name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()
    }
    return {**tensors, **floats}
