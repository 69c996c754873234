"""`OutputConfig`: what a command shows while it works. Part of sae_fast.config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sae_fast.config.fields import ConfigFile, configuration
from sae_fast.config.setting import setting


@configuration()
@dataclass(frozen=True, kw_only=True)
class OutputConfig(ConfigFile):
    """Settings of the output of a command, which change nothing that it does."""

    title: ClassVar[str] = "Output"

    quiet: bool = setting(False, heading="Output")
    """Show nothing but warnings and errors."""
    log_file: Path | None = setting(None, metavar="FILE")
    """Append what is shown to a file, each line with its time; also what quiet leaves out."""
