"""Marks on the parts of a step, which NVIDIA's profilers show."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

NVTX = "SAE_FAST_NVTX"  # an environment variable


def marked(name: str) -> AbstractContextManager[None]:
    """Mark a part of a step as the range `sae_fast NAME`, where SAE_FAST_NVTX=1 asks for it."""
    if os.environ.get(NVTX) != "1" or not torch.cuda.is_available():
        return nullcontext()
    return torch.cuda.nvtx.range(f"sae_fast {name}")
