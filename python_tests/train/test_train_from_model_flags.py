"""`python -m sae_fast.train MODEL DATASET`: the flags of a training that it accepts."""

import json
import re
from pathlib import Path

import pytest
from train_runs import Run, refused

from sae_fast.config import TrainConfig
from sae_fast.config.fields import field_names
from sae_fast.config.setting import rules_of
from sae_fast.train import main
from sae_fast.training.sweep import Sweep
from sae_fast.training.trainer import Trainer

SHARDS_ONLY = [name for name, rules in rules_of(TrainConfig).items() if rules.shards_only]
DECIDED_BY = {name for name, rules in rules_of(TrainConfig).items() if rules.decided_by}
# A value other than the default for every flag of a training that this mode accepts.
TAKEN = {
    "pool_rows": 70,
    "grad_acc_steps": 2,
    "max_steps": 3,
    "reconstruction_epochs": 0.1,
    "learning_rate": 0.25,
    "warmup_steps": 2,
    "sparsity_warmup_steps": 1,
    "k_anneal_start": 8,
    "k_anneal_steps": 2,
    "decay_fraction": 0.5,
    "optimizer": "adamw",
    "betas": (0.5, 0.75),
    "eps": 0.5,
    "weight_decay": 0.125,
    "grad_clip": 2.0,
    "average_decay": 0.5,
    "fused": False,
    "amp": "bf16",
    "device": "cpu",
    "cuda_graph": False,
    "num_threads": 1,
    "log_every": 3,
    "eval_every": 7,
    "eval_metrics": 3,
    "dead_percentage_threshold": 0.25,
    "keep_checkpoints": 2,
    "best_by": "fvu",
    "checkpoint_dir": "place",
    "checkpoint_minutes": 9.0,
    "max_hours": 2.0,
    "logger": ("wandb", "tensorboard"),
    "wandb_project": "project",
    "wandb_entity": "team",
    "wandb_tags": ("one", "two"),
    "no_wandb": True,
}
# Also accepted, with other settings than above.
TAKEN_ELSEWHERE = {
    "mesh",
    "mesh_timeout",
    "start_from",
    "start_from_elsewhere",
    "wandb_name",
    "wandb_group",
    "resume_from",
    "momentum",
    "optimizer_states",
}


def spelt(name: str, value: object) -> list[str]:
    flag = f"--{name}" if value is not False else f"--no_{name}"
    words = value if isinstance(value, tuple) else [] if isinstance(value, bool) else [value]
    return [flag, *map(str, words)]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """Collect the trainings instead of running them."""
    made: list[Trainer] = []

    def no_steps(sweep: Sweep) -> None:
        made.extend(sweep.trainers.values())
        raise ValueError("enough")

    monkeypatch.setattr(Sweep, "train", no_steps)
    return made


def test_every_setting_of_a_training_is_taken_or_refused() -> None:
    groups = [set(TAKEN), TAKEN_ELSEWHERE, set(SHARDS_ONLY), DECIDED_BY]
    names = set(field_names(TrainConfig))
    assert set.union(*groups) == names
    assert sum(map(len, groups)) == len(names)


def test_settings_that_are_taken_reach_every_training(
    inputs: tuple[str, str], opened: list[Trainer]
) -> None:
    flags = [word for name, value in TAKEN.items() for word in spelt(name, value)]
    sizes = ["--k", "4", "--d_sae", "32", "--ctx_len", "16", "--max_tokens", "640"]
    sizes += ["--l1_penalty_coeff", "0.1"]  # the warm-up of penalties needs a penalty
    layers = ["--layers", "0", "1", "--heldout_tokens", "64"]
    assert main([f"{inputs[0]}/gpt2", inputs[1], *flags, *sizes, *layers]) == 2
    assert len(opened) == 2
    for trainer, hook in zip(opened, ("residual.0", "residual.1"), strict=True):
        expected = {**TAKEN, "checkpoint_dir": f"place/{hook}"}
        assert {name: getattr(trainer.train_config, name) for name in TAKEN} == expected


