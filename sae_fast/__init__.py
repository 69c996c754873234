"""sae_fast: sparse autoencoders on transformer activations, trained fast and exactly."""

from typing import TYPE_CHECKING

from sae_fast.import_errors import require_torch
from sae_fast.lazy_names import lazy_names

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
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "sae_fast.training.callbacks": ("Callback",),
        "sae_fast.autoencoder.loss_terms": ("LossTerm",),
        "sae_fast.config": (
            "RunConfig",
            "SAEConfig",
            "TrainConfig",
            "gpt2_medium_sae_config",
            "gpt2_sae_config",
            "pythia_1_4b_sae_config",
        ),
        "sae_fast.autoencoder": ("SparseAutoencoder",),
        "sae_fast.training.sweep": ("Sweep", "read_sweep"),
        "sae_fast.training.trainer": ("Trainer",),
        "sae_fast.autoencoder.acceleration": ("accelerate",),
        "sae_fast.ops.native": ("build_info",),
        "sae_fast.dictionary_evaluation": ("evaluate_dictionary",),
        "sae_fast.autoencoder.architectures": ("register_architecture",),
        "sae_fast.training.from_model.loaded_model": ("train_from_model",),
    },
)
