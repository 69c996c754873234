"""tools/ and setup.py: the torch and compilers of a build, and its errors."""

import dataclasses
import http.server
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("SAE_FAST_")}

if not (ROOT / "tools").exists():
    pytest.skip("no checkout: the build tools are not installed", allow_module_level=True)


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


backend = load_tool("build_backend")
toolchain = load_tool("toolchain")
cuda_resources = load_tool("cuda_resources")
install_torch = load_tool("install_torch")
isa_symbols = load_tool("isa_symbols")
tidy = load_tool("tidy")


def make_torch(folder, version, cuda="None"):
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('torch was imported')\n")
    (folder / "version.py").write_text(
        f"__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {cuda}\nhip = None\n"
    )
    return folder


def make_script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def clean_environment(monkeypatch):
    for name in ("SAE_FAST_NATIVE", "SAE_FAST_CUDA", "SAE_FAST_TORCH_ROOT", "CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_an_old_setuptools_is_refused_with_the_remedy():
    backend.refuse_old_setuptools("77.0.1")
    with pytest.raises(SystemExit, match=r"setuptools 77\.0 or newer .* found 65\.5\.0: run `pip"):
        backend.refuse_old_setuptools("65.5.0")


# torch


@pytest.mark.usefixtures("clean_environment")
def test_the_torch_named_by_the_environment_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_FAST_TORCH_ROOT", str(tmp_path))
    assert backend.torch_root() == tmp_path


@pytest.mark.usefixtures("clean_environment")
def test_the_installed_torch_is_found_without_importing_it(tmp_path, monkeypatch):
    torch = make_torch(tmp_path / "torch", "2.13.0+cpu")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert backend.torch_root() == torch


@pytest.mark.usefixtures("clean_environment")
def test_the_torch_that_pip_hides_is_found(tmp_path, monkeypatch):
    """pip puts its build environment first, by PYTHONPATH; an old torch in it is ignored."""
    make_torch(tmp_path / "torch", "1.9.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = backend.torch_root()
    assert found is not None
    assert found.parent == Path(sysconfig.get_path("purelib"))


@pytest.mark.parametrize(
    ("version", "recent"),
    [("2.11.0", True), ("2.13.0+cpu", True), ("3.0.0", True), ("2.9.1", False), ("2.10.0", False)],
)
def test_versions_of_torch_are_compared_as_numbers(tmp_path, version, recent):
    assert backend.is_recent(make_torch(tmp_path / "torch", version)) is recent


@pytest.fixture
def nothing_else_required(monkeypatch):
    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(backend.build_meta, hook, lambda settings: [])


@pytest.mark.usefixtures("clean_environment", "nothing_else_required")
def test_the_build_tools_are_required_and_torch_never_is(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "torch_root", lambda: tmp_path)
    assert backend.get_requires_for_build_editable() == backend.BUILD_TOOLS
    assert backend.get_requires_for_build_wheel() == backend.BUILD_TOOLS


@pytest.mark.usefixtures("clean_environment", "nothing_else_required")
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_without_torch_the_first_hook_stops_in_one_line_that_helps(kind, monkeypatch):
    monkeypatch.setattr(backend, "torch_root", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        getattr(backend, f"get_requires_for_build_{kind}")()
    line = stopped.value.code
    assert "\n" not in line
    assert "none of version 2.11 or newer: install it first (`pip install torch`" in line
    assert "SAE_FAST_TORCH_ROOT" in line
    assert "SAE_FAST_NATIVE=0" in line


@pytest.mark.usefixtures("clean_environment", "nothing_else_required")
def test_the_reference_needs_no_build_tools(monkeypatch):
    monkeypatch.setenv("SAE_FAST_NATIVE", "0")
    monkeypatch.setattr(backend, "torch_root", lambda: None)
    assert backend.get_requires_for_build_wheel() == []


@pytest.mark.usefixtures("clean_environment")
def test_a_wrong_value_of_SAE_FAST_NATIVE_is_refused(monkeypatch):
    monkeypatch.setenv("SAE_FAST_NATIVE", "off")
    with pytest.raises(SystemExit, match="SAE_FAST_NATIVE must be 0 or 1, got 'off'"):
        backend.native_wanted()


# The torch of the Makefile


@pytest.mark.parametrize(
    ("choice", "arguments"),
    [
        ("", ["torch"]),
        ("2.11.0", ["torch==2.11.0"]),
        ("torch<2.13", ["torch<2.13"]),
        ("2.12.0 --extra-index-url URL", ["torch==2.12.0", "--extra-index-url", "URL"]),
    ],
)
def test_TORCH_is_a_version_a_requirement_or_arguments_of_pip(choice, arguments):
    assert install_torch.wanted(choice) == arguments


def test_pins_that_contradict_a_chosen_torch_are_left_out():
    def names(text):
        return {line.partition("==")[0] for line in text.splitlines()}

    all_pins = names(install_torch.pins(""))
    assert {"torch", "setuptools", "numpy"} <= all_pins
    assert all_pins - names(install_torch.pins("2.11.0")) == {"torch", "setuptools"}


@pytest.fixture
def listener():
    """Open a port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_an_index_that_refuses_or_does_not_answer_is_given_up(listener, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    silent = f"http://127.0.0.1:{listener}"
    assert install_torch.why_unreachable(silent, deadline=0.1) is not None
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    assert "refused" in install_torch.why_unreachable(f"http://127.0.0.1:{closed}")


class Index(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200 if self.path == "/cpu/torch/" else 404)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def test_an_index_that_has_torch_is_taken(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.HTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert install_torch.why_unreachable(f"{url}/cpu") is None
        assert "Not Found" in install_torch.why_unreachable(f"{url}/other")
        server.shutdown()


@pytest.mark.parametrize(
    ("arguments", "driver", "unreachable", "options", "said"),
    [
        (["torch"], False, None, ["--extra-index-url", install_torch.CPU_INDEX], 0),
        (["torch==2.11.0"], False, None, ["--extra-index-url", install_torch.CPU_INDEX], 0),
        (["torch"], False, "no route", [], 1),
        (["torch"], True, None, [], 0),
        (["torch", "--index-url", "URL"], False, None, [], 0),
    ],
)
def test_the_cpu_index_is_for_machines_without_a_driver(
    arguments, driver, unreachable, options, said, monkeypatch, capsys
):
    monkeypatch.setattr(install_torch.sys, "platform", "linux")
    monkeypatch.setattr(install_torch, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(install_torch, "why_unreachable", lambda url: unreachable)
    assert install_torch.index_arguments(arguments) == options
    assert capsys.readouterr().out.count("\n") == said


# CUDA


def test_a_cpu_torch_is_a_reason_for_no_cuda(tmp_path):
    torch = make_torch(tmp_path / "torch", "2.13.0+cpu")
    assert toolchain.why_no_cuda(torch, "nvcc") == "the installed torch is a CPU build"


@pytest.mark.parametrize("nvcc", [None, "/nowhere/nvcc"])
def test_a_missing_nvcc_is_a_reason_for_no_cuda(tmp_path, nvcc):
    torch = make_torch(tmp_path / "torch", "2.13.0+cu130", cuda="'13.0'")
    assert toolchain.why_no_cuda(torch, nvcc) == "no nvcc found (set CUDA_HOME)"


@pytest.mark.parametrize(
    ("release", "reason"),
    [
        ("13.2", None),
        ("12.8", "nvcc 12.8 does not match torch's CUDA 13.0"),
    ],
)
def test_the_cuda_of_nvcc_and_torch_must_have_one_major(tmp_path, release, reason):
    torch = make_torch(tmp_path / "torch", "2.13.0+cu130", cuda="'13.0'")
    nvcc = make_script(
        tmp_path / "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.1'"
    )
    assert toolchain.why_no_cuda(torch, nvcc) == reason


def test_the_oldest_torch_has_the_macros_that_the_sources_use():
    """torch 2.11 has no STABLE_… macros; a build with a newer torch does not show it."""
    sources = [path for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cpp", ".cu")]
    assert len(sources) > 100
    macro = re.compile(r"\bSTABLE_TORCH_(?!LIBRARY)\w+")
    assert not [path.name for path in sources if macro.search(path.read_text("utf-8"))]


def test_an_nvcc_of_an_unknown_kind_is_a_reason_for_no_cuda(tmp_path):
    torch = make_torch(tmp_path / "torch", "2.13.0+cu130", cuda="'13.0'")
    nvcc = make_script(tmp_path / "nvcc", "echo hello")
    assert toolchain.why_no_cuda(torch, nvcc) == f"{nvcc} --version names no release"


@pytest.mark.usefixtures("clean_environment")
def test_nvcc_of_CUDA_HOME_comes_first(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/cuda")
    assert toolchain.find_nvcc() == "/cuda/bin/nvcc"


# The build itself


def run_setup(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=cwd, capture_output=True, text=True, env={**PLAIN, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["PATH", "CXX"])
def test_without_a_compiler_the_build_fails_and_names_both_remedies(tmp_path, name):
    done = run_setup("build_ext", f"--build-lib={tmp_path}", **{name: "/nowhere"})
    assert done.returncode != 0
    assert "no C++ compiler found" in done.stderr
    assert "install one and run pip again" in done.stderr
    assert "SAE_FAST_NATIVE=0 pip install ." in done.stderr


def test_cuda_that_was_asked_for_and_cannot_be_fails_with_the_reason(tmp_path):
    torch = make_torch(tmp_path / "torch", "2.13.0+cpu")
    done = run_setup(
        "build_ext", f"--build-lib={tmp_path}", SAE_FAST_CUDA="1", SAE_FAST_TORCH_ROOT=str(torch)
    )
    assert done.returncode != 0
    assert "SAE_FAST_CUDA=1, but the installed torch is a CPU build" in done.stderr


def test_a_wrong_value_of_SAE_FAST_CUDA_is_refused(tmp_path):
    done = run_setup("build_ext", f"--build-lib={tmp_path}", SAE_FAST_CUDA="yes")
    assert done.returncode != 0
    assert "SAE_FAST_CUDA must be 0, 1 or auto, got 'yes'" in done.stderr


def copy_checkout(folder):
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_reference_install.py")
    for name in ("tools", "cmake", "csrc", "sae_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)


@pytest.mark.slow
def test_a_reference_wheel_is_pure_and_says_what_it_is(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    copy_checkout(checkout)
    stale = checkout / "build" / "lib" / "sae_fast" / "renamed.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    old_module = checkout / "sae_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    old_module.touch()
    done = run_setup("bdist_wheel", f"--dist-dir={tmp_path}", cwd=checkout, SAE_FAST_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = ("", "ops/", "activations/", "autoencoder/", "training/")
    assert {f"sae_fast/{package}__init__.py" for package in packages} <= names
    assert {"sae_fast/py.typed", "sae_fast/_C.pyi", "sae_fast/_reference_install.py"} <= names
    assert not any(name.endswith(".so") or "renamed" in name for name in names)
    assert all(name.startswith("sae_fast") for name in names)
    assert (
        not old_module.exists()
    )  # Python started in the checkout must agree with the installation

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    imported = subprocess.run(
        [sys.executable, "-c", "import sae_fast; print(sae_fast.build_info())"],
        cwd=tmp_path, capture_output=True, text=True, env={**PLAIN, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert "'reason': 'installed with SAE_FAST_NATIVE=0'" in imported.stdout, imported.stderr


# Reports

PTXAS = """\
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_80'
ptxas info    : Function properties for _Z1kPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 16 bytes cumulative stack size, 152 bytes smem
ptxas info    : Compile time = 10.489 ms
ptxas info    : Compiling entry function '_Z2k2Pf' for 'sm_90a'
ptxas info    : Function properties for _Z2k2Pf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def test_what_ptxas_says_is_read_kernel_by_kernel():
    spilling, lean = cuda_resources.parse(PTXAS)
    assert spilling == cuda_resources.Usage("_Z1kPf", "sm_80", 32, shared=152, stack=16, spills=12)
    assert lean == cuda_resources.Usage("_Z2k2Pf", "sm_90a", 8, shared=0, stack=0, spills=0)
    (fault,) = cuda_resources.faults([spilling, lean])
    assert "spills registers" in fault
    wide = dataclasses.replace(lean, shared=17 * 1024 + 1)
    (fault,) = cuda_resources.faults([dataclasses.replace(lean, shared=17 * 1024), wide])
    assert "declares 17409 bytes of shared memory" in fault


def test_kernels_are_listed_once_with_the_numbers_of_each_architecture():
    same = cuda_resources.parse(PTXAS.replace("_Z2k2Pf", "_Z1kPf"))
    title, _, row = cuda_resources.table(same).splitlines()
    assert title == "CUDA kernels for sm_80, sm_90a:"
    assert re.split(r" {2,}", row)[1:] == ["32 8", "152 0", "16 0", "12 0"]


def test_a_report_of_ptxas_that_is_not_understood_is_an_error():
    with pytest.raises(ValueError, match="ptxas wrote something new"):
        cuda_resources.parse("Compiling entry function '_Z1kPf' for 'sm_80'\n")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
def test_a_symbol_outside_its_instruction_sets_namespace_is_found(tmp_path):
    source = tmp_path / "kernel.cpp"
    source.write_text(
        "namespace sae_fast::avx2 { float inside(float x) { return x; } }\n"
        "namespace sae_fast { template <class T> T shared(T x) { return x; }\n"
        "template float shared<float>(float); }\n"
    )
    built = source.with_suffix(".o")
    subprocess.run(["c++", "-std=c++17", "-c", source, "-o", built], check=True)
    (found,) = isa_symbols.foreign_symbols([built], "avx2")
    assert "shared" in found


def test_a_changed_header_concerns_the_sources_that_include_it(tmp_path):
    source, header, inner = (tmp_path / "csrc" / name for name in ("a.cpp", "b.h", "c/d.h"))
    inner.parent.mkdir(parents=True)
    source.write_text('#include <vector>\n#include "b.h"\n')
    header.write_text('#include "c/d.h"\n#include "of_torch.h"\n')
    inner.write_text('#include "b.h"\n')
    assert tidy.included(source, tmp_path) == {source, header, inner}


def test_every_folder_of_modules_is_a_package():
    # setuptools installs only folders with an __init__.py.
    folders = {path.parent for path in (ROOT / "sae_fast").rglob("*.py")}
    assert len(folders) > 5
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.parametrize(
    ("wanted", "architectures"),
    [
        ("8.0 9.0a;12.0+PTX", "80-real;90a-real;120"),
        ("Ampere", "80-real;86"),
        ("Ampere;Hopper", "80-real;86;90"),
        ("Ampere+Tegra 9.0", "87-real;90-real"),
        ("8.0+PTX", "80"),
    ],
)
def test_TORCH_CUDA_ARCH_LIST_is_as_torch_knows_it(wanted, architectures, tmp_path):
    assert architectures_for(wanted, tmp_path) == architectures


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_an_unknown_architecture_is_refused(tmp_path):
    said = " ".join(architectures_for("Amper", tmp_path).split())
    assert "TORCH_CUDA_ARCH_LIST must hold numbers as 8.0" in said
    assert "got Amper" in said


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_a_long_cuda_build_says_what_it_compiles_and_how_to_leave_it_out(tmp_path):
    call = 'announce_architectures("75-real;80-real;90-real;120" 2)'
    said = " ".join(run_cmake_script(call, "9.0", tmp_path).split())
    assert said.startswith("sae_fast: no GPU was found, so the CUDA kernels are compiled for all")
    assert "(75 80 90 120), about 7 minutes on 2 cores" in said
    assert "SAE_FAST_CUDA=0 to leave CUDA out" in said


def architectures_for(wanted, folder):
    """Return the architectures that CMake reads from the variable, or its error."""
    return run_cmake_script('message("${CMAKE_CUDA_ARCHITECTURES}")', wanted, folder)


def run_cmake_script(last_line, wanted, folder):
    """Run a line of CMake after cuda_architectures.cmake; return its output."""
    file = ROOT / "cmake" / "cuda_architectures.cmake"
    script = folder / "show.cmake"
    script.write_text(f'include("{file}")\n{last_line}\n')
    environment = {**PLAIN, "TORCH_CUDA_ARCH_LIST": wanted}
    environment.pop("CUDAARCHS", None)
    line = ["cmake", "-P", str(script)]
    return subprocess.run(line, env=environment, capture_output=True, text=True).stderr.strip()
