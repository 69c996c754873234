"""The plot is drawn from any rows a run may leave."""

from pathlib import Path

import pytest
from PIL import Image

from sae_fast.training.metrics import Row
from sae_fast.training.plot import plot_run

_FULL = [
    {"step": step, "loss": 90.0 / step, "recon_loss": 80.0 / step, "fvu": 1 / step, "l0": 32.0}
    | {"dead_fraction": 0.0, "learning_rate": 1e-3, "grad_norm": 2.0}
    for step in range(1, 50)
]


@pytest.mark.parametrize("rows", [[], _FULL[:1], _FULL, [{"step": 3, "heldout_fvu": 0.2}]])
def test_plot_is_a_readable_image(tmp_path: Path, rows: list[Row]) -> None:
    path = plot_run(rows, tmp_path / "plots" / "training.png", "a run")
    with Image.open(path) as image:
        assert image.size[0] > 1000
