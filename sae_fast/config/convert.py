"""The settings of `python -m sae_fast.convert` and `python -m sae_fast.verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import setting


@configuration()
@dataclass(frozen=True)
class ConvertConfig(ConfigFile):
    """Turn a dictionary of one library into a dictionary of another."""

    source: str = setting("", positional=True, metavar="SRC")
    """A run, a checkpoint or a saved model of sae_fast, a directory or file of another library, or
    owner/name[/subfolder][@revision] on the Hugging Face hub. Its format is recognised by its
    files."""
    destination: Path | None = setting(None, positional=True, metavar="DST")
    """Directory to write, which must not be there or be empty. With --to circuit_tracer the file of
    one more layer is added to it."""
    to: Literal["sae_fast", "saelens", "sparsify", "dictionary_learning", "circuit_tracer"] = (
        setting("sae_fast")
    )
    """Format to write."""
    subfolder: str | None = setting(None, nonempty=True)
    """Folder or file below SRC, where that holds several dictionaries, as in SRC/subfolder."""
    revision: str | None = setting(None, nonempty=True)
    """Branch, tag or commit of a repository on the hub, as in SRC@revision; default: the newest."""


@configuration()
@dataclass(frozen=True)
class VerifyConfig(ConfigFile):
    """Check that a converted dictionary still gives the codes that it gave when it was written."""

    directories: tuple[Path, ...] = setting((), positional=True, metavar="DIR")
    """Directories that `convert` or `SparseAutoencoder.export` has written, also on the hub as
    owner/name[/subfolder][@revision]."""
