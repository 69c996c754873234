"""Runs of the command in this process, each in a directory of its own, and their data."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_models import save_model
from small_texts import make_texts
from train_runs import D_IN, SMALL, SMALL_FROM_MODEL, Printed, Run

from sae_fast.activations import write_shard
from sae_fast.train import main
from sae_fast.training import run_directory


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    # Plotting takes longer than these trainings.
    monkeypatch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower with two threads
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command; return its exit code and its output."""

    def command(*arguments: object) -> Printed:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


@pytest.fixture
def run_small(run: Run) -> Run:
    """Run the command with small sizes, which given flags replace."""
    return lambda *arguments: run(*SMALL, *arguments)


@pytest.fixture
def run_on_model(run: Run, inputs: tuple[str, str]) -> Run:
    """Run the command on one of the models and the documents."""

    def command(*flags: str, model: str = "gpt2") -> Printed:
        pool = () if {"ce", "kl"} & set(flags) else ("--pool_rows", "150")
        return run(f"{inputs[0]}/{model}", inputs[1], *SMALL_FROM_MODEL, *pool, *flags)

    return command


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Write two shards and a held-out one."""
    directory = tmp_path / "shards"
    directory.mkdir()
    for number, name in enumerate(("train_00", "train_01", "heldout_00")):
        generator = torch.Generator().manual_seed(number)
        write_shard(directory / f"{name}.h5", torch.randn(300, D_IN, generator=generator))
    return directory


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Make folders of two models, and documents."""
    directory = tmp_path_factory.mktemp("inputs")
    for name in ("gpt2", "bert"):
        save_model(directory / name, name)
    lines = [json.dumps({"text": text, "other": text}) for text in make_texts(120)]
    (directory / "texts.jsonl").write_text("\n".join(lines))
    return str(directory), str(directory / "texts.jsonl")
