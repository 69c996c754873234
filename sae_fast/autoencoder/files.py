"""A model's directory: its tensors in `sae.safetensors`, its configuration in `config.json`.

config.json also has the model's origin: of which activations it is, as far as their shards said,
and the units that its parameters, thresholds and code values are in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_fast.activations.origin import checked_origin
from sae_fast.atomic_files import replacing
from sae_fast.autoencoder.foreign import explain_missing
from sae_fast.config import SAEConfig
from sae_fast.json_files import read_json, shown
from sae_fast.ops import NORMALIZED, RAW, Units
from sae_fast.tensor_files import (
    checked_tensors,
    has_checksum,
    load_tensors,
    save_tensors,
    sha256_of,
    shapes_in,
)
from sae_fast.text_links import followed

CONFIG_FILE = "config.json"
TENSOR_FILE = "sae.safetensors"
ORIGIN = "origin"
UNITS = "units"
RUN_CHECKPOINTS = "checkpoints"
_SUMS_FILE = "trainer.json"  # in a checkpoint


def write_model(
    directory: str | Path,
    config: SAEConfig,
    tensors: Mapping[str, Tensor],
    origin: Mapping[str, Any],
) -> None:
    """Write both files, each beside its final name and then renamed."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / TENSOR_FILE) as temporary:
        save_tensors(temporary, tensors)
    write_config(directory, config, origin)


def write_config(directory: Path, config: SAEConfig, origin: Mapping[str, Any]) -> None:
    """Write the configuration of a model beside its tensors."""
    with replacing(directory / CONFIG_FILE) as temporary:
        config.save(temporary)
        content = json.loads(temporary.read_text(encoding="utf-8"))
        content[UNITS] = units_of(config)
        if origin:
            content[ORIGIN] = dict(origin)
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def units_of(config: SAEConfig) -> Units:
    """Return the units of a model's parameters: "raw" where activations are not normalised.

    "normalized" is also by numbers of each token.
    """
    return RAW if config.normalize_activations == "none" else NORMALIZED


def model_directory(place: str | Path) -> Path:
    """Return the directory of a saved model, which for a run is its latest checkpoint."""
    place = followed(place)  # `latest` or `best` of a run
    checkpoints = place / RUN_CHECKPOINTS
    if not (place / TENSOR_FILE).exists() and checkpoints.is_dir():
        latest = followed(checkpoints / "latest")
        return latest if latest.is_dir() else place
    return place


def is_saved_model(directory: Path) -> bool:
    """Return whether both files of a saved model are there."""
    return all((directory / name).is_file() for name in (CONFIG_FILE, TENSOR_FILE))


def require_no_model(directory: Path) -> None:
    """Raise ValueError where the directory that results are written to is of a model or a run."""
    if is_saved_model(directory) or (directory / RUN_CHECKPOINTS).is_dir():
        raise ValueError(
            f"--out {directory}: it holds a trained model, beside which results do not belong: "
            "name another directory"
        )


def read_config(directory: str | Path) -> SAEConfig:
    """Read the configuration of a saved model; raise ValueError where it is another file."""
    directory = Path(directory)
    if not is_saved_model(directory):
        raise explain_missing(directory)
    _check_sums(directory)
    path = directory / CONFIG_FILE
    config = SAEConfig.load(path, saved=True)
    units = read_json(path).get(UNITS, units_of(config))
    if units != units_of(config):
        raise ValueError(
            f"{path}: units must be {units_of(config)!r} with normalize_activations "
            f"{config.normalize_activations!r}, got {shown(units)}"
        )
    if not config.is_complete:
        raise ValueError(f"{directory / CONFIG_FILE}: d_in must be given for a saved model, got 0")
    _check_sizes(directory, config)
    return config


def read_origin(directory: str | Path) -> dict[str, Any]:
    """Read of which activations a saved model is; empty where its file does not say."""
    path = Path(directory) / CONFIG_FILE
    return checked_origin(read_json(path).get(ORIGIN, {}), f"{path}: {ORIGIN}")


def read_tensors(
    directory: str | Path, expected: Mapping[str, Tensor], device: str | torch.device
) -> dict[str, Tensor]:
    """Read the tensors of a saved model, floats as float32.

    Raises ValueError, naming the file, unless names, shapes and kinds are as in `expected`, all
    numbers finite, and the checksum, if there is one, right.
    """
    path = Path(directory) / TENSOR_FILE
    tensors = checked_tensors(
        path, load_tensors(path, device), expected, because=f" by {CONFIG_FILE}"
    )
    for name, tensor in tensors.items():
        if name.endswith("_scale") and not bool((tensor > 0).all()):
            raise ValueError(f"{path}: {name} must be greater than 0")
        if not tensor.is_floating_point() and bool((tensor < 0).any()):
            raise ValueError(f"{path}: {name} must not be negative")
    return tensors


def _check_sums(directory: Path) -> None:
    """Compare the files of a checkpoint with the sums in its trainer.json, if it is one.

    Tensors that carry a checksum of their own are checked when they are read.
    """
    path = directory / _SUMS_FILE
    if not path.is_file():
        return
    content = read_json(path)
    sums = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(sums, dict):
        raise ValueError(f"{path}: sha256 must be a JSON object, got {shown(sums)}")
    names = [CONFIG_FILE, *([] if has_checksum(directory / TENSOR_FILE) else [TENSOR_FILE])]
    for name in names:
        if sha256_of(directory / name) != sums.get(name):
            raise ValueError(f"{directory / name} is corrupted: its checksum does not match")


def _check_sizes(directory: Path, config: SAEConfig) -> None:
    """Compare the sizes of the configuration with the tensors before any model is made of them."""
    shapes = shapes_in(directory / TENSOR_FILE)
    expected = {
        "W_enc": (config.d_sae, config.d_in),
        "W_dec": (config.d_sae, config.target_width),
    }
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            raise ValueError(
                f"{directory / TENSOR_FILE}: {name} must have shape {shape} by {CONFIG_FILE}, "
                f"got {shapes[name]}"
            )
