"""Settings without an effect on a run, because of its data, length or directory, are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_fast.activations import TensorStream, write_shard
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import RunConfig, SAEConfig, TrainConfig, effects
from sae_fast.config.setting import rules_of
from sae_fast.train import main, parse_arguments
from sae_fast.training import preflight
from sae_fast.training import trainer as trainer_file
from sae_fast.training.trainer import Trainer

D_IN, BATCH, STEPS = 8, 32, 6
ROWS = torch.randn(320, D_IN, generator=torch.Generator().manual_seed(0))
BASE: dict[str, Any] = {"d_sae": 32, "k": 2, "batch_size": BATCH, "max_steps": STEPS}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a directory of shards, one of arrays without names, and a model to start from."""
    monkeypatch.chdir(tmp_path)
    for folder in ("shards", "bare", "bare_targets"):
        Path(folder).mkdir()
    write_shard(Path("shards/train_00.h5"), ROWS)
    np.save("bare/a.npy", ROWS.numpy())
    np.save("bare_targets/a.npy", ROWS.numpy())
    SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=32, k=2)).save("model")


def made(data: str, **settings: Any) -> Trainer:
    """Make a trainer on data of a kind."""
    values = {**BASE, **settings}
    if values.get("arch") == "relu":
        del values["k"]
    given: Any = None
    if data in ("shards", "bare"):
        values["shard_dir"] = data
    else:
        stream = TensorStream(ROWS, batch_size=BATCH)
        given = ROWS if data == "tensor" else stream
    heldout = values.pop("held", None)
    return Trainer(RunConfig(**values), data=given, heldout=heldout, show_progress=False)


IDLE: list[tuple[str, dict[str, Any], str]] = [
    ("source", {"skip_nonfinite": True}, "skip_nonfinite = True needs shards or a tensor"),
    ("source", {"max_norm_multiple": 9.0}, "max_norm_multiple = 9.0 needs shards or a tensor"),
    ("source", {"heldout_fraction": 0.5}, "heldout_fraction = 0.5 needs shards, a tensor or an"),
    ("source", {"shuffle_seed": 3}, "shuffle_seed = 3 needs shards, a tensor or a model"),
    ("bare", {"activations_key": "x"}, "activations_key = 'x' needs shards whose data sets have"),
    (
        "bare",
        {"transcoder": True, "target_shard_dir": "bare_targets", "target_key": "y"},
        "target_key = 'y' needs targets whose data sets have names",
    ),
    ("tensor", {"sparsity_warmup_steps": 2}, "sparsity_warmup_steps = 2 needs a sparsity penalty"),
    (
        "tensor",
        {"arch": "relu", "l1_penalty_coeff": 0.0, "sparsity_warmup_steps": 2},
        "sparsity_warmup_steps = 2 needs a sparsity penalty",
    ),
    ("tensor", {"warmup_steps": STEPS + 1}, "warmup_steps = 7 needs a run that is as long, not "),
    (
        "tensor",
        {"arch": "relu", "sparsity_warmup_steps": STEPS + 1},
        "sparsity_warmup_steps = 7 needs a run that is as long, not ",
    ),
    (
        "tensor",
        {"k_anneal_start": 9, "k_anneal_steps": STEPS + 1},
        "k_anneal_steps = 7 needs a run that is as long, not ",
    ),
    (
        "tensor",
        {"aux_k_coeff": 0.0, "reconstruction_epochs": 0.2},
        "reconstruction_epochs = 0.2 needs another term of the loss",
    ),
    (
        "tensor",
        {"dead_percentage_threshold": 0.1},
        "dead_percentage_threshold = 0.1 needs held-out",
    ),
    *(
        (
            "shards",
            {"start_from": "model", **settings},
            f"{name} = .* needs a training without start",
        )
        for name, settings in {
            "decoder_init": {"decoder_init": "orthogonal"},
            "b_dec_init": {"b_dec_init": "mean"},
        }.items()
    ),
]


