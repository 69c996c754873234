"""`--quiet`, `--log-file` and `--version`, and what a training shows without a terminal."""

import contextlib
from pathlib import Path

import pytest
from train_runs import Run, refused

import sae_fast
from sae_fast.__main__ import main as any_command


def test_a_quiet_training_shows_nothing_and_its_file_has_all(run_small: Run, shards: Path) -> None:
    where = ("--shard-dir", shards, "--checkpoint-dir", "run")
    code, out, err = run_small(*where, "--quiet", "--log-file", "logs/run.log")
    assert (code, out, err) == (0, "", "")
    log = Path("logs/run.log").read_text()
    for part in (
        " INFO memory plan",
        "INFO training topk",
        "INFO step 6: loss ",
        "trained 6 steps",
    ):
        assert part in log
    assert refused(run_small(*where, "--quiet", "--log-file", "logs/run.log"), "holds a run")
    assert "ERROR error: run already holds a run" in Path("logs/run.log").read_text()


def test_without_a_terminal_the_last_figures_are_a_line(run_small: Run, shards: Path) -> None:
    _, out, err = run_small("--shard-dir", shards, "--checkpoint-dir", "run")
    assert "step 6: loss " in err
    assert "trained 6 steps" in out


def test_a_log_file_that_cannot_be_written_is_refused(run_small: Run, shards: Path) -> None:
    Path("file").touch()
    refused(run_small("--shard-dir", shards, "--log-file", "file/run.log"), "file")
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", [[], ["train"], ["capture"], ["plot"], ["train", "m", "d"]])
def test_every_command_tells_its_version(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):
        assert any_command([*words, "--version"]) == 0
    assert capsys.readouterr().out == f"sae_fast {sae_fast.__version__}\n"
