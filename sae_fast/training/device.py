"""The device that was asked for, or an error; no other device is used in its place."""

import torch


def checked_device(name: str) -> torch.device:
    """Return the device of a name.

    Raises:
        ValueError: when there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device = {name!r} is no device; cpu and cuda are") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device = {name!r} is not supported; cpu and cuda are")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if count == 0 or not (device.type == "cpu" or torch.cuda.is_available()):
        raise ValueError(
            f"device = {name!r}: torch {torch.__version__} finds no CUDA device here; "
            "use --device cpu"
        )
    if (device.index or 0) >= count:
        raise ValueError(f"device = {name!r}: this machine has {count}, counted from 0")
    if device.type == "cuda" and ":" not in name:  # a tensor there says which one
        return torch.device("cuda", torch.cuda.current_device())
    return device
