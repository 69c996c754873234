"""Loading a transformers model: its type, where its weights go, and errors of one line."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast.activations.capture.packages import capture_package, extra_package

AUTO, NONE = "auto", "none"
MODEL_DTYPES = (AUTO, "float32", "bfloat16", "float16")
DEVICE_MAPS = (AUTO, "balanced", "balanced_low_0", "sequential")
QUANTIZATIONS = (NONE, "8bit", "4bit")
DIGEST_NUMBERS = 1024  # of each parameter that go into the digest of the weights


@dataclass(frozen=True)
class Placement:
    """Where the weights of a model are, and in how many bits.

    Attributes:
        device: where the model runs, unless a device map says it.
        device_map: one of DEVICE_MAPS: how accelerate divides the model over the GPUs, and where
            they are too small, the memory of the host; None: it is on one device.
        quantization: one of QUANTIZATIONS: the bits of the matrices, by bitsandbytes.

    Raises:
        ValueError: naming what there is not.
    """

    device: str = "cpu"
    device_map: str | None = None
    quantization: str = NONE

    def __post_init__(self) -> None:
        """Check the values and that the packages are there."""
        for name, value, known in (
            ("device_map", self.device_map, DEVICE_MAPS),
            ("quantization", self.quantization, QUANTIZATIONS),
        ):
            if value is not None and value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.device_map is not None:
            if self.device != "cpu":
                raise ValueError(
                    f"device_map = {self.device_map!r} decides the devices, and device = "
                    f"{self.device!r}: give one of the two"
                )
            extra_package("accelerate", f"device_map = {self.device_map!r}")
        if self.quantization != NONE:
            extra_package("bitsandbytes", f"quantization = {self.quantization!r}")
            extra_package("accelerate", f"quantization = {self.quantization!r}")


def load_network(
    loader: Any, name: str, dtype: Any, placement: Placement, **where: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a network where it is to be, in evaluation mode and without gradients.

    Args:
        loader: a class of transformers with `from_pretrained`.
        name: a folder or a name on the hub.
        dtype: of torch, or "auto".
        placement: where its weights go.
        where: further arguments of `from_pretrained`.

    Returns: the network, and the report of its loading where `output_loading_info` is given.
    """
    transformers, device = capture_package("transformers"), checked_device(placement.device)
    how: dict[str, Any] = {"dtype": dtype, **where}
    if placement.device_map is not None:
        how["device_map"] = placement.device_map
    if placement.quantization != NONE:
        bits = {f"load_in_{placement.quantization}": True}
        how["quantization_config"] = transformers.BitsAndBytesConfig(**bits)
        how.setdefault("device_map", {"": str(device)})
    loaded = loader.from_pretrained(name, **how)
    network, report = loaded if where.get("output_loading_info") else (loaded, {})
    if "device_map" not in how:
        network = network.to(device)
    return network.eval().requires_grad_(False), report


def model_dtype(name: str) -> Any:
    """Return the type of torch with a name, or auto; raise ValueError for another name."""
    if name not in MODEL_DTYPES:
        raise ValueError(f"model_dtype must be one of {', '.join(MODEL_DTYPES)}, got {name!r}")
    return name if name == AUTO else getattr(torch, name)


def checked_device(name: str) -> torch.device:
    """Return a device by its name; raise ValueError where there is none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: torch has no device {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: torch finds no CUDA device, got {name!r}")
    return device


def device_of(network: nn.Module) -> torch.device:
    """Return the device that a network takes its tokens on.

    Weights that accelerate fetches when they are needed are on the device meta before.
    """
    hooks = (getattr(module, "_hf_hook", None) for module in network.modules())
    devices = (parameter.device for parameter in network.parameters())
    first = next(devices, torch.device("cpu"))
    if first.type != "meta":
        return first
    run_on = (getattr(hook, "execution_device", None) for hook in hooks)
    place = next((device for device in run_on if device is not None), "cpu")
    return torch.device(place)


def weights_digest(network: nn.Module) -> str:
    """Return a hash of the first numbers of each parameter, by which models are told apart."""
    digest = hashlib.sha256()
    for name, parameter in network.named_parameters():
        first = _held(network, name, parameter).flatten()[:DIGEST_NUMBERS].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(first.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _held(network: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Return the numbers of a parameter, also where accelerate keeps them elsewhere."""
    if not parameter.is_meta:
        return parameter.detach()
    accelerate = extra_package("accelerate", "a model in parts")
    owner, _, own = name.rpartition(".")
    module = network.get_submodule(owner)
    with accelerate.utils.align_module_device(module):
        return getattr(module, own).detach().cpu()  # type: ignore[no-any-return]


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn any error of transformers while it loads a model into a ValueError of one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model: {name} cannot be loaded: it needs code of its own to be run, which "
                "--trust-remote-code does; read that code before"
            ) from error
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        others = [] if Path(name).exists() else _known_models(name)
        near = difflib.get_close_matches(name, others, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"model: {name} cannot be loaded{hint}: {first}") from error


def _known_models(name: str) -> list[str]:
    """List models on this machine: downloaded ones, and folders beside the one named."""
    constants = capture_package("huggingface_hub.constants")
    cached = Path(constants.HF_HUB_CACHE).glob("models--*")
    names = [path.name.removeprefix("models--").replace("--", "/") for path in cached]
    beside = Path(name).parent.glob("*/config.json")
    return [*names, *(str(path.parent) for path in beside)]


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Turn transformers' progress bars and advice off while it loads."""
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity(logging.ERROR)
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
