"""`python -m sae_fast.train`: the parsing of flags, and refusals in one line."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from train_runs import Run, refused

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.train import main, parse_arguments


@pytest.mark.parametrize(
    "flags",
    [
        "--shard-dir x --expansion-factor 4 --lr 0.1 --max-tokens 9 --grad-clip 2",
        "--shard_dir x --expansion_factor 4 --learning_rate 0.1 --max_tokens 9 --grad_clip 2",
        "--shard-dir=x --expansion_factor=4 --learning-rate=0.1 --max-tokens=9 --grad_clip=2",
    ],
)
def test_both_spellings_and_the_alias_mean_the_same(flags: str) -> None:
    config = parse_arguments(flags.split())
    assert config.sae == SAEConfig(expansion_factor=4.0)
    assert config.train == TrainConfig(
        shard_dir="x",
        learning_rate=0.1,
        max_tokens=9,
        grad_clip=2.0,
        checkpoint_dir="runs/topk-1",
    )


@pytest.mark.parametrize(
    ("flags", "amp"),
    [("--use-amp", "bf16"), ("--use_amp --k 3", "bf16"), ("--use-amp fp16", "fp16"), ("", "off")],
)
def test_use_amp_is_a_switch_or_another_name_of_amp(flags: str, amp: str) -> None:
    assert parse_arguments(flags.split()).train.amp == amp


def test_other_names_of_sizes_are_understood() -> None:
    sae = parse_arguments(["--input-dim", "5", "--num_latents=7", "--k", "2"]).sae
    assert (sae.d_in, sae.d_sae) == (5, 7)


@pytest.mark.parametrize("nested", [True, False])
def test_the_command_line_wins_over_the_file(tmp_path: Path, nested: bool) -> None:
    sae, train = {"k": 5, "num_latents": 9}, {"lr": 0.5, "batch_size": 3, "no_wandb": True}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"sae": sae, "train": train} if nested else {**sae, **train}))
    config = parse_arguments(["--batch-size", "4", "--config", str(path)])
    assert (config.sae.k, config.sae.d_sae) == (5, 9)
    assert (config.train.learning_rate, config.train.batch_size) == (0.5, 4)
    assert config.train.no_wandb is True


def test_the_full_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help-all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for config in (SAEConfig, TrainConfig):
        for field in fields(config):
            assert f"--{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--k abc", "--k"),
        ("--batch-size", "--batch-size"),
        ("--learning-rate fast", "--learning-rate"),
        ("--lr", "--learning-rate"),
        ("--bach-size 3", "--bach-size"),
        ("--amp fp8", "--amp"),
        ("--betas 0.9", "--betas"),
        ("--k 0", "k must be at least 1, got 0"),
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        ("--d-in 4 --d-sae 3 --k 4", "k must be at most d_sae = 3, got 4"),
        ("--config missing.json", "missing.json"),
        ("--resume-from nowhere", "nowhere"),
        ("--resume-from latest", "--checkpoint-dir RUN"),
        ("--probe-loss-coeff -1", "probe_loss_coeff"),
    ],
)
def test_a_bad_flag_is_named(run: Run, flags: str, named: str) -> None:
    refused(run(*flags.split()), named)


def test_an_unknown_key_of_a_file_is_named(run_small: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"batch_sise": 3}')
    refused(run_small("--config", tmp_path / "bad.json"), "bad.json", "batch_sise", "batch_size")
