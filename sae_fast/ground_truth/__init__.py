"""Tasks whose right answers are known: data is made, a model trained on it, and both compared."""

from sae_fast.ground_truth.command import command_lines, main

__all__ = ["command_lines", "main"]
