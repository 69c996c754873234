"""`--mix`: trained, stopped and resumed bit-equal, held-out rows of every directory, bad input."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import warm_python
from safetensors.torch import load_file
from train_runs import PATIENCE

from sae_fast.activations import ShardMetadata, write_shard
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.train import main
from sae_fast.training.trainer import Trainer

SMALL = (
    *("--d-sae", "32", "--k", "2", "--batch-size", "32", "--lr", "1e-2", "--pool-rows", "90"),
    *("--log-every", "2", "--eval-every", "4", "--checkpoint-every", "3", "--num-threads", "1"),
)


@pytest.fixture
def directories(tmp_path: Path) -> tuple[str, str]:
    """Write two directories of different sizes, each with held-out rows."""
    for number, (name, rows) in enumerate((("a", 400), ("b", 60))):
        generator = torch.Generator().manual_seed(number)
        metadata = ShardMetadata(model="gpt2", hook="layers.3")
        (tmp_path / name).mkdir()
        for file, count in (("train_00", rows), ("heldout_00", 20 + number)):
            x = torch.randn(count, 8, generator=generator) + 3 * number
            write_shard(tmp_path / name / f"{file}.h5", x, dtype="float32", metadata=metadata)
    return "a", "b"


def final(run: str) -> dict[str, torch.Tensor]:
    return load_file(f"{run}/checkpoints/latest/sae.safetensors")


@pytest.mark.slow
def test_a_mix_trains_and_a_resumed_run_ends_bit_equal(directories, capsys):
    flags = (*SMALL, "--mix", "a:0.7", "b:0.3")
    assert main([*flags, "--max-steps", "24", "--checkpoint-dir", "one"]) == 0
    printed = capsys.readouterr()
    # 400 rows at 0.7 a row are an epoch of 571, in which b is served 2.9 times.
    assert "mixing 70 % from a (400 rows, 1.0 passes an epoch)" in printed.err
    assert "mixing 30 % from b (60 rows, 2.9 passes an epoch)" in printed.err
    assert "571 rows, 24 steps" in printed.out
    two = TrainConfig.load("one/config.json")
    two = TrainConfig.from_dict({**two.to_dict(), "checkpoint_dir": "two"})
    trainer = Trainer(SAEConfig.load("one/config.json"), two, show_progress=False)
    with contextlib.suppress(KeyboardInterrupt), trainer:
        while trainer.step < 10:
            trainer.advance()
        raise KeyboardInterrupt
    assert Path("two/checkpoints/latest").resolve().name == "step-00000009"
    assert main(["--resume-from", "latest", "--checkpoint-dir", "two"]) == 0
    expected, found = final("one"), final("two")
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_held_out_rows_of_every_directory_are_evaluated_on(directories):
    config = TrainConfig(mix=("a:1", "b:3"), batch_size=16)
    trainer = Trainer(SAEConfig(d_sae=16, k=2), config, show_progress=False)
    assert sum(len(batch) for batch in trainer.data.heldout) == 20 + 21
    mean = trainer.sae.activation_mean.mean()
    assert float(mean) == pytest.approx(0.75 * 3, abs=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mix", "a:0.7", "b"], "mix must name directories as DIR:WEIGHT, .* got 'b'"),
        (["--mix", "a:0.7", "b:x"], "DIR:WEIGHT, .* got 'b:x'"),
        (["--mix", "a:0.7", "b:-1"], "DIR:WEIGHT, .* got 'b:-1'"),
        (["--mix", "a:0", "b:1"], "DIR:WEIGHT, .* got 'a:0'"),
        (["--mix", "a:1/0", "b:1"], "DIR:WEIGHT, .* got 'a:1/0'"),
        (["--mix", ":1"], "DIR:WEIGHT, .* got ':1'"),
        (["--mix"], "--mix needs values, got none"),
        (["--mix", "a:1", "./a:1"], "mix: ./a is named twice, the first time as a"),
        (["--mix", "a:1", "nowhere:1"], "nowhere: no such directory or file"),
        (["--mix", "a:1", "b:1", "--shard-dir", "a"], "shard_dir must be left out where mix is"),
        (["--mix", "a:1", "other:1"], "other/train_00.h5: is of hook 'layers.9'"),
        (["--mix", "a:1", "b:1", "--heldout", "other"], "other/train_00.h5: is of hook"),
        (["--mix", "a:1", "b:1", "--probe-labels", "l", "--probe-loss-coeff", "1"], "no dataset"),
    ],
)
def test_a_bad_mix_is_one_line(directories, tmp_path, capsys, flags, message):
    (tmp_path / "other").mkdir()
    metadata = ShardMetadata(model="gpt2", hook="layers.9")
    write_shard(tmp_path / "other" / "train_00.h5", torch.randn(9, 8), metadata=metadata)
    with pytest.raises(ValueError, match=message):
        parse_and_make(flags)
    assert main([*SMALL, *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")


def parse_and_make(flags: list[str]) -> None:
    from sae_fast.train import parse_arguments

    config = parse_arguments([*SMALL, *flags])
    Trainer(config.sae, config.train, show_progress=False)


def test_other_weights_on_resume_are_one_line(directories, capsys):
    flags = (*SMALL, "--max-steps", "3", "--checkpoint-dir", "run", "--mix")
    assert main([*flags, "a:0.7", "b:0.3"]) == 0
    assert main([*flags, "a:0.6", "b:0.4", "--resume-from", "latest"]) == 2
    assert "the mix has other weights" in capsys.readouterr().err


def test_a_sweep_reads_a_mix_once_and_ends_where_each_training_alone_does(directories):
    flags = (*SMALL, "--mix", "a:0.7", "b:0.3", "--max-steps", "12")
    Path("sweep.json").write_text(json.dumps({"learning_rate": [1e-2, 3e-3]}))
    swept = (*flags, "--keep-in-memory", "--checkpoint-dir", "runs", "--sweep", "sweep.json")
    assert main(swept) == 0
    for rate in ("0.01", "0.003"):
        assert main([*flags, "--lr", rate, "--checkpoint-dir", rate]) == 0
        expected, found = final(rate), final(f"runs/learning_rate_{rate}")
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.slow
def test_a_killed_run_goes_on_from_disk_or_from_memory(directories):
    flags = (*SMALL, "--mix", "a:0.7", "b:0.3", "--max-steps", "150")
    assert main([*flags, "--checkpoint-dir", "straight"]) == 0
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = ["-m", "sae_fast.train", *flags, "--checkpoint-dir", "killed"]
    for number, way in enumerate((["--keep-in-memory"], [])):
        resumed = ["--resume-from", "latest"] if number else []
        process = warm_python.Process([*command, *way, *resumed], env=environment)
        target = (number + 1) * 9
        until = time.monotonic() + PATIENCE
        while process.poll() is None and _newest_step() < target and time.monotonic() < until:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert target <= _newest_step() < 150
    assert main([*flags, "--checkpoint-dir", "killed", "--resume-from", "latest"]) == 0
    expected, found = final("straight"), final("killed")
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def _newest_step() -> int:
    steps = [path.name for path in Path("killed/checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in steps), default=-1)
