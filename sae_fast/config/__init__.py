"""Configuration of a model (`SAEConfig`), of its training (`TrainConfig`), of both (`RunConfig`).

Field names are the flags of the command line and the keys of the JSON files. The text under a field
is its help; its unit stands in brackets.
"""

from sae_fast.config.presets import (
    gpt2_medium_sae_config,
    gpt2_sae_config,
    pythia_1_4b_sae_config,
)
from sae_fast.config.run import RunConfig
from sae_fast.config.sae import SAEConfig
from sae_fast.config.train import TrainConfig

__all__ = [
    "RunConfig",
    "SAEConfig",
    "TrainConfig",
    "gpt2_medium_sae_config",
    "gpt2_sae_config",
    "pythia_1_4b_sae_config",
]
