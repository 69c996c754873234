"""sae_fast: sparse autoencoders on transformer activations, trained fast and exactly."""

from typing import TYPE_CHECKING, Any

from sae_fast.import_errors import require_torch

require_torch()  # says so at once where it is missing, and does not import it

if TYPE_CHECKING:
    from sae_fast.autoencoder import SparseAutoencoder
    from sae_fast.autoencoder.acceleration import accelerate
    from sae_fast.autoencoder.architectures import register_architecture
    from sae_fast.autoencoder.loss_terms import LossTerm
    from sae_fast.config import (
        RunConfig,
        SAEConfig,
        TrainConfig,
        gpt2_medium_sae_config,
        gpt2_sae_config,
        pythia_1_4b_sae_config,
    )
    from sae_fast.dictionary_evaluation import evaluate_dictionary
    from sae_fast.ops.native import build_info
    from sae_fast.training.callbacks import Callback
    from sae_fast.training.from_model.loaded_model import train_from_model
    from sae_fast.training.sweep import Sweep, read_sweep
    from sae_fast.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "LossTerm",
    "RunConfig",
    "SAEConfig",
    "SparseAutoencoder",
    "Sweep",
    "TrainConfig",
    "Trainer",
    "__version__",
    "accelerate",
    "build_info",
    "evaluate_dictionary",
    "gpt2_medium_sae_config",
    "gpt2_sae_config",
    "pythia_1_4b_sae_config",
    "read_sweep",
    "register_architecture",
    "train_from_model",
]

# Imported when first asked for, so that the help of a command needs no torch.
_HOMES = {
    "Callback": "sae_fast.training.callbacks",
    "LossTerm": "sae_fast.autoencoder.loss_terms",
    "RunConfig": "sae_fast.config",
    "SAEConfig": "sae_fast.config",
    "TrainConfig": "sae_fast.config",
    "SparseAutoencoder": "sae_fast.autoencoder",
    "Sweep": "sae_fast.training.sweep",
    "Trainer": "sae_fast.training.trainer",
    "accelerate": "sae_fast.autoencoder.acceleration",
    "build_info": "sae_fast.ops.native",
    "evaluate_dictionary": "sae_fast.dictionary_evaluation",
    "gpt2_medium_sae_config": "sae_fast.config",
    "gpt2_sae_config": "sae_fast.config",
    "pythia_1_4b_sae_config": "sae_fast.config",
    "read_sweep": "sae_fast.training.sweep",
    "register_architecture": "sae_fast.autoencoder.architectures",
    "train_from_model": "sae_fast.training.from_model.loaded_model",
}


def __dir__() -> list[str]:
    """Return the public names, which completion shows, and the module's own with underscores."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae_fast' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
