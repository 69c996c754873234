"""benchmarks/first_light.sh without a GPU: a Python that fails, hangs or does nothing is played."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "first_light.sh"


@pytest.fixture
def first_light(tmp_path):
    """Run the script with a Python that does what its cases say, by a pattern of its arguments."""

    def run(*arguments, cases="", **variables):
        python = tmp_path / "python"
        python.write_text(f'#!/usr/bin/env bash\ncase "$*" in\n{cases}\n*) exit 0 ;;\nesac\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        own = {"PYTHON": str(python), "OUT": str(tmp_path / "out"), **variables}
        return subprocess.run(
            [str(SCRIPT), *arguments], env=os.environ | own, capture_output=True, text=True
        )

    return run


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "the first argument must be a or b, got ''"),
        (["c"], {}, "the first argument must be a or b, got 'c'"),
        (["a", "--device", "tpu"], {}, "--device must be cuda or cpu, got 'tpu'"),
        (["a"], {"PERCENT": "0"}, "PERCENT must be a whole number above 0, got 0"),
    ],
)
def test_wrong_arguments_are_named(first_light, arguments, variables, message):
    done = first_light(*arguments, **variables)
    assert (done.returncode, done.stderr) == (64, f"first_light.sh: {message}\n")


def test_a_step_that_fails_or_hangs_ends_and_the_others_are_taken(first_light, tmp_path):
    cases = "*-m\\ pytest*) echo two failed; exit 1 ;;\n*profile_step*bf16*) exec sleep 60 ;;"
    done = first_light("a", "--device", "cpu", cases=cases, PERCENT="7")
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    told = [line.partition(" s: ")[2].rpartition(" after ")[0] for line in summary[:-1]]
    assert told == [
        *("build: exit code 0", "info: exit code 0", "every op: exit code 0"),
        *("tests: exit code 1", "profile 64x32x128x4 bf16: exit code 124"),
        *("profile 64x32x128x4 screened: exit code 0", "benchmark 64x32x128x4: exit code 0"),
    ]
    assert summary[-1].endswith("part a: 2 steps failed")
    assert "two failed" in (tmp_path / "out" / "log.txt").read_text()


def test_nothing_follows_a_build_that_fails(first_light, tmp_path):
    done = first_light("a", "--device", "cpu", cases="*sae_fast.info*) exit 3 ;;")
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert "build: exit code 3" in summary[0]
    assert summary[1].endswith("part a: 1 steps failed")


def test_the_parts_call_the_tools_of_cuda(first_light, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("nvidia-smi", "nvcc", "ncu", "compute-sanitizer", "strip"):
        tool = tools / name
        tool.write_text("#!/usr/bin/env bash\necho 9.0\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    cases = '*-m\\ pip\\ install*) echo "for $TORCH_CUDA_ARCH_LIST"; exit 0 ;;'
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = first_light("a", cases=cases, PATH=path)
    assert done.returncode == 0, done.stdout
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "for 9.0a\n" in log
    assert "-m cuda -k not inductor" in log
    assert [log.count(f"--sizes {size} ") for size in ("G1", "G2", "G3")] == [1, 1, 1]
    done = first_light("b", PATH=path)
    assert done.returncode == 0, done.stdout
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "--sizes G1,G2 " in log
    assert "--kernel-name regex:^(update_kernel|" in log
    assert [log.count(f"--tool {tool} ") for tool in ("memcheck", "racecheck")] == [1, 1]


def test_part_b_repeats_the_tests_that_are_named(first_light, tmp_path):
    done = first_light("b", "--device", "cpu", "python_tests/ops/test_rows.py")
    assert done.returncode == 0, done.stdout
    log = (tmp_path / "out" / "log.txt").read_text()
    tests, benchmark, kernels = log.splitlines()[1:]
    assert tests.endswith("python_tests/ops/test_rows.py")
    assert "-p no:benchmark " in tests  # beside pytest-xdist it warns, and warnings are errors
    assert "benchmarks.train_step" in benchmark
    assert "benchmarks.kernels" in kernels
