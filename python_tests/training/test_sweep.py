"""Sweeps: equal to separate trainings, resumed at one step, each batch read once."""

import contextlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_fast import Callback, LossTerm
from sae_fast.activations import ActivationStream, Rows, TensorStream, Transform, write_shard
from sae_fast.activations.shared import SharedSource
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.training.metrics import Row
from sae_fast.training.sweep import Sweep, read_sweep
from sae_fast.training.trainer import Trainer

TIMES = ("tokens_per_second", "time_per_step_ms", "reader_stall_fraction")
DIFFERENT: list[dict[str, Any]] = [
    {"name": "topk", "k": 2},
    {"name": "seed", "k": 2, "seed": 5},
    {"name": "relu", "arch": "relu", "l1_penalty_coeff": 0.05, "optimizer": "signum"},
    {"name": "raw", "normalize_activations": "none", "k": 3, "expansion_factor": 2},
]


@pytest.fixture
def base(tmp_path: Path, shard_dir: Path) -> RunConfig:
    train = TrainConfig(
        shard_dir=str(shard_dir),
        checkpoint_dir=str(tmp_path / "sweep"),
        batch_size=64,
        max_steps=24,
        pool_rows=512,
        seed=3,
        lr=1e-2,
        log_every=3,
        eval_every=8,
        checkpoint_every=5,
    )
    return RunConfig(sae=SAEConfig(d_sae=32), train=train)


def _read(tmp_path: Path, base: RunConfig, content: Any) -> dict[str, RunConfig]:
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(content))
    return read_sweep(path, base)


def _rows(trainer: Trainer) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in TIMES} for row in trainer.history
    ]


def _assert_same(one: Trainer, other: Trainer) -> None:
    expected, found = one.model().state_dict(), other.model().state_dict()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert _rows(one) == _rows(other)


