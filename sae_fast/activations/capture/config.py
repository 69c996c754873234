"""The flags of the capture command: what is captured, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sae_fast.activations.capture.documents import DEFAULT_SPLIT


@dataclass(frozen=True)
class CaptureConfig:
    """Run a language model over a dataset and write the activations of its layers as shards."""

    model: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """A folder with a transformers model, or its name on the Hugging Face hub."""
    dataset: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="DATASET")]] = None
    """A dataset on the hub, a folder, or .jsonl, .json, .txt, .csv or .parquet files."""
    out: Path | None = None
    """Directory to write: a folder of shards for each hook point, and capture.json."""
    layers: tuple[int, ...] = ()
    """Blocks after which the residual stream is captured, from 0."""
    hook_points: tuple[str, ...] = ()
    """Others: residual.L, attn_out.L, mlp_out.L, or a module's path; * for every block."""
    layer_stride: int | None = None
    """Capture every n-th block, in place of --layers, and in the patterns of --hook-points."""
    max_tokens: int | None = None
    """Rows to capture for each hook point; default: the whole dataset. [tokens]"""
    heldout_tokens: int = 0
    """Rows of the last documents that go into heldout_00.h5, besides --max-tokens. [tokens]"""
    ctx_len: int | None = None
    """Tokens of a sequence; default: 512, or the model's context if that is shorter. [tokens]"""
    batch_size: int = 32
    """Sequences in a forward pass. [sequences]"""
    pack: bool = True
    """One document after another in a sequence; encoders have one document in each anyway."""
    exclude_special_tokens: bool = False
    """BOS, EOS, [CLS], [SEP] and the like are read by the model, but not stored."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Type in which activations are stored; auto: float16, or bfloat16 where a sample of them comes
    near the ends of float16."""
    shard_tokens: int = 1 << 20
    """Rows of a shard; a capture that is killed goes on behind its last whole shard. [tokens]"""
    compression: Literal["none", "zstd", "blosc2", "gzip"] = "none"
    """Compression of the shards."""
    text_column: str | None = None
    """Column of the dataset with the documents; default: text, or the only one with texts."""
    dataset_config: str | None = None
    """Configuration of a dataset on the hub that has several."""
    split: str = DEFAULT_SPLIT
    """Part of the dataset."""
    text_split: Literal["line", "paragraph", "document"] = "line"
    """What a document is in a .txt file; document: the whole file."""
    shuffle_seed: int | None = 42
    """Seed of the order of the documents; None keeps the dataset's own order."""
    num_proc: int = 1
    """Processes that tokenise; 1: the tokenizer's own threads. [processes]"""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which the model runs; auto: as in its checkpoint."""
    device: str = "cpu"
    """cpu or cuda; torchrun gives each of its processes a GPU of its own."""
    num_threads: int | None = None
    """CPU threads of the model; default: torch's own choice. [threads]"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_tokens", "num_proc"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_tokens", "ctx_len", "layer_stride", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("heldout_tokens", "shuffle_seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        for layer in self.layers:
            if layer < 0:
                raise ValueError(f"layers are counted from 0, got {layer}")
