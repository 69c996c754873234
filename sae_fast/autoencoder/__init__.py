"""The model: parameters, initialisation, one file per family of architectures, losses, metrics."""

from sae_fast.autoencoder.losses import TrainingLoss
from sae_fast.autoencoder.model import SparseAutoencoder
from sae_fast.autoencoder.penalties import temporal_smoothness_loss

__all__ = ["SparseAutoencoder", "TrainingLoss", "temporal_smoothness_loss"]
