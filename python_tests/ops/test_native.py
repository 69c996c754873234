"""Loading the compiled module: found, chosen against, or missing with one clear line."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import sae_fast
from sae_fast.ops import native

PACKAGE = Path(sae_fast.__file__).parent
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


@pytest.fixture
def installation(tmp_path):
    """A copy of the package without a compiled module and without a marker."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_reference_install.py")
    shutil.copytree(PACKAGE, tmp_path / "sae_fast", ignore=ignore)
    return tmp_path / "sae_fast"


def import_from(installation, native_choice=None, code="print(sae_fast.build_info())"):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SAE_FAST_")}
    if native_choice is not None:
        environment["SAE_FAST_NATIVE"] = native_choice
    environment["PYTHONPATH"] = str(installation.parent)
    return subprocess.run(
        [sys.executable, "-c", f"import sae_fast; {code}"],
        cwd=installation.parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def last_line(done):
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_without_a_module_the_import_fails_and_names_the_remedy(installation):
    line = last_line(import_from(installation))
    assert line.startswith("ImportError: sae_fast has no compiled module for Python ")
    assert "run `pip install .`" in line
    assert "SAE_FAST_NATIVE=0" in line


def test_a_module_that_does_not_load_names_both_torch_versions(installation):
    text = b"\0sae_fast built with torch 2.12.0+cpu\0"
    (installation / MODULE).write_bytes(text)
    line = last_line(import_from(installation))
    assert "built with torch 2.12.0+cpu, does not load with torch " in line
    assert "run `pip install .`" in line


def test_the_environment_chooses_the_reference(installation):
    done = import_from(installation, "0")
    assert done.stdout == "{'backend': 'reference', 'reason': 'SAE_FAST_NATIVE=0 is set'}\n"


def test_a_reference_install_says_what_it_is(installation):
    (installation / "_reference_install.py").touch()
    done = import_from(installation)
    assert "'reason': 'installed with SAE_FAST_NATIVE=0'" in done.stdout


def test_a_reference_install_is_refused_where_the_compiled_module_was_asked_for(installation):
    (installation / "_reference_install.py").touch()
    assert "no compiled module" in last_line(import_from(installation, "1"))


def test_a_wrong_value_of_SAE_FAST_NATIVE_is_refused(installation):
    assert "SAE_FAST_NATIVE must be 0 or 1, got 'no'" in last_line(import_from(installation, "no"))


@pytest.mark.skipif(native.load() is None, reason="no compiled module")
def test_an_unknown_instruction_set_is_an_error_that_lists_the_others():
    environment = {**os.environ, "SAE_FAST_ISA": "sse9"}
    code = "import sae_fast; sae_fast.build_info()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "SAE_FAST_ISA=sse9 is not" in last_line(done)
    assert "portable" in last_line(done)


@pytest.mark.skipif(native.load() is None, reason="no compiled module")
def test_importing_leaves_denormals_alone():
    """A library built with -ffast-math would flush them to zero for the whole process."""
    code = "import numpy as np, sae_fast; print(np.float32(1e-40) * np.float32(0.5) > 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_the_stub_lists_what_the_module_has():
    module = native.load()
    if module is None:
        pytest.skip("no compiled module")
    stub = (PACKAGE / "_C.pyi").read_text()
    names = {name for name in dir(module) if not name.startswith("_")}
    assert names == {line.split("(")[0].removeprefix("def ") for line in stub.splitlines()}
    assert importlib.util.find_spec("sae_fast._C") is not None
