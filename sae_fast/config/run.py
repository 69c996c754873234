"""Configuration of a model and of its training together: `RunConfig`, the config.json of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_fast.config.fields import ConfigFile, by_section, field_names
from sae_fast.config.sae import SAEConfig, config_of
from sae_fast.config.train import TrainConfig


def sections_of(values: Mapping[str, Any]) -> dict[str, type[SAEConfig] | type[TrainConfig]]:
    """Return the configurations that settings are for, by section: the architecture decides."""
    nested = values.get("sae")
    settings = nested if isinstance(nested, dict) else values
    return {"sae": config_of(settings.get("arch")), "train": TrainConfig}


@dataclass(frozen=True, kw_only=True, init=False)
class RunConfig(ConfigFile):
    """Model and training together: the `config.json` of a run.

    The settings of both are given, and read, either as two configurations or flat:
    `RunConfig(k=32, learning_rate=1e-4)` has a `sae.k` that is also its `k`. In a file the fields
    stand in the sections "sae" and "train", or all at the top level.

    Raises ValueError naming a setting that is unknown, wrong, or given in both ways.
    """

    sae: SAEConfig = field(default_factory=SAEConfig)
    """The model."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Its training."""

    def __init__(
        self, *, sae: SAEConfig | None = None, train: TrainConfig | None = None, **settings: Any
    ) -> None:
        flat = by_section(settings, sections_of(settings))
        for section, given in (("sae", sae), ("train", train)):
            if given is not None and flat[section]:
                names = ", ".join(flat[section])
                raise ValueError(f"{names}: give settings of {section} in it, or all of them flat")
        object.__setattr__(self, "sae", sae or SAEConfig(**flat["sae"]))
        object.__setattr__(self, "train", train or TrainConfig(**flat["train"]))

    def __getattr__(self, name: str) -> Any:
        """Return a setting of the model or of its training, by its name or another name it has."""
        for section in ("sae", "train"):
            config = self.__dict__.get(section)
            if config is not None and name in (*config.aliases, *field_names(type(config))):
                return getattr(config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return both configurations as JSON values, by section."""
        return {"sae": self.sae.to_dict(), "train": self.train.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Make the configuration from JSON values; raise ValueError naming unknown keys."""
        parts = cls._split_sections(values, **sections_of(values))
        return cls(
            sae=SAEConfig.from_dict(parts["sae"]), train=TrainConfig.from_dict(parts["train"])
        )

    @classmethod
    def from_saved(cls, values: dict[str, Any]) -> RunConfig:
        """Make the configuration of a run from what was saved with it, see `ConfigFile`."""
        parts = cls._split_sections(values, **sections_of(values))
        return cls(
            sae=SAEConfig.from_saved(parts["sae"]), train=TrainConfig.from_saved(parts["train"])
        )