@pytest.mark.parametrize("name", [*SHARDS_ONLY, "seed"])
def test_settings_of_shards_are_refused(run_on_model: Run, name: str) -> None:
    kinds = {"mix": ["nowhere:1"], "max_epochs": ["2"], "seed": ["3"]}
    switch = isinstance(getattr(TrainConfig, name), bool)
    values = [] if switch else kinds.get(name, ["nowhere"])
    refused(run_on_model(f"--{name.replace('_', '-')}", *values), name.replace("_", "-"), "shards")
    assert not Path("output").exists()


def test_a_file_with_settings_of_shards_is_refused(run_on_model: Run) -> None:
    Path("run.json").write_text(json.dumps({"shard_dir": "nowhere", "k": 4}))
    line = refused(run_on_model("--config", "run.json"), "shard_dir = 'nowhere'")
    assert "MODEL computes the activations" in line


def test_a_file_gives_what_the_line_leaves_open(run_on_model: Run, opened: list[Trainer]) -> None:
    given = {"max_tokens": 320, "seed": 7, "shuffle_seed": 8, "checkpoint_every": 9}
    Path("run.json").write_text(json.dumps(given))
    assert run_on_model("--config", "run.json", "--shuffle_seed", "5")[0] == 2
    train = opened[0].train_config
    assert (train.seed, train.order_seed) == (7, 5)
    # run_on_model sets the tokens and the interval of the checkpoints.
    assert (train.max_tokens, train.checkpoint_every, train.batch_size) == (640, 4, 64)


def test_the_number_of_latents_overrides_the_expansion_factor(
    inputs: tuple[str, str], opened: list[Trainer]
) -> None:
    flags = ["--num_latents", "48", "--expansion_factor", "16", "--k", "4", "--ctx_len", "16"]
    assert main([f"{inputs[0]}/gpt2", inputs[1], *flags, "--heldout_tokens", "0"]) == 2
    assert opened[0].sae_config.d_sae == 48


@pytest.mark.parametrize("optimizer", [(), ("--optimizer", "adam"), ("--optimizer", "adamw")])
def test_a_weight_decay_goes_with_adam(
    run_on_model: Run, opened: list[Trainer], optimizer: tuple[str, ...]
) -> None:
    assert run_on_model("--weight_decay", "0.01", *optimizer)[0] == 2
    train = opened[0].train_config
    assert (train.optimizer, train.weight_decay) == ("adamw", 0.01)


def test_a_stride_of_one_beside_layers_is_accepted(
    run_on_model: Run, opened: list[Trainer]
) -> None:
    assert run_on_model("--layers", "2", "--layer_stride", "1", "--run_name", "r")[0] == 2
    assert [trainer.train_config.checkpoint_dir for trainer in opened] == ["output/r/residual.2"]
    refused(run_on_model("--layers", "2", "--layer_stride", "2"), "layer_stride chooses layers")


def test_two_names_of_a_run_are_refused(run_on_model: Run) -> None:
    refused(run_on_model("--run_name", "r", "--checkpoint_dir", "d"), "checkpoint_dir and run_name")


def test_help_shows_all_flags_of_this_mode_with_their_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["model", "dataset", "--help-all"])
    assert stop.value.code == 0
    parts = re.split(r"\n(?=  --)", capsys.readouterr().out.replace("\n      ", " "))
    for flag, default in {
        "k": "here: 192",
        "expansion-factor": "here: 32",
        "max-tokens": ": 1000000",
        "batch-sequences": ": 4",
        "grad-acc-steps": ": 1",
        "optimizer": ": adam",
        "weight-decay": ": 0.0",
        "loss-fn": ": mse",
        "dead-percentage-threshold": "here: 0.0005; on shards: 0.0",
        "init-seeds": ": 42",
    }.items():
        (part,) = [part for part in parts if re.match(rf"  --{flag}[ ,]", part)]
        assert f"(default{' ' * default.startswith('here')}{default})" in part, part
    text = "\n".join(parts)
    assert "default: a twentieth of the run, at most 10,000,000" in text
    for flag in ("--layers", "--num-latents", "--dead-feature-threshold", "--config", "--sweep"):
        assert re.search(rf"{flag}\b", text)
    for name in SHARDS_ONLY:
        assert not re.search(rf"--{name.replace('_', '-')}\b(?!-)", text), name


@pytest.mark.parametrize("place", [[], ["model", "dataset"]])
def test_help_is_one_screen(
    place: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        main([*place, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 41
    assert max(map(len, lines)) <= 100
