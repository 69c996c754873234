"""Activations on disk and in memory: shard format, checks, and the streams that training reads."""

from sae_fast.activations.columns import STARTS, Column
from sae_fast.activations.errors import ShardError
from sae_fast.activations.files import find_shards
from sae_fast.activations.given_source import ActivationSource, LabelledSource
from sae_fast.activations.heldout import HeldOut, open_heldout, read_labels
from sae_fast.activations.manifest import write_manifest
from sae_fast.activations.mixing import (
    ShardMix,
    check_same_origin,
    full_origin,
    mix_shards,
)
from sae_fast.activations.normalization import estimate_normalization
from sae_fast.activations.origin import origin_difference
from sae_fast.activations.shard_set import ShardSet, check_same_width, open_shards
from sae_fast.activations.source import Rows, Source, Transform
from sae_fast.activations.stream import ActivationStream
from sae_fast.activations.targets import TARGETS, TargetFiles, find_targets
from sae_fast.activations.tensor_stream import TensorStream
from sae_fast.activations.writer import ShardMetadata, ShardWriter, write_shard

__all__ = [
    "STARTS",
    "TARGETS",
    "ActivationSource",
    "ActivationStream",
    "Column",
    "HeldOut",
    "LabelledSource",
    "Rows",
    "ShardError",
    "ShardMetadata",
    "ShardMix",
    "ShardSet",
    "ShardWriter",
    "Source",
    "TargetFiles",
    "TensorStream",
    "Transform",
    "check_same_origin",
    "check_same_width",
    "estimate_normalization",
    "find_shards",
    "find_targets",
    "full_origin",
    "mix_shards",
    "open_heldout",
    "open_shards",
    "origin_difference",
    "read_labels",
    "write_manifest",
    "write_shard",
]
