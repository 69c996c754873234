"""The state of every random generator a run may draw from, as tensors and JSON values."""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (the legacy generator is what other code draws from)
    torch.manual_seed(seed)


def random_tensors() -> dict[str, torch.Tensor]:
    """Return the states of torch's generators; of GPUs only those that were drawn from."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for index, generator in enumerate(torch.cuda.default_generators):
            if generator.get_offset() != 0:  # else it is what the seed makes it
                states[f"rng.cuda.{index}"] = generator.get_state()
    return states


def random_values() -> dict[str, Any]:
    """Return the states of Python's and NumPy's generators."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    numpy_state = [name, np.asarray(keys).tolist(), position, has_gauss, cached]
    return {"python": [version, list(words), gauss], "numpy": numpy_state}


def restore_random(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Set every generator back to the states saved."""
    torch.set_rng_state(tensors["rng.cpu"])
    for index in range(torch.cuda.device_count()):
        if (state := tensors.get(f"rng.cuda.{index}")) is not None:
            torch.cuda.set_rng_state(state, index)
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = values["numpy"]
    words_of_numpy = np.asarray(keys, dtype=np.uint32)
    np.random.set_state((name, words_of_numpy, position, has_gauss, cached))  # noqa: NPY002
