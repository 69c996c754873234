"""The training loop: its results, its log, and equal bits every time."""

import copy
import json
import logging
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.activations import ActivationStream, Rows, TensorStream
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.ops.working_copies import encoder_copy
from sae_fast.report.panels import overview
from sae_fast.training.checkpoint import CheckpointError
from sae_fast.training.progress import ProgressBar
from sae_fast.training.signals import StopOnSignal
from sae_fast.training.trainer import Trainer, TrainingError

SAE = SAEConfig(d_sae=64, k=3, dead_after_tokens=2000)
RUN = TrainConfig(batch_size=64, max_steps=20, learning_rate=3e-3, log_every=1, eval_every=0)
LOGGED = [
    *("step", "tokens", "epoch", "loss", "recon_loss", "l1_loss", "decorr_loss", "aux_loss"),
    *("fvu", "explained_variance", "l0", "activation_fraction"),
    *("dead_fraction", "silent_fraction", "learning_rate", "grad_norm"),
    *("tokens_per_second", "time_per_step_ms", "reader_stall_fraction"),
]


def _train(data: Any = None, sae: SAEConfig = SAE, run: TrainConfig = RUN, **more: Any) -> Trainer:
    trainer = Trainer(sae, run, data, show_progress=False, **more)
    trainer.train()
    return trainer


def _losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.history]


def _parameters(trainer: Trainer) -> list[torch.Tensor]:
    return [value.clone() for value in trainer.sae.state_dict().values()]


@pytest.mark.slow
def test_a_planted_dictionary_is_learnt(activations: torch.Tensor, heldout: torch.Tensor) -> None:
    run = replace(RUN, max_steps=500, log_every=100, learning_rate=1e-2)
    trainer = _train(activations, run=run, heldout=heldout)
    assert trainer.summary["final_heldout_fvu"] < 0.2
    assert trainer.summary["final_l0"] <= 3
    x_hat = trainer.sae(heldout).detach()
    fvu = (x_hat - heldout).square().sum() / (heldout - heldout.mean(0)).square().sum()
    assert float(fvu) == pytest.approx(trainer.summary["final_heldout_fvu"], rel=1e-4)


def test_twenty_losses_are_bitwise_equal_twice(activations: torch.Tensor) -> None:
    first, second = _train(activations), _train(activations)
    assert len(_losses(first)) == 20
    assert _losses(first) == _losses(second)
    assert all(map(torch.equal, _parameters(first), _parameters(second)))


def test_steps_made_one_by_one_are_those_of_train(activations: torch.Tensor) -> None:
    trainer = Trainer(SAE, RUN, activations, show_progress=False)
    with trainer, torch.no_grad():  # as a notebook may have it
        rows = [trainer.advance() for _ in range(20)]
    straight = _train(activations)
    assert [row["loss"] for row in rows] == _losses(straight)
    assert all(map(torch.equal, _parameters(trainer), _parameters(straight)))
    assert trainer.summary["steps"] == 20


def test_a_trainer_that_is_not_open_or_complete_does_not_advance(
    activations: torch.Tensor,
) -> None:
    trainer = Trainer(SAE, replace(RUN, max_steps=1), activations, show_progress=False)
    with pytest.raises(RuntimeError, match="cannot advance: use it inside `with trainer:`"):
        trainer.advance()
    with trainer:
        trainer.advance()
        with pytest.raises(RuntimeError, match="cannot advance: all its steps are made"):
            trainer.advance()


def test_an_error_inside_an_open_trainer_saves_nothing(
    activations: torch.Tensor, tmp_path: Path
) -> None:
    run = replace(RUN, checkpoint_dir=str(tmp_path))
    trainer = Trainer(SAE, run, activations, show_progress=False)

    def fail() -> None:
        with trainer:
            trainer.advance()
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.steps() == [0]
    again = replace(run, resume_from="latest")  # the directory has been released
    assert Trainer(SAE, again, activations, show_progress=False).step == 0


