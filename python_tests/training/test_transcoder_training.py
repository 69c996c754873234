"""Training transcoders from tensors, shards and given sources, their results, and resuming."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import D_IN, planted

from sae_fast.activations import TARGETS, Column, Rows, write_shard
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.architecture import StepSettings
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.cuda_graph import WARMUP_STEPS, GraphedStep
from sae_fast.training.memory_plan import plan_memory
from sae_fast.training.optimizer.loss_scaler import LossScaler
from sae_fast.training.optimizer.row_optimizer import RowOptimizer
from sae_fast.training.signals import StopOnSignal
from sae_fast.training.step import TrainingStep
from sae_fast.training.trainer import Trainer, TrainingError

D_OUT = 10
ROWS, HELD = 3000, 400
SKIP = {"skip_connection": True}
ARCHITECTURES = {
    "topk": {"k": 3, "aux_k_coeff": 1 / 32, "dead_after_tokens": 600},
    "batch_topk": {"arch": "batch_topk", "k": 3},
    "matryoshka": {"arch": "matryoshka", "k": 3},
    "relu": {"arch": "relu", "l1_penalty_coeff": 1.0},
    "jumprelu": {"arch": "jumprelu", "target_l0": 6.0},
    "gated": {"arch": "gated", "l1_penalty_coeff": 0.5},
}
RUN = TrainConfig(
    batch_size=64, max_steps=20, learning_rate=1e-2, log_every=1, eval_every=0, pool_rows=700
)


def config(**fields: Any) -> SAEConfig:
    return SAEConfig(**{"transcoder": True, "d_sae": 48, "k": 3, **fields})


def mlp(x: torch.Tensor) -> torch.Tensor:
    """Return a fixed function [n, 10] of activations, with a mean and a scale."""
    generator = torch.Generator().manual_seed(9)
    inner = torch.randn(D_IN, 24, generator=generator)
    outer = torch.randn(24, D_OUT, generator=generator)
    return 30 + 5 * (x @ inner / 4).relu() @ outer


@pytest.fixture(scope="module")
def pair() -> dict[str, torch.Tensor]:
    x = planted(ROWS, seed=1)
    held = planted(HELD, seed=2)
    return {"x": x, "y": mlp(x), "held_x": held, "held_y": mlp(held)}


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory, pair: dict[str, torch.Tensor]
) -> tuple[Path, Path]:
    """Write shards of inputs and of outputs."""
    parent = tmp_path_factory.mktemp("pairs")
    for name, rows, held in (("x", pair["x"], pair["held_x"]), ("y", pair["y"], pair["held_y"])):
        directory = parent / name
        directory.mkdir()
        write_shard(directory / "train_00.h5", rows[:1800])
        write_shard(directory / "train_01.h5", rows[1800:])
        write_shard(directory / "heldout_00.h5", held)
    return parent / "x", parent / "y"


def train_on_tensor(
    sae: SAEConfig, pair: dict[str, torch.Tensor], **settings: Any
) -> tuple[Trainer, SparseAutoencoder]:
    trainer = Trainer(
        sae,
        TrainConfig(**{**RUN.to_dict(), **settings}),
        data=pair["x"],
        heldout=pair["held_x"],
        columns={TARGETS: pair["y"]},
        heldout_columns={TARGETS: pair["held_y"]},
        show_progress=False,
    )
    return trainer, trainer.train()


def shard_run(shards: tuple[Path, Path], **settings: Any) -> TrainConfig:
    directories = {"shard_dir": str(shards[0]), "target_shard_dir": str(shards[1])}
    return TrainConfig(**{**RUN.to_dict(), **directories, **settings})


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_learns_to_predict_the_targets(arch, pair):
    trainer, sae = train_on_tensor(
        config(**{"k": None, **ARCHITECTURES[arch]}), pair, max_steps=150
    )
    assert (sae.config.d_in, sae.config.d_out) == (D_IN, D_OUT)
    row = trainer.history[-1]
    assert row["heldout_fvu"] < 0.6
    error = (sae(pair["held_x"]).detach() - pair["held_y"]).square().sum()
    variance = (pair["held_y"] - pair["held_y"].mean(0)).square().sum()
    assert row["heldout_fvu"] == pytest.approx(float(error / variance), rel=1e-3)


@pytest.mark.slow
def test_a_skip_connection_learns_a_linear_map_by_itself(pair):
    generator = torch.Generator().manual_seed(3)
    linear = torch.randn(D_IN, D_OUT, generator=generator)
    linear_pair = {**pair, "y": pair["x"] @ linear - 7, "held_y": pair["held_x"] @ linear - 7}
    # Where nothing is left to model, dead latents would be trained to model what is left.
    alone = config(**SKIP, k=1, aux_k_coeff=0.0)
    trainer, sae = train_on_tensor(alone, linear_pair, max_steps=600, betas=(0.9, 0.999))
    assert trainer.history[-1]["heldout_fvu"] < 1e-3
    plain, _ = train_on_tensor(config(k=1), linear_pair, max_steps=600)
    assert plain.history[-1]["heldout_fvu"] > 0.1
    found = sae.fold_normalization().get_parameter("W_skip").t()
    torch.testing.assert_close(found, linear, rtol=0, atol=0.15)


def test_a_skip_connection_helps_with_what_is_partly_linear(pair):
    fvu = {}
    for skip in (False, True):
        trainer, _ = train_on_tensor(config(skip_connection=skip), pair, max_steps=300)
        fvu[skip] = trainer.history[-1]["heldout_fvu"]
    assert fvu[True] < 0.7 * fvu[False]


def test_activations_and_targets_are_normalised_each_by_its_own(pair):
    trainer, sae = train_on_tensor(config(), pair, max_steps=1)
    torch.testing.assert_close(sae.activation_mean, pair["x"].mean(0))
    torch.testing.assert_close(sae.target_mean, pair["y"].mean(0))
    centred = pair["y"] - pair["y"].mean(0)
    expected = D_OUT**0.5 / centred.norm(dim=1).mean()
    torch.testing.assert_close(sae.target_scale, expected)
    assert trainer.history[0]["recon_loss"] < 4 * D_OUT


def test_without_normalization_targets_are_learnt_as_they_are(pair):
    sae_config = config(normalize_activations="none", b_dec_init="mean")
    _, sae = train_on_tensor(sae_config, pair, max_steps=1)
    assert float(sae.b_dec.detach().mean()) == pytest.approx(float(pair["y"].mean()), rel=0.05)


def test_shards_and_tensors_give_the_same_normalization_and_near_models(pair, shards):
    _, from_tensor = train_on_tensor(config(), pair, max_steps=200)
    trainer = Trainer(config(), shard_run(shards, max_steps=200), show_progress=False)
    from_shards = trainer.train()
    torch.testing.assert_close(from_shards.target_mean, from_tensor.target_mean)
    errors = [
        sae.get_reconstruction_error(pair["held_y"], sae(pair["held_x"]))["fvu"]
        for sae in (from_tensor, from_shards)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.3)
    assert trainer.history[-1]["heldout_fvu"] == pytest.approx(errors[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [SKIP, {"arch": "gated", "k": None, **SKIP}])
@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_transcoder_equals_one_that_was_not_stopped(fields, fused, shards, tmp_path):
    settings = {"max_steps": 16, "grad_acc_steps": 2, "checkpoint_every": 8, "fused": fused}
    settings |= {"average_decay": 0.9, "eval_every": 4}
    whole = Trainer(
        config(**fields),
        shard_run(shards, checkpoint_dir=str(tmp_path / "whole"), **settings),
        show_progress=False,
    )
    expected = whole.train()
    directory = tmp_path / "parts"
    stop = StopOnSignal()
    part = Trainer(
        config(**fields),
        shard_run(shards, checkpoint_dir=str(directory), **settings),
        stop=stop,
        show_progress=False,
    )
    evaluate, calls = part.evaluate, []

    def evaluate_and_stop() -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            stop.received = signal.SIGTERM
        return evaluate()

    part.evaluate = evaluate_and_stop  # type: ignore[method-assign]
    part.train()
    assert part.step == 8
    run = shard_run(shards, checkpoint_dir=str(directory), resume_from="latest", **settings)
    again = Trainer(config(**fields), run, show_progress=False)
    found = again.train()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    names = ("step", "loss", "fvu", "heldout_fvu")
    rows = [[{n: r.get(n) for n in names} for r in t.history] for t in (whole, again)]
    assert rows[0] == rows[1]


def test_resuming_with_other_targets_is_refused(shards, tmp_path):
    run = shard_run(shards, max_steps=4, checkpoint_dir=str(tmp_path / "run"))
    Trainer(config(), run, show_progress=False).train()
    other = tmp_path / "other"
    other.mkdir()
    for path in shards[0].iterdir():  # the inputs in place of the outputs
        write_shard(other / path.name, torch.randn(_rows_of(path), D_OUT))
    again = shard_run(
        (shards[0], other), max_steps=8, checkpoint_dir=str(tmp_path / "run"), resume_from="latest"
    )
    with pytest.raises(ValueError, match=r"train_00\.h5 has other content"):
        Trainer(config(), again, show_progress=False)
    with pytest.raises(ValueError, match="is of a model with skip_connection = False"):
        Trainer(
            config(**SKIP),
            shard_run(shards, checkpoint_dir=str(tmp_path / "run"), resume_from="latest"),
            show_progress=False,
        )


def _rows_of(path: Path) -> int:
    return {"train_00.h5": 1800, "train_01.h5": 1200, "heldout_00.h5": HELD}[path.name]


class PairSource:
    """A caller's own source of pairs, in order and without end."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        self._x, self._y = x, y
        self._batch, self.epoch, self.stall_seconds = 0, 0, 0.0
        self.d_in, self.rows_per_epoch, self.batch_size = x.shape[1], len(x), 64
        width = 0 if y is None else y.shape[1]
        column = Column(TARGETS, torch.float32, width=width)
        self.columns = {} if y is None else {TARGETS: column}

    @property
    def tokens_served(self) -> int:
        return 64 * self._batch

    def next_rows(self) -> Rows:
        first = 64 * (self._batch % (len(self._x) // 64))
        self._batch += 1
        place = slice(first, first + 64)
        beside = {} if self._y is None else {TARGETS: self._y[place].clone()}
        return Rows(self._x[place].clone(), beside)

    def next_batch(self) -> torch.Tensor:
        return self.next_rows().x

    def state_dict(self) -> dict[str, int]:
        return {"batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._batch = state["batch"]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("init", ["random", "active_subspace"])
def test_a_given_source_serves_its_own_targets(init, pair):
    source = PairSource(pair["x"], pair["y"])
    settings = TrainConfig(**{**RUN.to_dict(), "max_steps": 150})
    trainer = Trainer(config(decoder_init=init), settings, data=source, show_progress=False)
    sae = trainer.train()
    first = pair["y"][: 16 * 64]
    torch.testing.assert_close(sae.target_mean, first.mean(0))
    assert trainer.history[-1]["fvu"] < 0.5
    assert source.tokens_served == 150 * 64


def bad_tensors(pair: dict[str, torch.Tensor]) -> dict[str, tuple[SAEConfig, dict[str, Any], str]]:
    x, y = pair["x"], pair["y"]
    held = {"heldout": pair["held_x"]}
    sae = SAEConfig(d_sae=48, k=3)
    return {
        "no targets": (config(), {"data": x}, "transcoder needs the column 'targets', which the"),
        "no transcoder": (sae, {"data": x, "columns": {TARGETS: y}}, "'targets' belong to a trans"),
        "too few": (
            config(),
            {"data": x, "columns": {TARGETS: y[1:]}},
            "targets must have one row",
        ),
        "another d_out": (
            config(d_out=7),
            {"data": x, "columns": {TARGETS: y}},
            "d_out must be 10, the width of the targets, got 7",
        ),
        "none held out": (
            config(),
            {"data": x, "columns": {TARGETS: y}, **held},
            "'targets' must be given beside heldout",
        ),
        "others held out": (
            config(),
            {"data": x, "columns": {TARGETS: y}, **held, "heldout_columns": {TARGETS: y}},
            r"heldout_columns: targets must have shape \(400, 10\), got \(3000, 10\)",
        ),
        "a source without": (
            config(),
            {"data": PairSource(x, None)},
            "transcoder needs the column 'targets'",
        ),
        "a label of that name": (
            config(probe_loss_coeff=1.0, probe_labels=TARGETS),
            {"data": x, "columns": {TARGETS: y}},
            "probe_labels must not be 'targets'",
        ),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("no targets", "no transcoder", "too few", "another d_out", "none held out"),
        *("others held out", "a source without", "a label of that name"),
    ],
)
def test_targets_that_do_not_fit_are_one_line(case, pair):
    sae, given, message = bad_tensors(pair)[case]
    with pytest.raises(ValueError, match=message) as caught:
        Trainer(sae, RUN, show_progress=False, **given)
    assert "\n" not in str(caught.value)


def test_targets_that_cannot_be_trained_on_are_counted(pair):
    y = pair["y"].clone()
    y[20 * 64 + 5, 2] = torch.nan  # beyond the sample of the normalisation
    source = PairSource(pair["x"], y)
    settings = TrainConfig(**{**RUN.to_dict(), "max_steps": 30})
    with pytest.raises(TrainingError, match=r"step 21.* 1 rows hold NaN or Inf"):
        Trainer(config(), settings, data=source, show_progress=False).train()


def test_a_model_may_start_from_a_transcoder_but_not_from_another_kind(pair, tmp_path):
    _, sae = train_on_tensor(config(), pair, max_steps=5)
    sae.save(tmp_path / "model")
    start = {"start_from": str(tmp_path / "model"), "max_steps": 1}
    _, again = train_on_tensor(config(), pair, **start)
    assert torch.equal(again.target_mean, sae.target_mean)
    with pytest.raises(ValueError, match="is of a model with skip_connection = False, this one"):
        train_on_tensor(config(**SKIP), pair, **start)


class EagerRecorder:
    """Replaces CUDA graphs: repeats the recorded work."""

    def side_stream(self):
        from contextlib import nullcontext

        return nullcontext()

    def record(self, work):
        return work

    def finish(self):
        pass


def test_a_graphed_step_reads_the_targets_of_its_own_batch(pair):
    found = []
    for graphed in (False, True):
        torch.manual_seed(0)
        sae = SparseAutoencoder(config(**SKIP).with_d_in(D_IN, D_OUT))
        sae.initialize_(torch.Generator().manual_seed(0))
        step = TrainingStep(
            sae, RowOptimizer(sae), LossScaler(enabled=False, device="cpu"), "screened"
        )
        run = GraphedStep(step, EagerRecorder()).run if graphed else step.run
        for number in range(WARMUP_STEPS + 3):
            place = slice(64 * number, 64 * number + 64)
            rows = Rows(pair["x"][place].clone(), {TARGETS: pair["y"][place] / 30})
            run([rows], StepSettings(1e-2))
        found.append(sae.state_dict())
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


def test_the_memory_plan_counts_both_widths():
    def parts(**fields: Any) -> dict[str, int]:
        sae = SAEConfig(d_in=64, d_sae=512, k=8, **fields)
        return plan_memory(sae, RUN, native=True, pool_bytes=0).parts

    plain, same = parts(), parts(transcoder=True, d_out=64)
    assert same == {**plain, "targets": 3 * 64 * 64 * 4}
    wide = parts(transcoder=True, d_out=128)
    assert wide["parameters"] == 4 * (512 * (64 + 128) + 512 + 128)
    assert wide["packed encoder (16 bit)"] == plain["packed encoder (16 bit)"]
    skip = parts(transcoder=True, d_out=128, skip_connection=True)
    assert skip["parameters"] - wide["parameters"] == 4 * 64 * 128
    assert skip["optimiser states"] - wide["optimiser states"] == 2 * 4 * 64 * 128
    assert skip["targets"] == 2 * wide["targets"]


def test_a_run_says_what_it_is(shards, tmp_path):
    run = shard_run(shards, max_steps=2, checkpoint_dir=str(tmp_path / "run"))
    Trainer(config(**SKIP), run, show_progress=False).train()
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["sae"]["d_out"], stored["sae"]["skip_connection"]) == (D_OUT, True)
    again = SparseAutoencoder.from_pretrained(tmp_path / "run" / "checkpoints" / "latest")
    assert again.get_parameter("W_skip").shape == (D_OUT, D_IN)
