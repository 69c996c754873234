"""Imports inside sae_fast have no circles, and each layer imports only from lower layers."""

import importlib
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
if not (TOOLS / "acceptance.py").exists():
    pytest.skip("no checkout: the tools are not installed", allow_module_level=True)
sys.path.insert(0, str(TOOLS))
acceptance = importlib.import_module("acceptance")
sys.path.remove(str(TOOLS))

# From the lowest layer up. A module imports from its own layer and from the layers before it.
LAYERS = (
    (
        *("import_errors", "json_files", "lazy_names", "markdown", "tensor_files", "text_links"),
        *(
            "atomic_files",
            "directory_lock",
            "memory",
            "own_code",
            "output_streams",
            "progress_bar",
            "log_output",
            "command_errors",
            "machine",
        ),
    ),
    ("config",),
    ("ops",),
    ("distributed",),
    ("activations",),
    ("interop",),
    ("autoencoder",),
    ("evaluation",),
    ("report",),
    ("training",),
    ("command_frame",),
    ("ground_truth",),
    (
        *("train", "capture", "convert_shards", "compare", "evaluate", "latents", "plot", "info"),
        *("presets", "biographies", "swap", "convert", "verify", "dictionary_evaluation"),
    ),
    ("__main__", "completion"),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def test_no_circle_of_imports():
    assert acceptance.circles().places == []


def test_imports_point_from_a_layer_to_those_below():
    upward = [
        f"{name} -> {other}"
        for name, others in acceptance.import_graph().items()
        for other in others
        if LAYER[other.split(".")[1]] > LAYER[name.split(".")[1]]
    ]
    assert upward == []


def test_every_module_is_in_a_layer():
    files = map(acceptance.module_name, acceptance.PACKAGE.rglob("*.py"))
    names = {name.split(".")[1] for name in files if "." in name}
    assert names - {"_reference_install"} == LAYER.keys()
