"""sae_fast: sparse autoencoders on transformer activations, trained fast and exactly."""

from sae_fast.ops.native import build_info

__version__ = "0.1.0"

__all__ = ["__version__", "build_info"]
