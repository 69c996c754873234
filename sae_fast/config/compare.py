"""The settings of `python -m sae_fast.compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import MOST_THREADS, setting


@configuration()
@dataclass(frozen=True)
class CompareConfig(ConfigFile):
    """Match the latents of trained dictionaries one to one and tell how many they share."""

    saes: tuple[Path, ...] = setting((), positional=True, metavar="SAE")
    """Two or more of: a run (its latest checkpoint), a checkpoint, a saved model, a dictionary of
    another library, owner/name[/subfolder][@revision] on the Hugging Face hub, or a .safetensors
    file with W_dec [latents, width] in the units of the activations."""
    out: Path | None = setting(None, metavar="DIR")
    """Directory for report.html, compare.json, compare.md, latents.csv, latents.json and
    compare.png; default: only a table is printed."""
    thresholds: tuple[float, ...] = setting((0.7, 0.9), at_least=-1, at_most=1)
    """Two matched latents count as shared if their cosine is at least this."""
    absolute: bool = setting(False)
    """Compare |cosine|, for codes with a sign: a direction and its negative count as equal."""
    exact_below: int = setting(16_384, at_least=1)
    """With fewer latents in both dictionaries all their cosines are made and the matching is exact;
    from there on it is made of the nearest neighbours. [latents]"""
    neighbours: int = setting(32, at_least=1)
    """Candidates of each latent where not all cosines are made. [latents]"""
    num_threads: int | None = setting(None, at_least=1, at_most=MOST_THREADS)
    """CPU threads; default: torch's own choice. [threads]"""
