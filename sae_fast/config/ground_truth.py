"""The settings of `python -m sae_fast.ground_truth NAME`, a class for each task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import MOST_THREADS, setting

SEEDS = (42, 123, 456, 789, 1011)
# Settings that do not change the result of one training on the task.
_OF_THE_CALL = ("out", "arch", "seeds", "num_threads")


@configuration()
@dataclass(frozen=True, kw_only=True)
class GroundTruthConfig(ConfigFile):
    """Train autoencoders on a task whose right answer is known, and score them against it."""

    title: ClassVar[str] = "Task"

    out: Path | None = setting(None, metavar="DIR", heading="Results and trainings")
    """Directory for report.html, results.md, results.json, pictures and models. A call with the
    settings of an earlier one keeps what is finished there and makes the rest."""
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
    """Peak of the learning rate; default: as in any training with as many latents and steps."""
    data_seed: int = setting(0, at_least=0)
    """Seed of the data and of the task's own model."""
    num_threads: int | None = setting(None, at_least=1, at_most=MOST_THREADS)
    """CPU threads; default: torch's own choice. [threads]"""

    def __post_init__(self) -> None:
        """Refuse a seed of a training that the data is drawn from, too.

        The first numbers of one seed are the same: a dictionary would start at the answer.
        """
        if self.data_seed in self.seeds:
            raise ValueError(
                "seeds must not have data_seed, from which the data are drawn, "
                f"got {self.data_seed}"
            )

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
        super().__post_init__()
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
    max_steps: int = setting(1000, at_least=1)
    batch_size: int = setting(256, at_least=1)
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
    model_steps: int = setting(1500, at_least=1)
    """Training steps of the transformer, each on all its pairs. [steps]"""
    model_learning_rate: float = setting(1e-3, above=0)
    """Its learning rate, which falls to 0 in the last third."""
    model_weight_decay: float = setting(1.0, at_least=0)
    """Its weight decay, without which it remembers the pairs and does not generalise."""

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        super().__post_init__()
        if self.p % 2 == 0:
            raise ValueError(f"p must be an odd number, got {self.p}")
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model must be a multiple of heads = {self.heads}, got {self.d_model}"
            )


@configuration()
@dataclass(frozen=True, kw_only=True)
class StateMachineConfig(GroundTruthConfig):
    """Find the states of a finite automaton in an LSTM that has learned its strings.

    Autoencoders train on the hidden state after each symbol, and latents are compared with the
    state that the automaton is in.
    """

    d_sae: int = setting(256, at_least=1)
    k: int = setting(4, at_least=1)
    max_steps: int = setting(1000, at_least=1)
    batch_size: int = setting(512, at_least=1)
    automaton: Literal["reber", "embedded_reber"] = setting("embedded_reber", heading="LSTM")
    """reber: Reber's grammar; embedded_reber: two copies of it between a symbol and its repetition,
    so that the first symbol must be remembered up to the end."""
    hidden: int = setting(64, at_least=1)
    """Width of the LSTM's state, the d_in of the rows. [numbers]"""
    model_steps: int = setting(1000, at_least=1)
    """Training steps of the LSTM. [steps]"""
    model_batch: int = setting(64, at_least=1)
    """Strings in a step. [strings]"""
    model_learning_rate: float = setting(5e-3, above=0)
    """Its learning rate, which falls to 0 in the last third."""
    rows: int = setting(100_000, at_least=2)
    """Rows to train on, a row a symbol. [rows]"""
    heldout_rows: int = setting(20_000, at_least=1)
    """Rows to score on, of other strings. [rows]"""


@configuration()
@dataclass(frozen=True, kw_only=True)
class CircuitConfig(GroundTruthConfig):
    """Find the variables of induction in a transformer of two attention layers.

    The transformer predicts sequences in which spans of random tokens are repeated: it looks for an
    earlier occurrence of the present token and expects the token that followed it. Latents of its
    residual stream are compared with the variables of this circuit.
    """

    d_sae: int = setting(512, at_least=1)
    k: int = setting(16, at_least=1)
    max_steps: int = setting(1000, at_least=1)
    batch_size: int = setting(512, at_least=1)
    vocabulary: int = setting(32, at_least=4, heading="Transformer")
    """Tokens of the vocabulary. [tokens]"""
    length: int = setting(48, at_least=16)
    """Tokens of a sequence. [tokens]"""
    layer: int = setting(2, at_least=1, at_most=2)
    """Layer after which the residual stream is taken: 1 or 2."""
    d_model: int = setting(64, at_least=4)
    """Width of the residual stream, the d_in of the rows. [numbers]"""
    heads: int = setting(4, at_least=1)
    """Attention heads of a layer. [heads]"""
    model_steps: int = setting(1500, at_least=1)
    """Training steps of the transformer. [steps]"""
    model_batch: int = setting(64, at_least=1)
    """Sequences in a step. [sequences]"""
    model_learning_rate: float = setting(3e-3, above=0)
    """Its learning rate, which falls to 0 in the last two thirds."""
    rows: int = setting(100_000, at_least=2)
    """Rows to train on, a row a token. [rows]"""
    heldout_rows: int = setting(20_000, at_least=1)
    """Rows to score on, of other sequences. [rows]"""

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        super().__post_init__()
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model must be a multiple of heads = {self.heads}, got {self.d_model}"
            )


@configuration()
@dataclass(frozen=True, kw_only=True)
class BiographiesConfig(GroundTruthConfig):
    """Find relations and answers in a small GPT-2 that knows facts about invented people.

    Autoencoders train on the residual stream at the last token of the prompts. The language model
    needs transformers.
    """

    d_sae: int = setting(512, at_least=1)
    k: int = setting(8, at_least=1)
    max_steps: int = setting(1000, at_least=1)
    batch_size: int = setting(512, at_least=1)
    entities: int = setting(150, heading="Biographies and language model")
    """People; each has one answer to each of six relations. [people]"""
    templates: int = setting(6)
    """Phrasings of each relation. [phrasings]"""
    answers: int = setting(8)
    """Answers that each relation can have. [answers]"""
    heldout_fraction: float = setting(0.2)
    """Share of the people whose prompts are scored on and not trained on. [share]"""
    layer: int | None = setting(None, at_least=0)
    """Block after which the residual stream is taken, from 0; default: the last one."""
    blocks: int = setting(2, at_least=1)
    """Blocks of the language model. [blocks]"""
    d_model: int = setting(128, at_least=1)
    """Width of its residual stream, the d_in of the rows. [numbers]"""
    heads: int = setting(4, at_least=1)
    """Attention heads of a block. [heads]"""
    model_steps: int = setting(1500, at_least=1)
    """Training steps of the language model. [steps]"""
    model_batch: int = setting(64, at_least=1)
    """Prompts in a step. [prompts]"""
    model_learning_rate: float = setting(1e-3, above=0)
    """Peak of its learning rate."""

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        super().__post_init__()
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model must be a multiple of heads = {self.heads}, got {self.d_model}"
            )
        if self.layer is not None and self.layer >= self.blocks:
            raise ValueError(f"layer must be below blocks = {self.blocks}, got {self.layer}")
