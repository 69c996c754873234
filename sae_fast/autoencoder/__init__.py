"""The model: parameters, initialisation, one file per architecture, losses."""

from sae_fast.autoencoder.losses import TrainingLoss
from sae_fast.autoencoder.model import SparseAutoencoder

__all__ = ["SparseAutoencoder", "TrainingLoss"]