def test_progress_lines_of_several_trainings_say_that_they_are_means(
    tmp_path: Path, base: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for values, words in (
        ([2, 3], "step 24: mean of 2 trainings: loss "),
        ([2], "step 24: loss "),
    ):
        caplog.clear()
        train = replace(base.train, checkpoint_dir=None)
        configs = _read(tmp_path, RunConfig(sae=base.sae, train=train), {"k": values})
        with caplog.at_level("INFO", logger="sae_fast"):
            Sweep(configs).train()
        (line,) = [line for line in caplog.messages if line.startswith("step 24")]
        assert line.startswith(words)


def test_a_sweep_in_inference_mode_is_to_the_bit_what_it_is_outside(
    tmp_path: Path, base: RunConfig
) -> None:
    train = replace(base.train, checkpoint_dir=None)
    configs = _read(tmp_path, RunConfig(sae=base.sae, train=train), {"k": [2, 3]})
    expected = Sweep(configs, show_progress=False).train()
    with torch.inference_mode():
        found = Sweep(configs, show_progress=False).train()
    for name, model in expected.items():
        assert all(map(torch.equal, model.state_dict().values(), found[name].state_dict().values()))


@pytest.mark.slow
def test_each_training_is_to_the_bit_what_it_is_alone(tmp_path: Path, base: RunConfig) -> None:
    configs = _read(tmp_path, base, DIFFERENT)
    sweep = Sweep(configs, show_progress=False)
    models = sweep.train()
    assert list(models) == ["topk", "seed", "relu", "raw"]
    for name, config in configs.items():
        train = replace(config.train, checkpoint_dir=str(tmp_path / "alone" / name))
        alone = Trainer(config.sae, train, show_progress=False)
        alone.train()
        _assert_same(alone, sweep.trainers[name])
        assert models[name] is sweep.trainers[name].model()


def square_loss(sae: Any, batch: Any, code: Any, x_hat: torch.Tensor) -> torch.Tensor:
    return x_hat.square().mean()


class StopsOne(Callback):
    def __init__(self, step: int) -> None:
        self.step, self.seen, self.errors = step, [], []  # type: ignore[var-annotated]

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.seen.append((trainer.sae_config.k, trainer.step))
        if trainer.step == self.step and trainer.sae_config.k == 1:
            trainer.stop()

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        self.errors.append(error)


def test_loss_terms_and_callbacks_are_of_every_training(tmp_path: Path, base: RunConfig) -> None:
    configs = _read(tmp_path, base, {"k": [1, 2]})
    terms = [LossTerm("square", square_loss, 0.3)]
    stopper = StopsOne(step=4)
    stopped = Sweep(configs, loss_terms=terms, callbacks=[stopper], show_progress=False)
    assert len(stopped.train()) == 2
    assert stopper.seen == [(k, step) for step in range(1, 5) for k in (1, 2)]
    assert stopper.errors == [None, None]
    again = replace(base, train=replace(base.train, resume_from="latest"))
    resumed = Sweep(_read(tmp_path, again, {"k": [1, 2]}), loss_terms=terms, show_progress=False)
    resumed.train()
    for name, config in configs.items():
        train = replace(config.train, checkpoint_dir=str(tmp_path / "alone" / name))
        alone = Trainer(config.sae, train, loss_terms=terms, show_progress=False)
        alone.train()
        assert alone.history[-1]["square"] > 0
        _assert_same(alone, resumed.trainers[name])


def test_a_loop_of_a_sweep_ends_where_one_training_is_stopped(
    tmp_path: Path, base: RunConfig
) -> None:
    with Sweep(
        _read(tmp_path, base, {"k": [1, 2]}), callbacks=[StopsOne(2)], show_progress=False
    ) as sweep:
        while not sweep.is_done:
            sweep.advance()
        assert [trainer.step for trainer in sweep.trainers.values()] == [2, 2]
        with pytest.raises(RuntimeError, match=r"cannot advance: k_1 was stopped"):
            sweep.advance()


def test_loss_terms_beside_make_are_refused(tmp_path: Path, base: RunConfig) -> None:
    def make(name: str, config: RunConfig) -> Trainer:
        return Trainer(config, show_progress=False)

    terms = [LossTerm("square", square_loss)]
    with pytest.raises(ValueError, match="must be left out beside make"):
        Sweep(_read(tmp_path, base, {"k": [1]}), make, loss_terms=terms, show_progress=False)


@pytest.mark.slow
def test_labels_and_sequences_that_one_training_needs_are_read_for_all(
    tmp_path: Path, base: RunConfig, activations: torch.Tensor
) -> None:
    rule = (activations[:, 0] > 0).long()
    doc_id = torch.arange(len(activations)) // 50
    directory = tmp_path / "labelled"
    directory.mkdir()
    write_shard(directory / "a.h5", activations, labels={"rule": rule}, doc_id=doc_id)
    base = replace(base, train=replace(base.train, shard_dir=str(directory)))
    content: list[dict[str, Any]] = [
        {"name": "probed", "probe_loss_coeff": 0.1, "probe_labels": "labels/rule"},
        {"name": "smooth", "temporal_smoothness_coeff": 0.1},
        {"name": "plain", "k": 2},
    ]
    configs = _read(tmp_path, base, content)
    sweep = Sweep(configs, show_progress=False)
    sweep.train()
    config = configs["smooth"]
    train = replace(config.train, checkpoint_dir=str(tmp_path / "alone"))
    alone = Trainer(config.sae, train, show_progress=False)
    alone.train()
    _assert_same(alone, sweep.trainers["smooth"])
    last = {name: trainer.history[-1] for name, trainer in sweep.trainers.items()}
    assert last["probed"]["probe_loss"] > 0
    assert last["smooth"]["temporal_loss"] > 0
    assert "probe_loss" not in last["plain"]


@pytest.mark.slow
def test_batches_are_read_once(
    tmp_path: Path, base: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []
    next_rows = ActivationStream.next_rows

    def counted(self: ActivationStream) -> Rows:
        served.append(self)
        return next_rows(self)

    monkeypatch.setattr(ActivationStream, "next_rows", counted)
    sweep = Sweep(_read(tmp_path, base, {"k": [1, 2], "seed": [0, 1, 2]}), show_progress=False)
    sweep.train()
    assert [trainer.step for trainer in sweep.trainers.values()] == [24] * 6
    assert len(served) == 24  # batches read by the starts were kept for the steps
    assert len(set(map(id, served))) == 1


def _stop_after(step: int, configs: dict[str, RunConfig], *, saves: bool) -> None:
    """Train to `step` and save as after a signal, or end without saving as after a kill."""
    sweep = Sweep(configs, show_progress=False)
    with contextlib.suppress(InterruptedError), sweep:
        while any(trainer.step < step for trainer in sweep.trainers.values()):
            sweep.advance()
        if not saves:
            raise InterruptedError


@pytest.mark.slow
@pytest.mark.parametrize("saves", [True, False], ids=["signal", "kill"])
def test_stopped_sweeps_end_bit_equal(tmp_path: Path, base: RunConfig, saves: bool) -> None:
    configs = _read(tmp_path, base, DIFFERENT[1:])
    straight = Sweep(configs, show_progress=False)
    straight.train()
    again = replace(base, train=replace(base.train, checkpoint_dir=str(tmp_path / "again")))
    configs = _read(tmp_path, again, DIFFERENT[1:])
    for step in (4, 13):
        _stop_after(step, configs, saves=saves)
        again = replace(again, train=replace(again.train, resume_from="latest"))
        configs = _read(tmp_path, again, DIFFERENT[1:])
    resumed = Sweep(configs, show_progress=False)
    assert {trainer.step for trainer in resumed.trainers.values()} == {13 if saves else 10}
    resumed.train()
    for name, trainer in straight.trainers.items():
        _assert_same(trainer, resumed.trainers[name])


def test_runs_killed_between_their_checkpoints_go_on_from_the_common_one(
    tmp_path: Path, base: RunConfig
) -> None:
    configs = _read(tmp_path, base, {"k": [1, 2]})
    straight = Sweep(configs, show_progress=False)
    straight.train()
    # As if killed when the first had saved step 24 and the second had not.
    store = tmp_path / "sweep" / "k_2" / "checkpoints"
    shutil.rmtree(store / "step-00000024")
    (store / "latest").unlink()
    (store / "latest").symlink_to("step-00000020")
    again = replace(base, train=replace(base.train, resume_from="latest"))
    resumed = Sweep(_read(tmp_path, again, {"k": [1, 2]}), show_progress=False)
    assert {trainer.step for trainer in resumed.trainers.values()} == {20}
    resumed.train()
    for name, trainer in straight.trainers.items():
        assert torch.equal(trainer.sae.W_dec, resumed.trainers[name].sae.W_dec)


def test_a_training_of_a_sweep_goes_on_alone(tmp_path: Path, base: RunConfig) -> None:
    configs = _read(tmp_path, base, {"k": [1, 2]})
    _stop_after(7, configs, saves=True)
    config = configs["k_2"]
    alone = Trainer(config.sae, replace(config.train, resume_from="latest"), show_progress=False)
    assert alone.step == 7
    alone.train()
    whole = replace(config.train, checkpoint_dir=str(tmp_path / "whole"))
    straight = Trainer(config.sae, whole, show_progress=False)
    straight.train()
    _assert_same(straight, alone)


def test_runs_without_a_common_checkpoint_are_refused(tmp_path: Path, base: RunConfig) -> None:
    configs = _read(tmp_path, base, {"k": [1]})
    _stop_after(7, configs, saves=True)
    again = replace(base, train=replace(base.train, resume_from="latest"))
    with pytest.raises(ValueError, match=r"no step has a checkpoint in all of the runs.*k_2 \[\]"):
        Sweep(_read(tmp_path, again, {"k": [1, 2]}), show_progress=False)
    best = replace(base, train=replace(base.train, resume_from="best"))
    with pytest.raises(ValueError, match="resume_from must be 'latest'"):
        Sweep(_read(tmp_path, best, {"k": [1]}), show_progress=False)


def test_a_damaged_checkpoint_of_one_run_is_noticed(tmp_path: Path, base: RunConfig) -> None:
    _stop_after(7, _read(tmp_path, base, {"k": [1, 2]}), saves=True)
    damaged = tmp_path / "sweep" / "k_2" / "checkpoints" / "step-00000007" / "sae.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = replace(base, train=replace(base.train, resume_from="latest"))
    with pytest.raises(ValueError, match="must be at the same step, got k_1 at step 7, k_2 at st"):
        Sweep(_read(tmp_path, again, {"k": [1, 2]}), show_progress=False)


def test_names_directories_and_settings(tmp_path: Path, base: RunConfig) -> None:
    configs = _read(tmp_path, base, {"k": [1, 2], "lr": [1e-3, 0.5], "betas": [[0.5, 0.9]]})
    assert list(configs)[:2] == ["k_1-lr_0.001-betas_0.5,0.9", "k_1-lr_0.5-betas_0.5,0.9"]
    last = configs["k_2-lr_0.5-betas_0.5,0.9"]
    assert (last.sae.k, last.train.learning_rate, last.train.betas) == (2, 0.5, (0.5, 0.9))
    assert last.train.checkpoint_dir == str(tmp_path / "sweep" / "k_2-lr_0.5-betas_0.5,0.9")
    (seeded,) = _read(tmp_path, base, [{"seed": 9, "expansion_factor": 4}]).values()
    assert (seeded.train.seed, seeded.train.order_seed) == (9, 3)
    assert (seeded.sae.expansion_factor, seeded.sae.d_sae) == (4, 0)


def test_trainings_of_other_architectures_take_their_own_defaults(tmp_path: Path) -> None:
    base = RunConfig(sae=SAEConfig(d_in=16), train=TrainConfig())
    configs = _read(tmp_path, base, {"arch": ["topk", "relu", "jumprelu"]})
    assert [config.sae for config in configs.values()] == [
        SAEConfig(d_in=16, arch="topk"),
        SAEConfig(d_in=16, arch="relu"),
        SAEConfig(d_in=16, arch="jumprelu"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must hold an object of lists, or a list of objects"),
        (3, "must hold an object of lists"),
        ({"k": 3}, "k must be a list of values, got 3"),
        ({"k": []}, "k must be a list of values"),
        ([3], "training 1 must be an object, got 3"),
        ([{"k": 1}, {"k": 1}], "two trainings have the name 'k_1'"),
        ([{"name": "../k", "k": 1}], r"training 1 needs a name of letters.*got '\.\./k'"),
        ([{"name": "..", "k": 1}], r"training 1 needs a name"),
        ([{}], "training 1 needs a name"),
        ([{"kk": 1}], r"kk_1: unknown key 'kk'"),
        ([{"k": 0}], "k_0: k must be at least 1, got 0"),
        ([{"batch_size": 8}], "batch_size is the same for all trainings of a sweep"),
        ([{"shard_dir": "x", "name": "x"}], "shard_dir is the same for all"),
    ],
)
def test_a_bad_sweep_file_is_refused(
    tmp_path: Path, base: RunConfig, content: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _read(tmp_path, base, content)
    assert "sweep.json" in str(caught.value)


def test_a_sweep_file_that_is_none(tmp_path: Path, base: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json: cannot be read as JSON"):
        read_sweep(tmp_path / "nowhere.json", base)
    (tmp_path / "half.json").write_text("{")
    with pytest.raises(ValueError, match=r"half\.json: not a JSON file"):
        read_sweep(tmp_path / "half.json", base)


def test_the_training_that_is_wrong_is_named(tmp_path: Path, base: RunConfig) -> None:
    with pytest.raises(ValueError, match="k_40: k must be at most"):
        Sweep(_read(tmp_path, base, {"k": [1, 40]}), show_progress=False)


# ---- the shared source -------------------------------------------------------------------------


def _stream(rows: torch.Tensor) -> TensorStream:
    return TensorStream(rows, batch_size=4, seed=1)


def _identity(rows: Rows) -> Rows:
    return rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32))
def test_readers_in_any_order_get_what_the_source_alone_gives(readers: int, seed: int) -> None:
    rows = torch.arange(40.0).reshape(20, 2)
    alone, shared = _stream(rows), SharedSource(_stream(rows), readers)
    expected = [alone.next_batch() for _ in range(12)]
    taken = [0] * readers
    parts = [shared.reader(_identity, 2, {}) for _ in range(readers)]
    positions: list[list[dict[str, Any]]] = [[part.state_dict()] for part in parts]
    pick = random.Random(seed)
    while min(taken) < 10:
        turn = pick.randrange(readers)
        if taken[turn] > min(taken) + 1:
            # Back to the position of the slowest, as at the start of a training.
            taken[turn] = min(taken)
            parts[turn].load_state_dict(positions[turn][taken[turn]])
            del positions[turn][taken[turn] + 1 :]
            continue
        assert torch.equal(parts[turn].next_batch(), expected[taken[turn]])
        taken[turn] += 1
        positions[turn].append(parts[turn].state_dict())
        assert parts[turn].tokens_served == 4 * taken[turn]


def test_readers_with_one_transform_share_its_result() -> None:
    rows = torch.randn(20, 2)
    shared = SharedSource(_stream(rows), 3)
    known = Transform(torch.ones(2), 0.5)
    one, two = (shared.reader(_identity, 2, {}) for _ in range(2))
    for reader in (one, two):
        reader.set_transform(Transform(known.mean.clone(), known.scale))
    raw = shared.reader(_identity, 2, {})
    first, second, third = one.next_batch(), two.next_batch(), raw.next_batch()
    assert first is second
    assert torch.equal(first, (third - 1) * 0.5)
    alone = TensorStream(rows, batch_size=4, seed=1, transform=known)
    assert torch.equal(first, alone.next_batch())


def test_a_reader_left_behind_by_a_new_position_is_told(tmp_path: Path) -> None:
    shared = SharedSource(_stream(torch.randn(20, 2)), 2)
    one, two = shared.reader(_identity, 2, {}), shared.reader(_identity, 2, {})
    later = _stream(torch.randn(20, 2))
    one.next_batch()
    state = {**one.state_dict(), "tokens": 12}
    assert later.state_dict().keys() == state.keys()
    one.load_state_dict({**two.state_dict(), "tokens": 8})
    with pytest.raises(ValueError, match="must be at the same step"):
        two.next_batch()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.next_batch(), two.next_batch())


def test_a_closed_reader_holds_nothing_back() -> None:
    source = _stream(torch.randn(20, 2))
    shared = SharedSource(source, 2)
    one, two = shared.reader(_identity, 2, {}), shared.reader(_identity, 2, {})
    for _ in range(3):
        one.next_batch()
    assert len(shared._kept) == 3
    two.close()
    assert len(shared._kept) == 0
    one.next_batch()
    assert len(shared._kept) == 0