@pytest.mark.parametrize("changes", [{}, {"average_decay": 0.9, "amp": "fp16"}])
def test_another_trainer_goes_on_from_a_state_dict(
    activations: torch.Tensor, changes: dict[str, Any]
) -> None:
    run = replace(RUN, **changes)
    straight, first, second = (
        Trainer(SAE, run, activations, show_progress=False) for _ in range(3)
    )
    straight.train()
    with first:
        for _ in range(7):
            first.advance()
    state = copy.deepcopy(first.state_dict())
    second.sae.load_state_dict(first.sae.state_dict())
    second.load_state_dict(state)
    assert (second.step, second.tokens) == (7, 7 * 64)
    second.train()
    assert _losses(second) == _losses(straight)[7:]
    assert all(map(torch.equal, _parameters(second), _parameters(straight)))


def test_a_state_dict_of_other_settings_is_refused(activations: torch.Tensor) -> None:
    state = Trainer(SAE, RUN, activations, show_progress=False).state_dict()
    other = Trainer(SAE, replace(RUN, optimizer="sgd"), activations, show_progress=False)
    with pytest.raises(ValueError, match="is of a run with optimizer = adam"):
        other.load_state_dict(state)


def test_the_seed_decides(activations: torch.Tensor) -> None:
    other = _train(activations, run=replace(RUN, seed=1))
    assert _losses(other) != _losses(_train(activations))


def test_losses_do_not_depend_on_the_number_of_threads(activations: torch.Tensor) -> None:
    one = _train(activations, run=replace(RUN, num_threads=1))
    two = _train(activations, run=replace(RUN, num_threads=2))
    assert _losses(one) == _losses(two)
    assert all(map(torch.equal, _parameters(one), _parameters(two)))


