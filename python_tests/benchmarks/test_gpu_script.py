"""benchmarks/gpu.sh without a GPU: its arguments, its trial on a CPU, its limits.

Scripts replace the tools of CUDA; they do only as much as the tests need.
"""

import ast
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
TINY = "64x32x128x4"


def gpu_sh(*arguments, path="", **variables):
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "everything"], "--only must be tests, sanitizer, bench or profile"),
        (["--seconds", "soon"], "--seconds must be a whole number above 0, got soon"),
        (["--seconds", "0"], "--seconds must be a whole number above 0, got 0"),
        (["--device", "tpu"], "--device must be cuda or cpu, got tpu"),
        (["--out"], "--out needs a value"),
        (["--quick"], "unknown argument --quick"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    done = gpu_sh(*arguments)
    assert done.returncode == 64
    assert done.stderr.startswith(f"gpu.sh: {message}")


def test_help_says_what_the_exit_code_means():
    done = gpu_sh("--help")
    assert done.returncode == 0
    assert "build 1, tests 2, sanitizer 4, bench 8, profile 16" in " ".join(done.stdout.split())


def imported_at_once(body):
    """Yield the packages that statements import when their module is imported."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (name.name.partition(".")[0] for name in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.level == 0:
            yield statement.module.partition(".")[0]
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" not in ast.dump(statement.test):
            yield from imported_at_once([*statement.body, *statement.orelse])
        elif isinstance(statement, (ast.ClassDef, ast.With, ast.Try)):
            yield from imported_at_once(statement.body)


def test_what_it_runs_imports_no_package_that_it_does_not_look_for():
    """A test file that cannot be imported ends the whole run of pytest before its first test."""
    text = SCRIPT.read_text("utf-8")
    asked_for = re.findall(r'^(?:needed|of_tests) = "([a-z0-9 ]+)"$', text, re.MULTILINE)
    folders = set(re.findall(r"python_tests/[a-z]+(?= |$)", text, re.MULTILINE))
    assert len(asked_for) == 2
    assert len(folders) == 4
    tests = [ROOT / "python_tests" / "conftest.py", ROOT / "python_tests" / "small_pages.py"]
    files = [*tests, *(ROOT / "sae_fast").rglob("*.py")]
    files += [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    own = {file.stem for file in files} | {
        file.stem for file in (ROOT / "python_tests").glob("*.py")
    }
    own |= {"sae_fast", "benchmarks", *(file.stem for file in (ROOT / "tools").glob("*.py"))}
    allowed = {*" ".join(asked_for).split(), *sys.stdlib_module_names, *own}
    assert {
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        for name in imported_at_once(ast.parse(file.read_text("utf-8")).body)
        if name not in allowed
    } == set()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_rehearsal_is_named(tmp_path):
    done = gpu_sh("--out", tmp_path)
    assert done.returncode == 64
    assert "--device cpu tries the script" in done.stderr


@pytest.mark.slow
def test_parts_without_time_fail_and_the_exit_code_says_which(tmp_path):
    parts = ["--only", "profile,sanitizer", "--no-build", "--seconds", "4"]
    done = gpu_sh("--device", "cpu", *parts, "--out", tmp_path)
    assert done.returncode == 4 + 16, done.stdout
    summary = (tmp_path / "summary.md").read_text()
    assert "| sanitizer | **failed**" in summary
    assert "| profile | **failed**" in summary
    assert "| bench |" not in summary
    assert "no time left" in (tmp_path / "log.txt").read_text()


# The output of ncu, which the table needs; the other tools need only exist.
NCU_PAGE = """==PROF== Disconnected
"ID","Kernel Name","gpu__time_duration.sum"
"","","us"
"0","latent_major","12.5"
"""
TOOLS = {
    "nvidia-smi": 'case "$*" in *compute_cap*) echo 9.0 ;; *) echo "A GPU, 1, 2, 3, 4, 5" ;; esac',
    "nvcc": "echo Build cuda_13.0",
    "cmake": 'echo "cmake $*"',
    "compute-sanitizer": 'while [[ $1 == --* ]]; do shift 2; done; exec "$@"',
    "ncu": f"""while (($#)); do [[ $1 == --log-file ]] && cat >"$2" <<'END'
{NCU_PAGE}END
shift; done""",
    # Python that takes the CPU for the GPU, and has no pip.
    "python-with-gpu": """case "$*" in
*is_available*|*build_info*) exit 0 ;;
*"-m pip"*) echo no network; exit 1 ;;
*"-m pytest"*) echo "pytest $*"; exit 0 ;;
esac
arguments=()
case "$*" in
*benchmarks.train_step*) set -- "$@" --peers eager --rounds 2 ;;
*benchmarks.quality*) set -- "$@" --epochs 1 --threads 1 ;;
*benchmarks.kernels*) set -- "$@" --rounds 1 ;;
esac
for argument in "$@"; do [[ $argument == cuda ]] && argument=cpu; arguments+=("$argument"); done
exec WARM_PYTHON "${arguments[@]}\"""",
}


@pytest.fixture
def tools(tmp_path):
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, script in TOOLS.items():
        file = folder / name
        script = script.replace("WARM_PYTHON", warm_python.shell_command())
        file.write_text(f"#!/usr/bin/env bash\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.mark.slow
def test_every_part_runs_with_the_tools_of_cuda_played(tools, tmp_path):
    out = tmp_path / "out"
    options = ["--out", out, "--sizes", TINY, "--seconds", 3600]
    done = gpu_sh(*options, path=tools, PYTHON=str(tools / "python-with-gpu"))
    assert done.returncode == 0, done.stdout + done.stderr
    log = (out / "log.txt").read_text()
    assert "trying CMake alone" in log
    assert "-m cuda" in log
    assert "-p no:benchmark " in log
    for tool in ("memcheck", "racecheck"):
        assert f"--tool {tool}" in log
    summary = (out / "summary.md").read_text()
    assert summary.count("| passed |") == 5
    assert "A GPU" in summary
    tables = (out / "tables.md").read_text()
    for title in ("# One training step", "# The ops", "# Quality of trained", "# The slowest"):
        assert title in tables
    assert "| latent_major | 1 | 12.5 |" in tables
    assert len(list(out.iterdir())) <= 8
