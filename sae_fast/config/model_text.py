"""The text that a language model reads, and the activations that are taken from it.

`CaptureConfig` is the configuration of `python -m sae_fast.capture`, `FromModelConfig` the
configuration of a training straight from a model. Part of sae_fast.config.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from sae_fast.config.effects import check_effects
from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import MOST_THREADS, Effect, same_as, setting

DEFAULT_CONTEXT = 512  # tokens of a sequence, unless the context of the model is shorter
DEFAULT_SPLIT = "train"
# Defaults of a training straight from a model that a training on shards does not have; they are the
# defaults of other trainers of this kind.
SAE_DEFAULTS: dict[str, Any] = {"expansion_factor": 32}
TRAIN_DEFAULTS: dict[str, Any] = {"dead_percentage_threshold": 0.0005}
DEFAULT_K = 192  # of the architectures that have a k
RATE_OF_OTHERS = 1e-3  # of the architectures to which training/fitted_rates.py does not apply


@configuration(batch_sequences="batch_size")
@dataclass(frozen=True)
class CaptureConfig(ConfigFile):
    """Run a language model over a dataset and write the activations of its layers as shards."""

    title: ClassVar[str] = "Capture"

    model: str | None = setting(
        None,
        nonempty=True,
        positional=True,
        metavar="MODEL",
        heading="Model, text and hook points",
        brief="a folder with a transformers model, or its name on the hub",
    )
    """A folder with a transformers model, or its name on the Hugging Face hub."""
    dataset: str | None = setting(
        None,
        nonempty=True,
        positional=True,
        metavar="DATASET",
        brief="a dataset on the hub, a folder, or files",
    )
    """A dataset on the hub, a folder, or .jsonl, .json, .txt, .csv, .parquet or image files."""
    out: Path | None = setting(None, metavar="DIR", brief="directory to write")
    """Directory to write: a folder of shards for each hook point, and capture.json."""
    copy_to: str | None = setting(None, nonempty=True, metavar="ADDRESS")
    """Copy the finished capture to an address of fsspec, such as s3://bucket/folder."""
    layers: tuple[int, ...] = setting((), brief="blocks whose output is captured, from 0")
    """Blocks after which the residual stream is captured, from 0."""
    hook_points: tuple[str, ...] = setting(
        (), metavar="NAME", brief="others: residual.L, attn_out.L, mlp_out.L, or a module"
    )
    """Other hook points: residual.L, resid_pre.L, attn_out.L, mlp_in.L, mlp_out.L, z.L (heads), a
    module's path, or a path with :in for the module's input; * for every block."""
    layer_stride: int | None = setting(None, at_least=1)
    """Capture every n-th block, in place of --layers, and in the patterns of --hook-points."""
    max_tokens: int | None = setting(
        None,
        at_least=1,
        recipe="shards",
        heading="Sequences",
        brief="rows to capture; default: the whole dataset",
    )
    """Rows to capture for each hook point; default: the whole dataset. [tokens]"""
    heldout_tokens: int = setting(
        0, at_least=0, recipe="rows", brief="rows of the last documents, held out"
    )
    """Rows of the last documents that go into heldout_00.h5, besides --max-tokens. [tokens]"""
    ctx_len: int | None = setting(
        None, at_least=1, recipe="rows", brief="tokens of a sequence; default: 512"
    )
    """Tokens of a sequence; default: 512, or the model's context if that is shorter. [tokens]"""
    batch_size: int = setting(
        32,
        at_least=1,
        spelt="batch_sequences",
        recipe="rows",
        brief="sequences in a forward pass",
    )
    """Sequences in a forward pass, also --batch-size. [sequences]"""
    pack: bool = setting(True, recipe="rows")
    """Put one document after another in a sequence; encoders have one document in each anyway."""
    exclude_special_tokens: bool | None = setting(
        None, recipe="rows", brief="leave out BOS, EOS, [CLS], [SEP] rows"
    )
    """Leave out BOS, EOS, [CLS], [SEP] and the like: the model reads them, they are not stored.
    Default: they are stored, but not those that a protein model (ESM) puts round a sequence."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = setting(
        "auto", recipe="shards", heading="Shards", brief="type that is stored"
    )
    """Type in which activations are stored; auto: float16, or bfloat16 where a sample of them comes
    near the ends of float16."""
    shard_tokens: int = setting(1 << 20, at_least=1, recipe="shards")
    """Rows of a shard; a capture that was killed continues after its last whole shard. [tokens]"""
    compression: Literal["none", "zstd", "blosc2", "gzip"] = setting(
        "none", recipe="shards", brief="compression of the shards"
    )
    """Compression of the shards."""
    text_column: str | None = setting(None, heading="Reading the dataset and the model")
    """Column of the dataset with the documents; default: text, or the only one with texts."""
    tokens_column: str | None = setting(None, nonempty=True)
    """Column of the dataset with documents that are tokens already, in place of texts, such as
    input_ids; they must be of the model's own tokenizer."""
    target_column: str | None = setting(None, nonempty=True)
    """Column of the dataset with the texts that a decoder reads (T5) while its encoder reads the
    ones of --text-column, for hook points such as decoder.residual.L."""
    image_column: str | None = setting(None, nonempty=True)
    """Column of the dataset with images, whose patches become rows (CLIP, SigLIP, DINOv2); default:
    the only one, where no column holds texts."""
    chat_template: str | None = setting(None, nonempty=True, bare="tokenizer", metavar="FILE")
    """Read conversations, lists of messages, with the template that the tokenizer has (the bare
    flag) or a Jinja file; --text-column names their column, default: messages or conversations."""
    roles: tuple[str, ...] = setting(
        (),
        metavar="ROLE",
        needs=Effect("chat_template", lambda text: text.chat_template is not None),
    )
    """Make rows only of the content of messages of these roles, such as assistant; where a template
    has {% generation %}, that part is the assistant's. Default: all tokens become rows."""
    dataset_config: str | None = setting(None)
    """Configuration of a dataset on the hub that has several."""
    split: str = setting(DEFAULT_SPLIT, brief="part of the dataset")
    """Part of the dataset."""
    streaming: Literal["auto", "always", "never"] = setting("auto")
    """Read a dataset from its beginning, no further than --max-tokens needs, and shuffle it in
    blocks of 1000 documents; the held-out ones are the first. auto: datasets on the hub, unless
    they are in the cache, and files of more than 64 MiB, where --max-tokens is given."""
    text_split: Literal["line", "paragraph", "document"] = setting("line")
    """What a document is in a .txt file; document: the whole file."""
    shuffle_seed: int | None = setting(42, at_least=0, recipe="rows")
    """Seed of the order of the documents; None keeps the dataset's own order."""
    num_proc: int = setting(1, at_least=1)
    """Processes that tokenise; 1: the tokenizer's own threads. [processes]"""
    revision: str | None = setting(None)
    """Branch, tag or commit of a model on the hub."""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", recipe="rows")
    """Type in which the model runs; auto: as in its checkpoint."""
    trust_remote_code: bool = setting(False)
    """Run the code that comes with a model in its folder or on the hub. It can do anything that you
    can: read it before."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = setting(None)
    """Divide the model over the GPUs with accelerate, and where they are too small, over the memory
    of the host; in place of --device."""
    quantization: Literal["none", "8bit", "4bit"] = setting("none")
    """Bits of the model's matrices, by bitsandbytes."""
    device: str = setting("cpu", brief="cpu or cuda")
    """cpu or cuda; torchrun gives each of its processes a GPU of its own."""
    num_threads: int | None = setting(None, at_least=1, at_most=MOST_THREADS)
    """CPU threads of the model; default: torch's own choice. [threads]"""

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        if self.streaming == "always" and self.max_tokens is None:
            raise ValueError("streaming = 'always' needs max_tokens, the rows to read")
        for layer in self.layers:
            if layer < 0:
                raise ValueError(f"layers are counted from 0, got {layer}")
        _check_columns(self)
        check_effects(self)


