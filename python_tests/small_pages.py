"""A small model, shards of its origin, and a tokenizer with tokens that look like markup."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from sae_fast import SparseAutoencoder
from sae_fast.activations import ShardMetadata, write_shard
from sae_fast.config import SAEConfig

D_IN, D_SAE, ROWS = 16, 70, 260  # two files of pages
HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;b&gt;", "\n"]
VOCABULARY = ["[UNK]", "a", *HOSTILE, *(f"word{n}" for n in range(30)), "`${1}'\"\\"]
FLAGS = ("--context-tokens", "8", "--contexts", "4", "--samples", "2", "--quiet")


def make_place(directory):
    """Make the model, the shards and the tokenizer in a directory."""
    generator = torch.Generator().manual_seed(0)
    shards = directory / "shards"
    shards.mkdir()
    for number, name in enumerate(("train_00", "heldout_00")):
        tokens = torch.randint(1, len(VOCABULARY), (ROWS,), generator=generator)
        rows = torch.randn(ROWS, D_IN, generator=generator) + tokens[:, None] % 5
        columns = {
            "token_ids": tokens,
            "doc_id": torch.arange(ROWS) // 50 + 100 * number,
            "position": torch.arange(ROWS) % 50,
        }
        metadata = ShardMetadata(model="some/model", hook="residual.3", layer=3)
        write_shard(shards / f"{name}.h5", rows, metadata=metadata, **columns)
    sae = SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=D_SAE, k=4))
    sae.initialize_(generator)
    sae.origin = {"model": "some/model", "hook": "residual.3", "layer": "3"}
    sae.save(directory / "<b>sae")
    ids = {text: number for number, text in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def command(place, out, *flags):
    """Return the arguments of the command that makes the pages of the shards."""
    given = ("--shard-dir", place / "shards", "--out", out, "--tokenizer", place / "tokenizer.json")
    return [str(word) for word in (place / "<b>sae", *given, *FLAGS, *flags)]
