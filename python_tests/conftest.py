"""Puts this folder on the path, so that every test can import the helpers that lie beside it."""

import pytest
import torch

import sae_fast


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Every device that results must agree on; those this machine cannot test are skipped."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device: torch finds none")
        info = sae_fast.build_info()
        if info["backend"] != "reference" and not info["cuda"]:
            pytest.skip(f"needs the CUDA backend: {info['why_no_cuda']}")
    return torch.device(request.param)
