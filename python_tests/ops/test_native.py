"""Loading the compiled module: found, switched off, or missing with one clear line."""

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import warm_python

import sae_fast
from sae_fast.ops import native

PACKAGE = Path(sae_fast.__file__).parent
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


@pytest.fixture
def installation(tmp_path):
    """Make a copy of the package without a compiled module and without a marker."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_reference_install.py")
    shutil.copytree(PACKAGE, tmp_path / "sae_fast", ignore=ignore)
    return tmp_path / "sae_fast"


def import_from(installation, native_choice=None, code="print(sae_fast.build_info())"):
    environment = surroundings(installation)
    if native_choice is not None:
        environment["SAE_FAST_NATIVE"] = native_choice
    program = ["-c", f"import sae_fast; {code}"]
    return warm_python.run(program, cwd=installation.parent, env=environment)


def last_line(done):
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_without_a_module_the_import_fails_and_names_the_remedy(installation):
    line = last_line(import_from(installation))
    assert line.startswith("ImportError: sae_fast has no compiled module for Python ")
    assert "run `pip install .`" in line
    assert "SAE_FAST_NATIVE=0" in line


# Arguments without which a command is refused before it needs torch or the module.
NEEDED = {
    "train": ("--shard-dir", "shards"),
    "capture": ("model", "dataset", "--layers", "0", "--out", "shards"),
    "convert_shards": ("files", "shards"),
    "compare": ("one", "two"),
    "evaluate": ("sae", "--shard-dir", "shards", "--out", "out"),
    "latents": ("sae", "--shard-dir", "shards", "--out", "pages"),
    "convert": ("one", "two"),
    "verify": ("one",),
    "plot": ("run",),
    "biographies": ("--out", "biographies"),
    "ground_truth": ("superposition", "--out", "out"),
    "swap": ("checkpoint", "--data", "biographies"),
}


def commands(installation):
    """Return the arguments of Python that run each command of the package."""
    files = installation.glob("[!_]*.py")
    names = [path.stem for path in files if "__main__" in path.read_text(encoding="utf-8")]
    names += [path.parent.name for path in installation.glob("*/__main__.py")]
    assert {"train", "capture", "convert_shards", "plot", "info", "presets"} <= set(names)
    return [["-m", f"sae_fast.{name}", *NEEDED.get(name, ())] for name in names]


def surroundings(installation):
    """Return the environment variables of a process that imports this installation."""
    others = {k: v for k, v in os.environ.items() if not k.startswith("SAE_FAST_")}
    return {**others, "PYTHONPATH": str(installation.parent)}


@pytest.mark.slow
def test_without_a_module_every_command_ends_in_one_line(installation):
    place, variables = installation.parent, surroundings(installation)
    for done in warm_python.run_together(commands(installation), cwd=place, env=variables):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: sae_fast has no compiled module for Python ")
        assert done.stderr.count("\n") == 1


def test_without_torch_every_command_ends_in_one_line(installation):
    place, variables = installation.parent, surroundings(installation)
    running = [
        subprocess.Popen(
            [sys.executable, "-S", *command],  # -S hides the installed packages
            cwd=place, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for command in commands(installation)
    ]  # fmt: skip
    for process in running:
        output, errors = process.communicate()
        assert (process.returncode, output) == (2, "")
        assert errors.startswith("error: sae_fast needs torch, which ")
        assert errors.count("\n") == 1


@pytest.mark.slow
def test_a_damaged_module_is_told_as_such(installation):
    (installation / MODULE).write_bytes(b"\0sae_fast built with torch 2.12.0+cpu\0")
    line = last_line(import_from(installation))
    assert "sae_fast's compiled module is damaged or of another machine" in line
    assert "run `pip install .`" in line


@pytest.mark.slow
def test_the_environment_chooses_the_reference(installation):
    done = import_from(installation, "0")
    assert done.stdout == "{'backend': 'reference', 'reason': 'SAE_FAST_NATIVE=0 is set'}\n"


@pytest.mark.slow
def test_a_reference_install_says_what_it_is(installation):
    (installation / "_reference_install.py").touch()
    done = import_from(installation)
    assert "'reason': 'installed with SAE_FAST_NATIVE=0'" in done.stdout


@pytest.mark.slow
def test_a_reference_install_is_refused_where_the_compiled_module_was_asked_for(installation):
    (installation / "_reference_install.py").touch()
    assert "no compiled module" in last_line(import_from(installation, "1"))


@pytest.mark.slow
def test_a_wrong_value_of_SAE_FAST_NATIVE_is_refused(installation):
    assert "SAE_FAST_NATIVE must be 0 or 1, got 'no'" in last_line(import_from(installation, "no"))


@pytest.mark.slow
@pytest.mark.skipif(native.load() is None, reason="no compiled module")
def test_an_unknown_instruction_set_is_an_error_that_lists_the_others():
    environment = {**os.environ, "SAE_FAST_ISA": "sse9"}
    done = warm_python.run(["-c", "import sae_fast; sae_fast.build_info()"], env=environment)
    assert "ImportError: SAE_FAST_ISA must be one of portable" in last_line(done)
    assert last_line(done).endswith(" on this processor, got sse9")


# Linux refuses the tile registers to a process with a signal stack too small to save them.
SMALL_SIGNAL_STACK = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, 4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
import sae_fast
from sae_fast import info
print(sae_fast.build_info()["instruction_set"])
print(info.describe())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    "amx" not in sae_fast.build_info().get("available_instruction_sets", ()),
    reason="this processor has no AMX, or the module was built without it",
)
def test_another_instruction_set_is_used_where_the_operating_system_refuses_tiles():
    environment = {name: value for name, value in os.environ.items() if name != "SAE_FAST_ISA"}
    code = [sys.executable, "-c", SMALL_SIGNAL_STACK]
    done = subprocess.run(code, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "avx512vnni"
    assert "amx: the operating system does not hand out the tile registers (No space" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "info"])
def test_a_command_refuses_a_wrong_variable_in_one_line(command):
    environment = {**os.environ, "SAE_FAST_NATIVE": "x", "PYTHONPATH": str(PACKAGE.parent)}
    line = ["-m", f"sae_fast.{command}", *NEEDED.get(command, ())]
    done = warm_python.run(line, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: SAE_FAST_NATIVE must be 0 or 1, got 'x'\n"


@pytest.mark.slow
@pytest.mark.skipif(native.load() is None, reason="no compiled module")
def test_a_command_refuses_an_unknown_instruction_set_in_one_line():
    environment = {**os.environ, "SAE_FAST_ISA": "nonsense", "PYTHONPATH": str(PACKAGE.parent)}
    done = warm_python.run(["-m", "sae_fast.info"], env=environment)
    assert done.returncode == 2
    assert re.fullmatch(
        "error: SAE_FAST_ISA must be one of portable.* on this processor, got nonsense\n",
        done.stderr,
    )


WHY = [
    (
        "/old/libstdc++.so.6: version `GLIBCXX_3.4.29' not found (required by /x/_C.so)",
        "GLIBCXX_3.4.29, and the C++ library that was found first, /old/libstdc++.so.6, is older",
    ),
    (
        "/lib/libc.so.6: version `GLIBC_2.38' not found (required by /x/_C.so)",
        "needs GLIBC_2.38 of /lib/libc.so.6, which is older",
    ),
    (
        "libtorch_cuda.so: cannot open shared object file: No such file or directory",
        "needs libtorch_cuda.so, which is not there with torch ",
    ),
    ("/x/_C.so: file too short", "is damaged or of another machine"),
    (
        "/x/_C.so: undefined symbol: torch_get_const_data_ptr",
        "built with torch 2.12.0+cpu, does not load with torch ",
    ),
]


@pytest.mark.parametrize(("error", "said"), WHY)
def test_the_cause_of_a_failed_load_is_named(error, said, tmp_path):
    (tmp_path / MODULE).write_bytes(b"\0sae_fast built with torch 2.12.0+cpu\0")
    message = native._why_not(error, tmp_path / MODULE)
    assert said in message
    assert f"({error})" in message
    assert "\n" not in message


@pytest.mark.slow
@pytest.mark.skipif(
    native.load() is None or sys.platform != "linux", reason="no compiled module, or no glibc"
)
def test_an_older_libstdcxx_is_told_as_such(tmp_path):
    (tmp_path / "libstdc++.so.6").write_bytes(older_libstdcxx())
    environment = {
        **os.environ,
        "PYTHONPATH": str(PACKAGE.parent),
        "LD_LIBRARY_PATH": str(tmp_path),
    }
    line = [sys.executable, "-m", "sae_fast.info"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: sae_fast's compiled module needs GLIBCXX_3.4.")
    assert f"{tmp_path}/libstdc++.so.6, is older than the compiler's" in done.stderr
    assert done.stderr.count("\n") == 1


def older_libstdcxx():
    """Make a copy of the C++ library without the versions of GCC 11 and newer."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    library = Path(next(line.split()[-1] for line in maps if "libstdc++" in line)).read_bytes()
    for minor in range(29, 36):
        library = library.replace(elf_hash(f"GLIBCXX_3.4.{minor}"), b"\1\2\3\4")
    return library


def elf_hash(name):
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high & 0xFFFFFFFF
    return struct.pack("<I", value)


@pytest.mark.slow
def test_modules_of_other_pythons_are_named(installation):
    (installation / "_C.cpython-37m-x86_64-linux-gnu.so").touch()
    assert ", only for 3.7: run `pip install .`" in last_line(import_from(installation))


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
