"""`Trainer.plot` draws the panels of a run for a notebook, and into a file."""

from pathlib import Path

import pytest
import torch

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.trainer import Trainer

PNG = b"\x89PNG"


@pytest.mark.slow
def test_the_panels_of_a_run_are_a_picture(activations: torch.Tensor, tmp_path: Path) -> None:
    config = TrainConfig(batch_size=64, max_steps=2, learning_rate=1e-2, log_every=1)
    trainer = Trainer(SAEConfig(d_sae=32, k=2), config, activations, show_progress=False)
    with pytest.raises(ValueError, match="nothing has been logged yet: log_every is 1"):
        trainer.plot()
    trainer.train()
    picture = trainer.plot(tmp_path / "panels.svg")
    assert picture._repr_png_().startswith(PNG)
    assert repr(picture) == "Picture(title='topk: d_in 16, d_sae 32, k 2')"
    assert "<svg" in (tmp_path / "panels.svg").read_text()
