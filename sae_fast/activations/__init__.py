"""Activations on disk and in memory: shard format, checks, and the streams that training reads."""

from typing import TYPE_CHECKING

from sae_fast.lazy_names import lazy_names

if TYPE_CHECKING:
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

# Imported when first asked for, so that processes that tokenise need no torch.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "sae_fast.activations.columns": ("STARTS", "Column"),
        "sae_fast.activations.errors": ("ShardError",),
        "sae_fast.activations.files": ("find_shards",),
        "sae_fast.activations.given_source": ("ActivationSource", "LabelledSource"),
        "sae_fast.activations.heldout": ("HeldOut", "open_heldout", "read_labels"),
        "sae_fast.activations.manifest": ("write_manifest",),
        "sae_fast.activations.mixing": (
            "ShardMix",
            "check_same_origin",
            "full_origin",
            "mix_shards",
        ),
        "sae_fast.activations.normalization": ("estimate_normalization",),
        "sae_fast.activations.origin": ("origin_difference",),
        "sae_fast.activations.shard_set": ("ShardSet", "check_same_width", "open_shards"),
        "sae_fast.activations.source": ("Rows", "Source", "Transform"),
        "sae_fast.activations.stream": ("ActivationStream",),
        "sae_fast.activations.targets": ("TARGETS", "TargetFiles", "find_targets"),
        "sae_fast.activations.tensor_stream": ("TensorStream",),
        "sae_fast.activations.writer": ("ShardMetadata", "ShardWriter", "write_shard"),
    },
)
