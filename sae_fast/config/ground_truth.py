"""The settings of `python -m sae_fast.ground_truth NAME`, a class for each task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import setting

SEEDS = (42, 123, 456, 789, 1011)
# Settings that do not change the result of one training on the task.
_OF_THE_CALL = ("out", "arch", "seeds", "num_threads")


@configuration()
@dataclass(frozen=True, kw_only=True)
class GroundTruthConfig(ConfigFile):
    """Train autoencoders on a task whose right answer is known, and score them against it."""

    title: ClassVar[str] = "Task"

    out: Path | None = setting(None, metavar="DIR", heading="Results and trainings")
    """Directory for results.json, results.md, pictures and models. A call with the settings of an
    earlier one keeps what is finished there and makes the rest."""
    arch: tuple[str, ...] = setting(())
    """Architectures to train; default: all of the package and all registered ones, slots only where
    the task has labels."""
    seeds: tuple[int, ...] = setting(SEEDS, at_least=0)
    """Seeds of the trainings of each architecture; data and task model stay the same."""
    d_sae: int = setting(1024, at_least=1)
    """Latents. [latents]"""
    k: int = setting(32, at_least=1)
    """Latents active per token: the k of the architectures that have one, the L0 that the others
    are led to. [latents]"""
    max_steps: int = setting(3000, at_least=1)
    """Training steps of each autoencoder. [steps]"""
    batch_size: int = setting(1024, at_least=1)
    """Rows in a step. [rows]"""
    learning_rate: float | None = setting(None, above=0)
    """Peak of the learning rate; default: 2e-4 / sqrt(d_sae / 2**14)."""
    data_seed: int = setting(0, at_least=0)
    """Seed of the data and of the task's own model."""
    num_threads: int | None = setting(None, at_least=1)
    """CPU threads; default: torch's own choice. [threads]"""

    def of_the_task(self) -> dict[str, object]:
        """Return the settings that results depend on, without place, selection and threads."""
        values = self.to_dict()
        return {name: value for name, value in values.items() if name not in _OF_THE_CALL}


@configuration()
@dataclass(frozen=True, kw_only=True)
class SuperpositionConfig(GroundTruthConfig):
    """Find a known dictionary: more features than dimensions, heavy-tailed, correlated and nested.

    Rows are sums of few features, unit directions with log-normal magnitudes. Some features are
    children that are active only while their parent is; the others are correlated in groups.
    """

    d_sae: int = setting(160, at_least=1)
    k: int = setting(8, at_least=1)
    d_in: int = setting(64, at_least=2, heading="Data")
    """Width of the rows. [numbers]"""
    features: int = setting(160, at_least=2)
    """Features of the known dictionary. [features]"""
    active: float = setting(8.0, above=0)
    """Features active in a row, on average. [features]"""
    parents: int = setting(16, at_least=0)
    """Features that have children. [features]"""
    children: int = setting(3, at_least=1)
    """Children of each parent, of which at most one is active. [features]"""
    child_share: float = setting(0.6, at_least=0, at_most=1)
    """Share of the rows with an active parent in which one of its children is active."""
    group_size: int = setting(8, at_least=1)
    """Features, neither parents nor children, whose activity is correlated. [features]"""
    correlation: float = setting(0.4, at_least=0, below=1)
    """Correlation of two features of a group, before the threshold that makes them active."""
    tail: float = setting(0.7, at_least=0)
    """Standard deviation of the logarithm of magnitudes, whose mean is 1."""
    rows: int = setting(200_000, at_least=2)
    """Rows to train on. [rows]"""
    heldout_rows: int = setting(20_000, at_least=1)
    """Rows to score on. [rows]"""

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        nested = self.parents * (1 + self.children)
        if nested > self.features:
            raise ValueError(
                f"features must be at least parents * (1 + children) = {nested}, "
                f"got {self.features}"
            )
        if self.active >= self.features / 4:
            raise ValueError(
                f"active must be below a quarter of features = {self.features}, got {self.active:g}"
            )


@configuration()
@dataclass(frozen=True, kw_only=True)
class ModularAdditionConfig(GroundTruthConfig):
    """Find the frequencies with which a one-layer transformer adds modulo p.

    The transformer is trained on a share of the pairs (a, b) until it generalises to the others.
    Autoencoders train on its activations at the last token of all pairs.
    """

    d_sae: int = setting(1024, at_least=1)
    k: int = setting(32, at_least=1)
    max_steps: int = setting(2000, at_least=1)
    p: int = setting(59, at_least=5, heading="Transformer")
    """Modulus, an odd number. [numbers]"""
    site: Literal["residual", "mlp_out"] = setting("residual")
    """Activations at the last token. residual: the stream after the MLP; mlp_out: the output of the
    MLP."""
    train_fraction: float = setting(0.5, above=0, below=1)
    """Share of the pairs that the transformer is trained on. [share]"""
    d_model: int = setting(128, at_least=4)
    """Width of the residual stream. [numbers]"""
    heads: int = setting(4, at_least=1)
    """Attention heads. [heads]"""
    d_mlp: int = setting(512, at_least=1)
    """Neurons of the MLP. [neurons]"""
    model_steps: int = setting(2000, at_least=1)
    """Training steps of the transformer, each on all its pairs. [steps]"""
    model_learning_rate: float = setting(1e-3, above=0)
    """Its learning rate, which falls to 0 in the last third."""
    model_weight_decay: float = setting(1.0, at_least=0)
    """Its weight decay, without which it remembers the pairs and does not generalise."""

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        if self.p % 2 == 0:
            raise ValueError(f"p must be an odd number, got {self.p}")
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model must be a multiple of heads = {self.heads}, got {self.d_model}"
            )
