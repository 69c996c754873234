"""`LatentsConfig`: the configuration of `python -m sae_fast.latents`. Part of sae_fast.config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import MOST_THREADS, setting


@configuration()
@dataclass(frozen=True)
class LatentsConfig(ConfigFile):
    """Write a page on every latent of an autoencoder, out of one pass over activations."""

    title: ClassVar[str] = "Latents"

    sae: Path | None = setting(
        None,
        positional=True,
        metavar="SAE",
        heading="Model and rows",
        brief="a run, a saved model, another library's, or owner/name",
    )
    """A saved model, a checkpoint, the directory of a run, a dictionary of another library, or
    owner/name[/subfolder][@revision] on the Hugging Face hub."""
    shard_dir: Path | None = setting(None, metavar="DIR", brief="shards with token_ids")
    """Directory of the shards; pages show text where these have token_ids, doc_id and position."""
    out: Path | None = setting(None, metavar="DIR", brief="directory to write")
    """Directory to write; open the index.html in it."""
    rows: Literal["train", "heldout", "all"] = setting("train", brief="shards that are read")
    """Which of the shards are read: all but the held-out ones, the held-out ones, or all."""
    max_tokens: int | None = setting(None, at_least=1, brief="rows to read; default: all")
    """Rows to read, the first ones; default: all. [tokens]"""
    model: str | None = setting(
        None, nonempty=True, metavar="MODEL", brief="for logits: a folder or a name"
    )
    """A transformers model, a folder or a name on the hub: pages then list the tokens whose logits
    a latent raises and lowers. Its tokenizer is used unless another one is given."""
    tokenizer: str | None = setting(
        None, nonempty=True, metavar="NAME", brief="a folder, tokenizer.json or a name"
    )
    """A tokenizer, for the text of tokens; default: of the model, or of the model that the shards
    name, if it is on this machine. Without one the numbers of tokens are shown."""
    contexts: int = setting(
        20, at_least=1, at_most=1000, heading="Pages", brief="largest contexts of each latent"
    )
    """The largest contexts of each latent."""
    context_tokens: int = setting(32, at_least=1, at_most=4096)
    """Tokens of a context, three quarters of them before its peak. [tokens]"""
    intervals: int = setting(5, at_least=1, at_most=100)
    """Intervals of activations, of equal width, from each of which rows are drawn."""
    samples: int = setting(5, at_least=0, at_most=1000)
    """Rows that are drawn at random from each interval."""
    bins: int = setting(40, at_least=1, at_most=1000)
    """Bins of the histograms of activations and of logits."""
    neighbours: int = setting(10, at_least=1, at_most=1000)
    """Latents that are listed as neighbours, by decoder rows and by firing."""
    cofiring_rows: int = setting(1 << 16, at_least=1)
    """Rows on which latents that fire together are counted, fewer where L0 is large. [tokens]"""
    logits: int = setting(10, at_least=1, at_most=1000)
    """Tokens that are listed as raised, and as lowered."""
    seed: int = setting(0, at_least=0, at_most=2**31 - 1)
    """Seed of the rows that are drawn."""
    write: tuple[Literal["saedashboard", "neuronpedia", "delphi"], ...] = setting(
        (), heading="Files for other programs", brief="write the pages for other programs too"
    )
    """Write the pages also as SAEDashboard's batch-N.json, as Neuronpedia's import, or the codes as
    delphi's cache, into a folder of this name in OUT."""
    set_name: str | None = setting(None, metavar="NAME", brief="of the dictionaries of all layers")
    """Name of the set of dictionaries, one a layer, in these files; default: the name of SAE."""
    release: str | None = setting(None, metavar="NAME")
    """Name of the release that the set belongs to; default: the name of the set."""
    creator: str = setting("", metavar="NAME", brief="who publishes the dictionary")
    """Name of the person or group that publishes the dictionary."""
    sequence_tokens: int = setting(256, at_least=1, at_most=65536)
    """Tokens of a sequence in delphi's cache, a multiple of its example length. [tokens]"""
    batch_size: int = setting(8192, at_least=1, heading="The pass")
    """Rows that are encoded together; it changes no page. [tokens]"""
    force: bool = setting(False)
    """Make pages although the autoencoder says that it is of another model, hook point or layer
    than the shards or the model, or the tokenizer reads tokens otherwise than the one of the
    shards."""
    keep_codes: bool = setting(False)
    """Keep the codes of all rows in OUT/codes after the pass."""
    activations_key: str = setting("activations", nonempty=True)
    """Dataset of the activations in the shards."""
    skip_nonfinite: bool = setting(False)
    """Leave out rows that hold NaN or Inf instead of refusing the shards."""
    repeated_rows: Literal["refuse", "drop", "keep"] = setting("refuse")
    """Rows that are zero or equal to the row before them, as rows never written and padding are.
    refuse: more than 1 % of a shard are an error; drop: all are left out; keep: they are read."""
    trust_remote_code: bool = setting(False)
    """Run the code that comes with a model in its folder or on the hub. It can do anything that you
    can: read it before."""
    device: str = setting("cpu", brief="cpu or cuda")
    """cpu or cuda."""
    num_threads: int | None = setting(None, at_least=1, at_most=MOST_THREADS)
    """CPU threads; default: torch's own choice. [threads]"""
