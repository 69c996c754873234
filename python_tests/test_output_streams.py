"""Commands continue if their output streams are closed or no longer read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae_fast
from sae_fast.activations import write_shard

MODULE = Path(sae_fast.__file__).parent / "output_streams.py"
# Only this module is loaded, so that these processes need no torch.
PRINTING = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("output_streams", {str(MODULE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
def main():
    for number in range(1000):
        print("line", number, "x" * 100)
        print("log", number, file=sys.stderr)
    os.write(1, b"raw")
    open(sys.argv[1], "w").write("done")
    return 3 if "bad" in sys.argv else 0
sys.exit(module.run_command(main))
"""


def _gone() -> int:
    """Return the writing end of a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _run(command, stdout=None, stderr=None, **options):
    """Return exit code and stderr of a process with these descriptors; None closes one."""
    closed = [number for number, stream in ((1, stdout), (2, stderr)) if stream is None]
    shell = " ".join(f"{number}>&-" for number in closed)
    line = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, *command]
    return subprocess.run(line, stdout=stdout, stderr=stderr, text=True, check=False, **options)


@pytest.mark.parametrize("stdout", ["gone", "closed", "whole"])
@pytest.mark.parametrize("stderr", ["gone", "closed", "whole"])
def test_work_goes_on_whatever_becomes_of_the_streams(tmp_path, stdout, stderr):
    streams = {"closed": None, "whole": subprocess.PIPE}
    ends = [_gone() if kind == "gone" else streams[kind] for kind in (stdout, stderr)]
    done = _run(["-c", PRINTING, str(tmp_path / "x")], *ends)
    assert done.returncode == 0
    assert (tmp_path / "x").read_text() == "done"
    if stderr == "whole":
        assert done.stderr.splitlines() == [f"log {number}" for number in range(1000)]
    if stdout == "whole":
        assert done.stdout.startswith("line 0 ")
    for end in ends:
        if end is not None and end >= 0:
            os.close(end)


def test_full_disk_behind_stdout_is_told_and_changes_the_exit_code(tmp_path):
    with open("/dev/full", "w") as full:
        done = _run(["-c", PRINTING, str(tmp_path / "x")], full, subprocess.PIPE)
        bad = _run(["-c", PRINTING, str(tmp_path / "x"), "bad"], full, subprocess.PIPE)
    assert done.returncode == 1
    message = "error: stdout: No space left on device; output was lost"
    assert done.stderr.splitlines()[-1] == message
    assert bad.returncode == 3


def test_characters_that_an_encoding_lacks_are_escaped(tmp_path):
    program = PRINTING.replace('print("line", number', 'print("\\udcff", number')
    done = _run(
        ["-c", program, str(tmp_path / "x")],
        *(subprocess.PIPE, subprocess.PIPE),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0
    assert done.stdout.startswith("\\udcff 0 ")


@pytest.mark.slow
def test_training_ends_well_though_nothing_reads_what_it_prints(tmp_path):
    write_shard(tmp_path / "a.h5", torch.randn(300, 8))
    flags = ["--k", "2", "--d-sae", "16", "--batch-size", "32", "--max-steps", "3"]
    command = ["-m", "sae_fast.train", "--shard-dir", str(tmp_path / "a.h5"), *flags]
    gone = _gone()
    done = _run([*command, "--checkpoint-dir", str(tmp_path / "run")], gone, gone)
    os.close(gone)
    assert done.returncode == 0
    assert (tmp_path / "run" / "training_history.json").exists()


@pytest.mark.slow
def test_report_whose_reader_has_gone_is_quiet():
    gone = _gone()
    done = _run(["-m", "sae_fast.info"], gone, subprocess.PIPE)
    os.close(gone)
    assert (done.returncode, done.stderr) == (0, "")


IGNORING = """
import sys
from sae_fast.command_errors import refusal
from sae_fast.output_streams import run_command
class Ignored:
    def __init__(self, error): self.error = error
    def __del__(self): raise self.error
def main():
    Ignored(KeyError("a fault"))
    for error in sys.argv[1:]:
        Ignored(MemoryError())
    try:
        raise RuntimeError("a font cannot be opened")
    except RuntimeError as error:
        print(refusal(error), file=sys.stderr)
    return 2
sys.exit(run_command(main))
"""


def test_an_error_after_an_ignored_lack_of_memory_is_the_one_line():
    done = _run(["-c", IGNORING, "memory"], stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert "KeyError: 'a fault'" in done.stderr  # ignored too, and a fault
    assert "MemoryError" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: the memory that this process may have is used up (a font cannot be opened)"
    )
    without = _run(["-c", IGNORING], stderr=subprocess.PIPE)
    assert without.returncode == 1
    assert without.stderr.splitlines()[-1] == "RuntimeError: a font cannot be opened"
