"""`EvaluateConfig`: what `python -m sae_fast.evaluate` measures. Part of sae_fast.config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from sae_fast.config.effects import check_effects
from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.model_text import CaptureConfig
from sae_fast.config.setting import MOST_THREADS, Effect, same_as, setting

_MODEL = Effect("a dataset that the model reads, --dataset", lambda own: own.dataset is not None)
_SHARDS = Effect("shards, --shard-dir", lambda own: own.shard_dir is not None)


@configuration(batch_size="batch_tokens")
@dataclass(frozen=True)
class EvaluateConfig(ConfigFile):
    """Measure dictionaries on shards of activations, and inside the language model.

    Each SAE is a run, a checkpoint, a saved model, a dictionary of another library, or a name on
    the Hugging Face hub. With --shard-dir rows are
    read from shards; with --dataset the model reads a text, and its losses with reconstructions in
    place of its activations are measured too.
    """

    title: ClassVar[str] = "Evaluation"

    saes: tuple[Path, ...] = setting((), positional=True, metavar="SAE")
    """Directories of runs, of checkpoints or of saved models, dictionaries of other libraries, and
    owner/name[/subfolder][@revision] on the Hugging Face hub."""
    out: Path | None = setting(
        None,
        metavar="DIR",
        heading="What is written",
        brief="directory to write: report.html, metrics.md, metrics.json, tables of latents",
    )
    """Directory to write: report.html, metrics.md, metrics.json, saebench_core.json and tables of
    latents; with several dictionaries in a folder for each, and their metrics beside each other in
    report.html and metrics.md."""
    shard_dir: Path | None = setting(
        None, metavar="DIR", heading="Rows", brief="shards to measure on, the held-out ones of them"
    )
    """Directory of shards; its held-out shards are measured on, or all rows where it has none."""
    heldout: str | None = setting(None, nonempty=True, needs=_SHARDS)
    """Other held-out shards: a directory or a glob pattern."""
    rows: Literal["heldout", "all"] = setting("heldout", needs=_SHARDS)
    """all: measure on the rows of every shard, the ones that were trained on among them."""
    heldout_fraction: float = setting(
        0.0, at_least=0, below=1, must="a share, from 0 to below 1", needs=_SHARDS
    )
    """Measure on the last rows of the shards: the rows that a training with this value held out."""
    max_rows: int | None = setting(None, at_least=1, needs=_SHARDS, brief="rows to measure on")
    """Measure on the first rows only; default: on all. [tokens]"""
    batch_tokens: int = setting(4096, at_least=2)
    """Rows of a batch, also --batch-size; few metrics depend on it, as their texts say. [tokens]"""
    activations_key: str = setting("activations", nonempty=True, needs=_SHARDS)
    """Name of the data set inside a shard."""
    skip_nonfinite: bool = setting(False, needs=_SHARDS)
    """Leave out rows that hold NaN or Inf, which are refused otherwise."""
    repeated_rows: Literal["keep", "drop"] = setting("keep", needs=_SHARDS)
    """Rows that are zero or equal to the row before them, as rows never written and padding are.
    keep: they are measured on; drop: they are left out."""
    target_shard_dir: Path | None = setting(None, metavar="DIR", needs=_SHARDS)
    """Directory with the targets of a transcoder, in files named as the shards are."""
    target_key: str | None = setting(None, nonempty=True, needs=_SHARDS)
    """Name of the data set with a transcoder's targets."""
    dead_percentage_threshold: float = setting(
        0.0, at_least=0, below=1, must="a share, from 0 to below 1"
    )
    """Share of the rows below which a latent counts as dead in dead_fraction."""
    top_rows: int = setting(
        32,
        at_least=0,
        needs=_SHARDS,
        heading="Tokens and labels",
        brief="strongest rows of a latent whose tokens and labels are compared",
    )
    """Strongest rows of each latent whose tokens and labels are compared; 0: none. [tokens]"""
    labels: str | None = setting(
        None,
        nonempty=True,
        needs=_SHARDS,
        brief="data set in the shards with a label of each row, a whole number (-1: none)",
    )
    """Name of the data set in the shards with a label of each row, a whole number, -1: none. The
    strongest rows of a latent are compared by it, and probes on a few latents are trained for
    it."""
    probe_rows: int = setting(
        20_000,
        at_least=0,
        needs=Effect("labels to probe for, --labels", lambda own: own.labels is not None),
    )
    """Rows with a label that probes are trained and tested on, taken evenly; 0: no probes.
    [tokens]"""
    tokenizer: str | None = setting(None, nonempty=True, metavar="NAME", needs=_SHARDS)
    """A tokenizer, for the text of tokens: a folder, a tokenizer.json or a name on the hub;
    default: the one that the shards name, where it has been downloaded."""
    model: str | None = setting(
        None,
        nonempty=True,
        needs=_MODEL,
        heading="Inside the model",
        brief="a folder or a name on the hub",
    )
    """A folder with a transformers model, or its name on the hub; default: the model that the
    dictionary names as its origin."""
    dataset: str | None = setting(None, nonempty=True, brief="text that the model reads")
    """A dataset on the hub, a folder, or .jsonl, .json, .txt, .csv or .parquet files."""
    hook: str | None = setting(None, nonempty=True, needs=_MODEL)
    """Hook point of the dictionary, such as residual.3; default: the one of its origin."""
    target_hook: str | None = setting(None, nonempty=True, needs=_MODEL)
    """Hook point that a transcoder writes; default: the one of its origin."""
    max_tokens: int = setting(100_000, at_least=1, needs=_MODEL, brief="tokens to read")
    """Tokens of the text, about: whole batches are read. [tokens]"""
    ctx_len: int | None = same_as(CaptureConfig, "ctx_len", needs=_MODEL, brief="")
    batch_sequences: int = setting(8, at_least=1, needs=_MODEL)
    """Sequences in a forward pass. [sequences]"""
    pack: bool = same_as(CaptureConfig, "pack", needs=_MODEL)
    exclude_special_tokens: bool | None = setting(None, needs=_MODEL)
    """Leave the activations of BOS, EOS, [CLS], [SEP] and the like as they are; default: of protein
    models (ESM) only, as in a capture."""
    text_column: str | None = same_as(CaptureConfig, "text_column", needs=_MODEL, heading="")
    tokens_column: str | None = setting(None, nonempty=True, needs=_MODEL)
    """Column of the dataset with documents that are tokens already."""
    dataset_config: str | None = same_as(CaptureConfig, "dataset_config", needs=_MODEL)
    split: str = same_as(CaptureConfig, "split", needs=_MODEL, brief="")
    text_split: Literal["line", "paragraph", "document"] = same_as(
        CaptureConfig, "text_split", needs=_MODEL
    )
    shuffle_seed: int | None = setting(42, at_least=0, needs=_MODEL)
    """Seed of the order of the documents, and of the tokens that a masked model predicts; None
    keeps the dataset's own order."""
    revision: str | None = same_as(CaptureConfig, "revision", needs=_MODEL)
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = same_as(
        CaptureConfig, "model_dtype", needs=_MODEL
    )
    trust_remote_code: bool = same_as(CaptureConfig, "trust_remote_code", needs=_MODEL)
    ablate_top: int = setting(10, at_least=0, needs=_MODEL, brief="latents to ablate one at a time")
    """Latents to ablate in the model one at a time, the first ones by --ablate-by; 0: none."""
    ablate_by: Literal["mass", "frequency", "attribution"] = setting("mass", needs=_MODEL)
    """Order in which latents are ablated. mass: the norm of what a latent adds to the activations,
    averaged over tokens; frequency: how often it is active; attribution: the size of the
    first-order estimate of its impact."""
    ablate_latents: tuple[int, ...] = setting((), at_least=0, needs=_MODEL, metavar="LATENT")
    """Further latents to ablate, by number."""
    force: bool = setting(
        False,
        heading="More",
        brief="measure on rows of another model, hook point or layer than the dictionary's",
    )
    """Measure although the dictionary says that it is of another model, hook point or layer than
    the rows, or although the tokenizer reads tokens otherwise than the one that the shards name."""
    device: str = setting("cpu", brief="cpu or cuda")
    """cpu or cuda."""
    num_threads: int | None = setting(None, at_least=1, at_most=MOST_THREADS)
    """CPU threads; default: torch's own choice. [threads]"""

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        if self.heldout is not None and self.heldout_fraction:
            raise ValueError(
                f"heldout = {self.heldout!r}, and heldout_fraction = {self.heldout_fraction:g}: "
                "give one of the two"
            )
        if self.rows == "all" and (self.heldout is not None or self.heldout_fraction):
            raise ValueError("rows = 'all' needs neither heldout nor heldout_fraction")
        check_effects(self)

    def capture_config(self, model: str, hooks: tuple[str, ...]) -> CaptureConfig:
        """Return what is asked of the model, which reads `dataset`."""
        names = self.defaults().keys() & CaptureConfig.defaults().keys() - {"model", "out"}
        shared = {name: getattr(self, name) for name in names}
        return CaptureConfig(
            model=model, hook_points=hooks, batch_size=self.batch_sequences, **shared
        )