@pytest.mark.parametrize(("data", "settings", "message"), IDLE)
def test_a_setting_without_effect_on_a_run_is_refused(
    data: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        made(data, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ("shards", {"pool_rows": 64, "skip_nonfinite": True, "shuffle_seed": 3}),
        ("tensor", {"skip_nonfinite": True, "shuffle_seed": 3, "checkpoint_every": 0}),
        ("tensor", {"arch": "relu", "sparsity_warmup_steps": STEPS, "warmup_steps": STEPS}),
        ("tensor", {"l1_penalty_coeff": 0.1, "sparsity_warmup_steps": 2}),
        ("tensor", {"k_anneal_start": 9, "k_anneal_steps": STEPS}),
        ("tensor", {"sparsity_warmup_steps": 0, "warmup_steps": 0, "reconstruction_epochs": 0.2}),
        ("tensor", {"dead_percentage_threshold": 0.1, "held": ROWS}),
        ("tensor", {"checkpoint_dir": "run", "checkpoint_every": 3, "keep_checkpoints": 5}),
        ("shards", {"start_from": "model"}),
    ],
)
def test_settings_that_have_what_they_need_are_taken(data: str, settings: dict[str, Any]) -> None:
    made(data, **settings).train()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--multi-topk-coeff 0.4", "multi_topk_coeff = 0.4 needs multi_topk"),
        ("--sparsity-warmup-steps 2", "sparsity_warmup_steps = 2 needs a sparsity penalty"),
        ("--warmup-steps 70", "warmup_steps = 70 needs a run that is as long, not "),
        ("--weight-decay 0.1", "weight_decay = 0.1 needs optimizer = 'adamw'"),
        ("--dead-percentage-threshold 0.1", "dead_percentage_threshold = 0.1 needs held-out rows"),
    ],
)
@pytest.mark.parametrize("place", ["line", "file"])
def test_the_command_refuses_it_in_a_line(
    flags: str, message: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--shard-dir", "shards", "--checkpoint-dir", "run"]
    given = [word for name in BASE for word in (f"--{name}", str(BASE[name]))]
    name, value = flags.removeprefix("--").split()
    settings = {name.replace("-", "_"): json.loads(value)}
    Path("settings.json").write_text(json.dumps(settings))
    more = flags.split() if place == "line" else ["--config", "settings.json"]
    assert main([*line, *given, *more]) == 2
    printed = capsys.readouterr()
    (error,) = [text for text in printed.err.splitlines() if text.startswith("error: ")]
    assert message in error
    assert not Path("run/config.json").exists()


def test_a_file_may_leave_what_a_setting_needs_to_the_line() -> None:
    Path("settings.json").write_text(json.dumps({"multi_topk_coeff": 0.4, "weight_decay": 0.1}))
    line = ["--config", "settings.json", "--multi-topk", "--optimizer", "adamw"]
    config = parse_arguments(line)
    assert (config.sae.multi_topk_coeff, config.train.weight_decay) == (0.4, 0.1)
    for missing, name in ((line[:3], "weight_decay"), (line[:2] + line[3:], "multi_topk_coeff")):
        with pytest.raises(ValueError, match=f"{name} = .* needs"):
            parse_arguments(missing)


def test_a_run_that_began_with_a_setting_without_effect_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**BASE, "shard_dir": "shards", "checkpoint_dir": "run", "warmup_steps": 1}
    settings |= {"decay_fraction": 0.0}
    with monkeypatch.context() as older:  # like a version that accepted all settings
        for file in (preflight, trainer_file):
            older.setattr(file, "check_run_effects", lambda *_: None)
        idle = {"multi_topk_coeff": 0.4, "sparsity_warmup_steps": 3, "correlation_pairs": "sum"}
        with effects.unchecked():
            Trainer(RunConfig(**settings, **idle), show_progress=False).train()
    written = json.loads(Path("run/config.json").read_text())
    assert written["sae"]["multi_topk_coeff"] == 0.4
    SparseAutoencoder.from_pretrained("run/checkpoints/latest")
    assert main(["--resume-from", "run", "--max-steps", "8"]) == 0
    config = RunConfig(**{**settings, "max_steps": 10, "resume_from": "latest"})
    Trainer(config, show_progress=False).train()
    going_on = replace(config.train, max_steps=12, sparsity_warmup_steps=3)
    with pytest.raises(ValueError, match="sparsity_warmup_steps = 3 needs a sparsity penalty"):
        Trainer(config.sae, going_on, show_progress=False)


def test_every_setting_that_needs_something_of_a_run_is_tried() -> None:
    needing = {
        name
        for config in (SAEConfig, TrainConfig)
        for name, rules in rules_of(config).items()
        if rules.run_needs is not None or rules.within_run
    }
    tried = {name for _, settings, _ in IDLE for name in settings}
    others = {"decoder_init_norm", "jumprelu_init_threshold", "pool_rows"}
    assert needing - tried == others  # pool_rows: test_train_through_model.py
