"""Configuration of a model (`SAEConfig`), of its training (`TrainConfig`), of both (`RunConfig`).

Field names are the flags of the command line and the keys of the JSON files. The text under a field
is its help; its unit stands in brackets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sae_fast.config_file import ConfigFile
from sae_fast.sae_config import SAEConfig
from sae_fast.train_config import TrainConfig

__all__ = ["RunConfig", "SAEConfig", "TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(ConfigFile):
    """Model and training together: the `config.json` of a run.

    In a file the fields stand in the sections "sae" and "train", or all at the top level.
    """

    sae: SAEConfig = field(default_factory=SAEConfig)
    """The model."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Its training."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Make the configuration from JSON values; raises ValueError naming unknown keys."""
        return cls(**cls._read_sections(values, sae=SAEConfig, train=TrainConfig))
