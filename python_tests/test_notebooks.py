"""The notebooks of examples/ run from first to last cell, and are kept without outputs."""

import json
import shlex
from pathlib import Path

import pytest
import warm_python

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
if not NOTEBOOKS:
    pytest.skip("no checkout: the notebooks are not installed", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    command = [*shlex.split(warm_python.shell_command()), "-m", "ipykernel_launcher"]
    kernel = {"argv": [*command, "-f", "{connection_file}"], "language": "python"}
    (tmp_path / "kernels" / "warm").mkdir(parents=True)
    described = json.dumps({**kernel, "display_name": "forked from a process with torch"})
    (tmp_path / "kernels" / "warm" / "kernel.json").write_text(described)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(EXAMPLES)}}
    client = nbclient.NotebookClient(notebook, timeout=300, resources=resources, kernel_name="warm")
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_no_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []
