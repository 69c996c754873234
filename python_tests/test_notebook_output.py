"""A notebook shows the bar, the log lines and the panels of a training, with widgets or without."""

import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
HIDE_WIDGETS = """
import sys
sys.modules["ipywidgets"] = None
import importlib.util
assert importlib.util.find_spec
"""
TRAINING = """
import torch
from sae_fast import SAEConfig, TrainConfig, Trainer

rows = torch.randn(640, 8)
config = TrainConfig(lr=1e-2, batch_size=64, max_steps=4, log_every=2, checkpoint_dir="run")
trainer = Trainer(SAEConfig(d_sae=32, k=2), config, data=rows)
_ = trainer.train()
"""


def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *cells: str) -> list[list[Any]]:
    """Run the cells of a notebook; return what each of them shows."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    return [cell.outputs for cell in notebook.cells]


@pytest.mark.slow
def test_a_training_shows_lines_a_bar_of_text_and_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = (HIDE_WIDGETS, TRAINING, "trainer.plot()", "trainer.plot('panels.png') and None")
    _, training, panels, nothing = outputs(tmp_path, monkeypatch, *cells)
    shown = "".join(output.get("text", "") for output in training)
    for part in ("kernels: ", "precision: exact float32", "256/256", "loss "):
        assert part in shown
    assert "step 4: " not in shown  # the bar has these figures
    (image,) = panels
    assert image["data"]["image/png"]
    assert nothing == []
    assert (tmp_path / "panels.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_training_shows_a_bar_of_widgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipywidgets")
    (training,) = outputs(tmp_path, monkeypatch, TRAINING)
    kinds = [mime for output in training for mime in output.get("data", {})]
    assert "application/vnd.jupyter.widget-view+json" in kinds
    assert "precision: exact float32" in "".join(output.get("text", "") for output in training)