@configuration(
    checkpoint_every="save_every",
    wandb_log_every="wandb_log_frequency",
    batch_sequences="batch_size",
)
@dataclass(frozen=True)
class FromModelConfig(ConfigFile):
    """Train on the activations of a model while it reads a dataset: MODEL DATASET, then flags.

    The flags of a training on shards that mean something here are among them.
    """

    title: ClassVar[str] = "Model and text"

    layers: tuple[int, ...] = setting(
        (), heading="Text and hook points", brief="blocks whose output is taken; default: 0"
    )
    """Blocks after which the residual stream is taken, from 0; default: 0."""
    hook_points: tuple[str, ...] = setting(
        (), metavar="NAME", brief="others: residual.L, attn_out.L, mlp_out.L, or a module"
    )
    """Other hook points: residual.L, resid_pre.L, attn_out.L, mlp_in.L, mlp_out.L, z.L (heads), a
    module's path, or a path with :in for the module's input; * for every block."""
    layer_stride: int | None = setting(None)
    """Take every n-th block, in place of layers, and in the patterns of hook_points."""
    max_tokens: int = setting(1_000_000, at_least=1, brief="tokens to train on")
    """Tokens to train on; on shards one pass over the data is the default. [tokens]"""
    batch_size: int = setting(
        4,
        at_least=1,
        spelt="batch_sequences",
        brief="sequences in a forward pass",
        instead={
            "batch_tokens": "a batch has --batch-sequences sequences of --ctx-len tokens here"
        },
    )
    """Sequences in a forward pass, also --batch_size; a batch has this times ctx_len tokens, on
    shards it has batch_tokens, by default at most 4096. [sequences]"""
    ctx_len: int | None = setting(None, brief="tokens of a sequence; default: 512")
    """Tokens of a sequence; default: 512, or the model's context if that is shorter. [tokens]"""
    heldout_tokens: int = setting(16_384, brief="tokens kept for evaluation")
    """Tokens of the last documents, which are kept for evaluation; 0: none. [tokens]"""
    cache_dir: Path | None = setting(None, metavar="DIR")
    """Keep the activations as shards here, as the capture command writes them."""
    shard_tokens: int = setting(
        1 << 20,
        needs=Effect(
            "cache_dir, where the shards are kept", lambda text: text.cache_dir is not None
        ),
    )
    """Rows of a shard in cache_dir. [tokens]"""
    save_dir: Path = setting(Path("output"), metavar="DIR", command_only=True)
    """Where runs are written, each in a directory of its name."""
    run_name: str | None = setting(
        None,
        metavar="NAME",
        brief="name of the run's directory; default: a new one",
        command_only=True,
    )
    """Name of the run's directory; default: a new one, such as topk-k192-1."""
    save_every: int = setting(1000, at_least=0, command_only=True)
    """Interval of the checkpoints, on shards 500 by default; 0: only at the end. [steps]"""
    log_to_wandb: bool = setting(False, command_only=True)
    """Log to Weights & Biases, to wandb_project or, without one, to sae_fast; also --logger
    wandb."""
    wandb_log_frequency: int = setting(100, at_least=1, command_only=True)
    """Interval of the rows that go to Weights & Biases and TensorBoard; on shards log_every is the
    default. [steps]"""
    init_seeds: tuple[int, ...] = setting((42,), brief="an autoencoder is trained for each")
    """Seeds of the initialisation; an autoencoder is trained for each of them. On shards the
    default is seed 0."""
    shuffle_seed: int = setting(42)
    """Seed of the order of documents and rows; on shards seed is the default."""
    text_column: str | None = same_as(CaptureConfig, "text_column")
    tokens_column: str | None = same_as(CaptureConfig, "tokens_column")
    target_column: str | None = same_as(CaptureConfig, "target_column")
    image_column: str | None = same_as(CaptureConfig, "image_column")
    chat_template: str | None = same_as(CaptureConfig, "chat_template")
    roles: tuple[str, ...] = same_as(CaptureConfig, "roles")
    dataset_config: str | None = same_as(CaptureConfig, "dataset_config")
    split: str = same_as(CaptureConfig, "split", brief="")
    streaming: Literal["auto", "always", "never"] = same_as(CaptureConfig, "streaming")
    text_split: Literal["line", "paragraph", "document"] = same_as(CaptureConfig, "text_split")
    pack: bool = same_as(CaptureConfig, "pack")
    exclude_special_tokens: bool | None = setting(None)
    """Leave out BOS, EOS, [CLS], [SEP] and the like: the model reads them, no row is made. Default:
    rows are made of them, but not of those that a protein model (ESM) puts round a sequence."""
    data_preprocessing_num_proc: int = setting(1)
    """Processes that tokenise; 1: the tokenizer's own threads. [processes]"""
    revision: str | None = same_as(CaptureConfig, "revision", command_only=True)
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = same_as(
        CaptureConfig, "model_dtype", command_only=True
    )
    quantization: Literal["none", "8bit", "4bit"] = same_as(
        CaptureConfig, "quantization", command_only=True
    )
    trust_remote_code: bool = same_as(CaptureConfig, "trust_remote_code", command_only=True)

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        if not self.init_seeds or len(set(self.init_seeds)) < len(self.init_seeds):
            given = " ".join(map(str, self.init_seeds)) or "none"
            raise ValueError(f"init_seeds must be different numbers, got {given}")
        _check_columns(self)
        check_effects(self)

    def capture_config(self, model: str, dataset: str, device: str) -> CaptureConfig:
        """Return what is asked of the model, whose name or folder and dataset are given."""
        names = self.defaults().keys() & CaptureConfig.defaults().keys()
        shared = {name: getattr(self, name) for name in names}
        if not (self.layers or self.hook_points or self.layer_stride):
            shared["layers"] = (0,)
        return CaptureConfig(
            model=model,
            dataset=dataset,
            device=device,
            num_proc=self.data_preprocessing_num_proc,
            **shared,
        )


def _check_columns(config: CaptureConfig | FromModelConfig) -> None:
    """Raise ValueError where documents are to be of two kinds."""
    exclusive = (
        ("text_column", "tokens_column"),
        ("chat_template", "tokens_column"),
        ("target_column", "tokens_column"),
        ("target_column", "chat_template"),
        ("image_column", "text_column"),
        ("image_column", "tokens_column"),
        ("image_column", "target_column"),
        ("image_column", "chat_template"),
    )
    for pair in exclusive:
        one, other = (getattr(config, name) for name in pair)
        if one is not None and other is not None:
            raise ValueError(f"{pair[0]} = {one!r} and {pair[1]} = {other!r}: give one of the two")