def test_accumulated_batches_equal_one_big_batch(activations: torch.Tensor) -> None:
    sae = replace(SAE, aux_k_coeff=0.0)
    big = _train(activations, sae, replace(RUN, batch_size=128))
    small = _train(activations, sae, replace(RUN, batch_size=32, grad_acc_steps=4))
    assert small.tokens == big.tokens
    assert _losses(small) == pytest.approx(_losses(big), rel=1e-4)
    for ours, theirs in zip(small.sae.parameters(), big.sae.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_steps_and_evaluations_share_one_encoder_copy(
    activations: torch.Tensor, heldout: torch.Tensor
) -> None:
    run = replace(RUN, max_steps=3, eval_every=1)
    trainer = Trainer(SAE, run, data=activations, heldout=heldout, show_progress=False)
    copies = []
    with trainer:
        for _ in range(3):
            trainer.advance()
            with trainer.kept_copies():
                copies.append(encoder_copy(trainer.sae.W_enc, "screened")[0])
    assert copies[0] is not None
    assert copies[0] is copies[1] is copies[2]
    with trainer.kept_copies():
        assert encoder_copy(trainer.sae.W_enc, "screened")[0] is not copies[0]


def test_dense_and_fused_optimisers_agree(activations: torch.Tensor) -> None:
    dense = _train(activations, run=replace(RUN, fused=False))
    assert _losses(dense) == pytest.approx(_losses(_train(activations)), rel=1e-4)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_low_precision_trains_nearly_as_well(activations: torch.Tensor, amp: Any) -> None:
    run = replace(RUN, max_steps=60)
    exact, rounded = _train(activations, run=run), _train(activations, run=replace(run, amp=amp))
    assert _losses(rounded)[-1] == pytest.approx(_losses(exact)[-1], rel=0.1)
    scales = [row.get("loss_scale") for row in rounded.history]
    assert scales == ([2.0**16] * 60 if amp == "fp16" else [None] * 60)


def test_fp16_skips_a_step_whose_gradient_overflows(activations: torch.Tensor) -> None:
    trainer = Trainer(SAE, replace(RUN, amp="fp16"), activations, show_progress=False)
    trainer.scaler.scale.fill_(math.inf)
    before = _parameters(trainer)
    with trainer:
        trainer.advance()
    assert trainer.scaler.skipped_steps == 1
    for name, value in zip(trainer.sae.state_dict(), before, strict=True):
        if name != "tokens_since_fired":
            assert torch.equal(trainer.sae.state_dict()[name], value)


def test_every_metric_has_its_name(activations: torch.Tensor, heldout: torch.Tensor) -> None:
    run = replace(RUN, eval_every=8, log_every=5)
    rows = _train(activations, run=run, heldout=heldout).history
    assert [row["step"] for row in rows] == [5, 8, 10, 15, 16, 20]
    evaluated = [
        *("gram_mean", "heldout_fvu", "heldout_explained_variance"),
        *("heldout_explained_variance_overall", "heldout_l0", "heldout_dead_fraction"),
    ]
    assert list(rows[0]) == LOGGED[:3] + list(rows[0])[3:]
    assert sorted(rows[0]) == sorted(LOGGED)
    assert list(rows[1]) == LOGGED[:3] + evaluated
    assert sorted(rows[-1]) == sorted(LOGGED + evaluated)
    assert rows[0]["activation_fraction"] == pytest.approx(rows[0]["l0"] / 64)
    assert rows[-1]["epoch"] == pytest.approx(20 * 64 / 3000)


def test_the_learning_rate_follows_the_schedule(activations: torch.Tensor) -> None:
    rates = [row["learning_rate"] for row in _train(activations).history]
    assert max(rates) == 3e-3
    assert rates[0] < rates[1] == rates[10]
    assert rates[-1] < rates[-2] < rates[-5]


def test_dead_latents_are_counted_and_aux_k_is_paid(activations: torch.Tensor) -> None:
    sae = replace(SAE, dead_after_tokens=64)
    rows = _train(activations, sae, replace(RUN, max_steps=5)).history
    assert rows[-1]["dead_fraction"] > 0
    assert rows[-1]["aux_loss"] > 0
    assert rows[0]["aux_loss"] == 0


@pytest.mark.parametrize(
    ("given", "steps", "expected"),
    [(None, 400, 20 * 64), (None, 5, 16), (None, 4_000_000, 10_000_000), (640, 400, 640)],
)
def test_latents_are_dead_after_a_twentieth_of_the_run(
    activations: torch.Tensor, given: int | None, steps: int, expected: int
) -> None:
    sae = replace(SAE, dead_after_tokens=given)
    trainer = Trainer(sae, replace(RUN, max_steps=steps), activations, show_progress=False)
    assert trainer.sae_config.dead_after_tokens == expected


def test_the_dead_share_is_null_until_a_latent_can_be_dead(
    activations: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sae = replace(SAE, dead_after_tokens=3 * 64)
    run = replace(RUN, max_steps=4, log_every=1, checkpoint_dir=str(tmp_path))
    rows = _train(activations, sae, run).history
    assert [row["dead_fraction"] for row in rows[:2]] == [None, None]
    assert all(isinstance(row["dead_fraction"], float) for row in rows[2:])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"dead_fraction": null' in lines[0]
    assert "dead_fraction" not in {panel.main for panel in overview(rows[:2])}
    assert "dead_fraction" in {panel.main for panel in overview(rows)}


def test_best_is_the_evaluation_with_the_lowest_fvu(
    activations: torch.Tensor, heldout: torch.Tensor, tmp_path: Path
) -> None:
    run = replace(
        RUN, checkpoint_dir=str(tmp_path), eval_every=5, checkpoint_every=7, keep_checkpoints=1
    )
    trainer = _train(activations, run=run, heldout=heldout)
    evaluations = {
        row["step"]: row["heldout_fvu"] for row in trainer.history if "heldout_fvu" in row
    }
    best = min(evaluations, key=lambda step: evaluations[step])
    assert trainer.summary["best_step"] == best
    assert (tmp_path / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
    again = SparseAutoencoder.from_pretrained(tmp_path / "checkpoints" / "best")
    assert again.config.d_in == 16


def test_a_run_directory_holds_what_a_run_makes(
    activations: torch.Tensor, heldout: torch.Tensor, tmp_path: Path
) -> None:
    run = replace(RUN, checkpoint_dir=str(tmp_path / "run"))
    trainer = _train(activations, run=run, heldout=heldout)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "training_history.json", "checkpoints", "report.html")
    }
    history = json.loads((tmp_path / "run" / "training_history.json").read_text())
    assert history["history"]["loss"] == _losses(trainer)
    assert history["summary"]["final_loss"] == _losses(trainer)[-1]
    assert history["summary"]["steps"] == 20
    assert history["config"]["sae"]["d_in"] == 16
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows == trainer.history


def test_without_a_directory_nothing_is_written(
    activations: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _train(activations)
    assert list(tmp_path.iterdir()) == []


def test_shards_tensor_and_source_are_all_trained_on(
    activations: torch.Tensor, shard_dir: Path
) -> None:
    from_shards = _train(run=replace(RUN, shard_dir=str(shard_dir)))
    assert "final_heldout_fvu" in from_shards.summary
    given = ActivationStream(shard_dir, batch_size=64, pool_rows=RUN.pool_rows)
    from_source = _train(given)
    assert _losses(from_source) == pytest.approx(_losses(from_shards), rel=0.2)
    from_tensor = _train(activations.view(30, 100, 16))
    assert _losses(from_tensor) == _losses(_train(activations))


def test_the_learning_rate_ends_its_fall_with_accumulated_batches(
    activations: torch.Tensor,
) -> None:
    run = replace(RUN, batch_size=32, grad_acc_steps=4, max_steps=10, decay_fraction=0.5)
    trainer = _train(activations, SAEConfig(d_sae=32, k=4), replace(run, log_every=1))
    rates = [row["learning_rate"] for row in trainer.history]
    assert len(rates) == 10  # one rate per optimiser step, not per batch
    assert rates[-1] == pytest.approx(max(rates) / 6)


def test_l0_is_told_of_the_batch_and_at_the_threshold(
    activations: torch.Tensor, heldout: torch.Tensor
) -> None:
    sae = SAEConfig(arch="batch_topk", d_sae=32, k=4)
    trainer = Trainer(sae, RUN, data=activations, heldout=heldout, show_progress=False)
    trained = trainer.train()
    last = trainer.history[-1]
    assert last["l0"] == pytest.approx(4)
    above = float(trained.encode(heldout).l0().double().mean())
    assert last["heldout_l0"] == pytest.approx(above)
    assert last["heldout_l0"] != pytest.approx(4, abs=1e-6)


def test_what_is_no_tensor_is_refused_by_its_name(activations: torch.Tensor) -> None:
    rows: Any = 3
    refused = "must be a tensor or a NumPy array .*, got int"
    with pytest.raises(ValueError, match=f"^data {refused}"):
        Trainer(SAEConfig(), TrainConfig(), data=rows)
    with pytest.raises(ValueError, match=f"^heldout {refused}"):
        Trainer(SAEConfig(), TrainConfig(), data=activations, heldout=rows)
    with pytest.raises(ValueError, match=f"^columns: position {refused}"):
        Trainer(SAEConfig(), TrainConfig(), data=activations, columns={"position": rows})


def test_a_source_of_another_batch_size_is_refused(activations: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="batch_size must be 64, got a source that serves 32"):
        _train(TensorStream(activations, batch_size=32))


def test_b_dec_can_start_at_the_mean(activations: torch.Tensor) -> None:
    sae = replace(SAE, b_dec_init="mean", normalize_activations="none")
    trainer = Trainer(sae, RUN, activations, show_progress=False)
    served = trainer.source.next_batch()  # the sample is served again
    torch.testing.assert_close(trainer.sae.b_dec.detach(), served.mean(0))


def test_the_active_subspace_is_found_from_8_activations_a_dimension(
    activations: torch.Tensor,
) -> None:
    sae = replace(SAE, decoder_init="active_subspace", b_dec_init="mean")
    trainer = Trainer(sae, RUN, activations, show_progress=False)
    served = torch.cat([trainer.source.next_batch() for _ in range(2)])  # 8 times 16 of them
    torch.testing.assert_close(trainer.sae.b_dec.detach(), served.mean(0))


def test_a_loss_that_is_not_finite_names_step_and_shards(shard_dir: Path, tmp_path: Path) -> None:
    run = replace(RUN, shard_dir=str(shard_dir), checkpoint_dir=str(tmp_path), checkpoint_every=2)
    trainer = Trainer(SAE, run, show_progress=False)
    serve = trainer.source.next_rows

    def poisoned() -> Rows:
        rows = serve()
        if trainer.step == 3:
            rows.x[5, 2] = math.nan
        return rows

    trainer.source.next_rows = poisoned  # type: ignore[method-assign]
    with pytest.raises(
        TrainingError, match=r"step 4, .*train_00\.h5.*1 rows hold NaN.*intact"
    ) as e:
        trainer.train()
    assert "\n" not in str(e.value)
    assert all(torch.isfinite(value).all() for value in trainer.sae.parameters())
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-00000002"


def test_a_directory_of_another_run_is_not_overwritten(
    activations: torch.Tensor, tmp_path: Path
) -> None:
    run = replace(RUN, checkpoint_dir=str(tmp_path), max_steps=2)
    _train(activations, run=run)
    with pytest.raises(CheckpointError, match="already holds a run"):
        _train(activations, run=run)


def test_a_signal_stops_at_a_step_and_saves(activations: torch.Tensor, tmp_path: Path) -> None:
    with StopOnSignal() as stop:
        run = replace(RUN, checkpoint_dir=str(tmp_path))
        trainer = Trainer(SAE, run, activations, stop=stop, show_progress=False)
        serve = trainer.source.next_rows

        def interrupt() -> Rows:
            if trainer.step == 6:
                signal.raise_signal(signal.SIGTERM)
            return serve()

        trainer.source.next_rows = interrupt  # type: ignore[method-assign]
        trainer.train()
    assert trainer.step == 7
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-00000007"
    assert not (tmp_path / "plots").exists()


def test_progress_lines_tell_what_matters(
    activations: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sae_fast"):
        Trainer(SAE, RUN, activations).train()
    (line,) = [record.message for record in caplog.records if record.message.startswith("step")]
    for part in ("step 20: loss", "FVU", "L0", "silent so far", "stall", "tokens/s"):
        assert part in line


@pytest.mark.parametrize(("dead", "shown"), [(None, "silent so far 10.0 %"), (0.0, "dead 0.0 %")])
def test_the_line_shows_dead_latents_once_they_are_counted(
    dead: float | None, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"step": 1, "dead_fraction": dead, "silent_fraction": 0.1}
    with caplog.at_level(logging.INFO, logger="sae_fast"), ProgressBar(9, 0, shown=True) as bar:
        bar.show([row], last=True)
    assert caplog.messages == [f"step 1: {shown}, 0 tokens/s"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["topk", "batch_topk", "relu", "jumprelu", "gated"])
@pytest.mark.parametrize("inside", ["made", "trained", "both"])
def test_inference_mode_of_the_caller_changes_no_bit(
    activations: torch.Tensor, heldout: torch.Tensor, arch: Any, inside: str
) -> None:
    def trained(*inference: bool) -> Trainer:
        with torch.inference_mode(inference[0]):
            rows, held = activations.clone(), heldout.clone()
            sae = SAEConfig(arch=arch, d_sae=64, decorrelation_coeff=0.1)
            run = replace(RUN, average_decay=0.9, eval_every=5)
            trainer = Trainer(sae, run, rows, heldout=held, show_progress=False)
        with torch.inference_mode(inference[1]):
            trainer.train()
        return trainer

    expected = trained(False, False)
    found = trained(inside != "trained", inside != "made")
    assert all(map(torch.equal, _parameters(expected), _parameters(found)))
    assert _losses(expected) == _losses(found)
    assert not any(value.is_inference() for value in found.model().state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_of_torch_changes_no_bit(
    activations: torch.Tensor, heldout: torch.Tensor, dtype: torch.dtype
) -> None:
    def trained() -> dict[str, torch.Tensor]:
        trainer = Trainer(SAE, RUN, activations, heldout=heldout, show_progress=False)
        return trainer.train().state_dict()

    expected = trained()
    torch.set_default_dtype(dtype)
    try:
        found = trained()
    finally:
        torch.set_default_dtype(torch.float32)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_caller_without_gradients_gets_a_trained_model(activations: torch.Tensor) -> None:
    expected = _train(activations).sae.state_dict()
    with torch.no_grad():
        found = _train(activations).sae.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_heldout_rows_that_there_are_none_of_are_refused(activations: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="heldout has no rows"):
        Trainer(SAE, RUN, activations, heldout=activations[:0], show_progress=False)


def test_fvu_of_one_row_a_step_is_refused(activations: torch.Tensor) -> None:
    run = replace(RUN, batch_size=1)
    with pytest.raises(ValueError, match="one row has no variance"):
        Trainer(replace(SAE, loss_fn="fvu"), run, activations, show_progress=False)


@pytest.mark.parametrize(("factor", "is_told"), [(1.0, False), (0.1, True), (10.0, True)])
def test_rows_in_other_units_than_those_of_the_model_to_start_from_are_told(
    activations: torch.Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    factor: float,
    is_told: bool,
) -> None:
    Trainer(SAE, RUN, activations, show_progress=False).train().save(tmp_path)
    run = replace(RUN, start_from=str(tmp_path))
    Trainer(SAE, run, activations * factor, show_progress=False)
    assert ("start_from: these rows have" in caplog.text) == is_told
