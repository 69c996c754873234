"""The parts of a step are marked for profilers where the environment asks for it."""

from contextlib import contextmanager

import pytest
import torch

from sae_fast.activations import TensorStream
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.architecture import StepSettings
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.batches import StepBatches
from sae_fast.training.launcher import Launcher
from sae_fast.training.optimizer.loss_scaler import LossScaler
from sae_fast.training.optimizer.row_optimizer import make_optimizer
from sae_fast.training.step import TrainingStep


@pytest.mark.parametrize(
    ("asked", "has_gpu", "marks"),
    [
        ("1", True, ["batches", "forward", "backward", "update", "bookkeeping"]),
        ("0", True, []),
        ("1", False, []),
    ],
)
def test_parts_of_a_step_are_marked_where_a_profiler_may_see_it(monkeypatch, asked, has_gpu, marks):
    found = []

    @contextmanager
    def mark(name):
        found.append(name)
        yield

    sae = SparseAutoencoder(SAEConfig(d_in=6, d_sae=10, arch="topk", k=2))
    config = TrainConfig()
    step = TrainingStep(
        sae, make_optimizer(sae, config), LossScaler(enabled=False), config.precision
    )
    monkeypatch.setenv("SAE_FAST_NVTX", asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda.nvtx, "range", mark)
    batches = StepBatches(
        TensorStream(torch.ones(9, 6), batch_size=3), sae.W_enc.device, 1, ahead=False
    )
    launcher = Launcher(step, batches, config, 0, lambda: None, ahead=False)
    launcher.launch(StepSettings(1e-3))
    assert found == [f"sae_fast {mark}" for mark in marks]
