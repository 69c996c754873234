"""Training on rows kept in memory: equal bits, planned memory, refusals in one line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training import memory_plan
from sae_fast.training.trainer import Trainer

SAE = SAEConfig(d_sae=64, k=3)
RUN = TrainConfig(
    batch_size=64, max_steps=90, learning_rate=3e-3, pool_rows=700, checkpoint_every=40
)


def test_a_run_that_keeps_the_rows_equals_one_that_does_not(
    shard_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = replace(RUN, shard_dir=str(shard_dir))
    plain = Trainer(SAE, run, show_progress=False).train().state_dict()
    kept = replace(run, keep_in_memory=True, pin=True, checkpoint_dir=str(tmp_path / "run"))
    Trainer(SAE, kept, show_progress=False).train()
    for changes in ({"keep_in_memory": True}, {}):  # from step 40, with and without
        path = str(tmp_path / "run" / "checkpoints" / "step-00000040")
        resumed = replace(run, **changes, resume_from=path)
        trainer = Trainer(SAE, resumed, show_progress=False)
        assert trainer.step == 40
        model = trainer.train().state_dict()
        assert [name for name in plain if not torch.equal(plain[name], model[name])] == []
    assert "other settings" not in caplog.text


def test_rows_that_do_not_fit_are_refused_with_the_flag(
    shard_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(RUN, shard_dir=str(shard_dir), keep_in_memory=True)
    plan = Trainer(SAE, run, show_progress=False).memory_plan
    part = plan.parts["all activations, kept in memory"]
    # The order and six batches are counted beside the 3000 rows of 16 numbers.
    assert 3000 * 16 * 2 <= part <= 3000 * (16 * 4 + 16) + 6 * 64 * 16 * 4
    monkeypatch.setattr(memory_plan, "available_memory", lambda: part)
    with pytest.raises(ValueError, match=r"is available .*; leave out keep_in_memory, or lower"):
        Trainer(SAE, run, show_progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pin": True}, "pin = True needs keep_in_memory"),
        ({"device_cache": True}, "device_cache needs a GPU, got device = 'cpu'"),
        (
            {"device_cache": True, "keep_in_memory": True, "device": "cuda"},
            "keep_in_memory and device_cache: give one of the two",
        ),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RUN, **changes)


@pytest.mark.parametrize(
    "setting",
    [
        {"keep_in_memory": True},
        {"shard_dir": "elsewhere"},
        {"mix": ("one:1", "two:1")},
        {"heldout": "heldout.h5"},
        {"activations_key": "acts"},
        {"repeated_rows": "drop"},
    ],
)
def test_settings_of_shards_are_refused_beside_given_data(
    activations: torch.Tensor, setting: dict[str, Any]
) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name} = .* is for shards, not for given data"):
        Trainer(SAE, replace(RUN, **setting), activations, show_progress=False)


def test_heldout_rows_are_given_once(activations: torch.Tensor, shard_dir: Path) -> None:
    run = replace(RUN, shard_dir=str(shard_dir), heldout="heldout.h5")
    with pytest.raises(ValueError, match="and a tensor: give one of the two"):
        Trainer(SAE, run, heldout=activations, show_progress=False)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch finds none")
def test_a_run_on_rows_kept_on_the_gpu_equals_one_from_disk(shard_dir: Path) -> None:
    run = replace(RUN, shard_dir=str(shard_dir), device="cuda")
    plain = Trainer(SAE, run, show_progress=False).train().state_dict()
    trainer = Trainer(SAE, replace(run, device_cache=True), show_progress=False)
    assert trainer.memory_plan.parts["all activations, kept on the GPU"] > 3000 * 16 * 2
    model = trainer.train().state_dict()
    assert [name for name in plain if not torch.equal(plain[name], model[name])] == []
