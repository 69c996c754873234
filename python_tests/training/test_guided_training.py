"""Training with a probe and with temporal smoothness: needs, results, metrics and resuming."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import D_IN, planted

from sae_fast.activations import STARTS, ActivationStream, Rows, TensorStream, write_shard
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.architecture import StepSettings
from sae_fast.autoencoder.architectures import ARCHITECTURES
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.batches import StepBatches
from sae_fast.training.cuda_graph import WARMUP_STEPS, GraphedStep
from sae_fast.training.memory_plan import plan_memory
from sae_fast.training.optimizer.loss_scaler import LossScaler
from sae_fast.training.optimizer.row_optimizer import RowOptimizer
from sae_fast.training.step import TrainingStep
from sae_fast.training.trainer import Trainer

RULE, SCORE = "labels/rule", "labels/score"
CLASSES = {"probe_loss_coeff": 0.5, "probe_labels": RULE}
SCORES = {"probe_loss_coeff": 0.5, "probe_labels": SCORE, "probe_task": "regression"}
SMOOTH = {"temporal_smoothness_coeff": 0.2}
RUN = TrainConfig(
    batch_size=64, max_steps=20, learning_rate=1e-2, log_every=1, eval_every=0, pool_rows=500
)
ROWS = 2000


def sae_config(**fields: Any) -> SAEConfig:
    return SAEConfig(**{"d_sae": 64, "k": 3, "dead_after_tokens": 2000, **fields})


@pytest.fixture(scope="session")
def data() -> dict[str, torch.Tensor]:
    """Make activations in sequences of 25 that drift slowly, and labels that depend on them."""
    x = planted(ROWS, seed=4)
    for row in range(1, ROWS):
        if row % 25:
            x[row] = 0.8 * x[row - 1] + 0.2 * x[row]
    rule = (x[:, 0] > x[:, 0].median()).long() + 2 * (x[:, 1] > x[:, 1].median()).long()
    rule[::7] = -1
    return {"x": x, RULE: rule, SCORE: x[:, 2] - x[:, 3], "position": torch.arange(ROWS) % 25}


@pytest.fixture(scope="session")
def labelled_dir(tmp_path_factory: pytest.TempPathFactory, data: dict[str, torch.Tensor]) -> Path:
    """Write activations and labels to two shards."""
    directory = tmp_path_factory.mktemp("labelled")
    for number, part in enumerate((slice(0, 1200), slice(1200, ROWS))):
        write_shard(
            directory / f"train_{number:02d}.h5",
            data["x"][part],
            labels={"rule": data[RULE][part], "score": data[SCORE][part]},
            position=data["position"][part],
        )
    return directory


Train = Callable[..., Trainer]


@pytest.fixture
def train(labelled_dir: Path) -> Train:
    """Return a finished training on the shards, or on `data`."""

    def finish(sae: SAEConfig, run: TrainConfig = RUN, data: Any = None, **more: Any) -> Trainer:
        if data is None:
            run = replace(run, shard_dir=str(labelled_dir))
        trainer = Trainer(sae, run, data, show_progress=False, **more)
        trainer.train()
        return trainer

    return finish


def _parameters(trainer: Trainer) -> list[torch.Tensor]:
    return [value.clone() for value in trainer.sae.state_dict().values()]


def test_terms_and_quality_are_logged_and_add_up(train: Train, tmp_path: Path) -> None:
    run = replace(RUN, checkpoint_dir=str(tmp_path / "run"))
    rows = train(sae_config(**CLASSES, **SMOOTH), run).history
    for row in rows:
        terms = [value for name, value in row.items() if name.endswith("_loss")]
        assert row["loss"] == pytest.approx(sum(terms), rel=1e-5)
        assert row["probe_loss"] > 0
        assert row["temporal_loss"] > 0
        assert 0 <= row["probe_accuracy"] <= 1
    history = json.loads((tmp_path / "run" / "training_history.json").read_text())["history"]
    for name in ("probe_loss", "temporal_loss", "probe_accuracy"):
        assert history[name] == [row[name] for row in rows]


def test_without_guided_terms_nothing_of_them_is_logged(train: Train) -> None:
    (row,) = train(sae_config(), replace(RUN, max_steps=1)).history
    assert not {"probe_loss", "temporal_loss", "probe_accuracy", "probe_r2"} & set(row)


@pytest.mark.slow
def test_the_probe_learns_the_labels_from_the_code(train: Train) -> None:
    run = replace(RUN, max_steps=300, log_every=100)
    trainer = train(sae_config(**CLASSES), run)
    assert trainer.sae_config.probe_classes == 4
    assert trainer.summary["final_probe_accuracy"] > 0.6  # by chance: 0.25
    trainer = train(sae_config(**SCORES), run)
    assert trainer.summary["final_probe_r2"] > 0.6


def test_smoothness_makes_neighbours_alike(train: Train) -> None:
    run = replace(RUN, max_steps=200, log_every=200)
    changes = []
    for coefficient in (1e-6, 1.0):
        summary = train(sae_config(temporal_smoothness_coeff=coefficient), run).summary
        changes.append(summary["final_temporal_loss"] / coefficient)
    assert changes[1] < 0.8 * changes[0]


def test_a_tensor_with_columns_is_trained_on(train: Train, data: dict[str, torch.Tensor]) -> None:
    columns = {name: data[name] for name in (RULE, "position")}
    trainer = train(sae_config(**CLASSES, **SMOOTH), data=data["x"], columns=columns)
    assert trainer.sae_config.probe_classes == 4
    assert trainer.history[-1]["temporal_loss"] > 0
    smooth = train(sae_config(**SMOOTH), data=data["x"].view(-1, 25, D_IN))
    assert smooth.history[-1]["temporal_loss"] > 0


def test_a_given_source_brings_its_columns(train: Train, labelled_dir: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 64, "pool_rows": RUN.pool_rows}
    sae = sae_config(**CLASSES, **SMOOTH, normalize_activations="none")
    given = ActivationStream(labelled_dir, columns=(RULE,), whole_sequences=True, **settings)
    assert train(sae, data=given).history[-1]["loss"] == train(sae).history[-1]["loss"]
    normalized = sae_config(**CLASSES, **SMOOTH)
    again = ActivationStream(labelled_dir, columns=(RULE,), whole_sequences=True, **settings)
    first = train(normalized, data=again).history[-1]
    assert first["recon_loss"] == pytest.approx(
        train(normalized).history[-1]["recon_loss"], rel=0.2
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture_is_guided(train: Train, arch: Any) -> None:
    fields: dict[str, Any] = {"d_sae": 64, "arch": arch, **CLASSES, **SMOOTH}
    if arch in ("topk", "batch_topk", "matryoshka"):
        fields["k"] = 3
    if arch == "slots":
        fields |= {"relation_labels": RULE, "slots_mode": "separate_activation"}
    run = replace(RUN, max_steps=150, log_every=10)
    rows = train(SAEConfig(**fields), run).history
    for row in rows:
        terms = [value for name, value in row.items() if name.endswith("_loss")]
        assert row["loss"] == pytest.approx(sum(terms), rel=1e-5)
        assert row["temporal_loss"] > 0
    assert rows[-1]["probe_loss"] < rows[0]["probe_loss"]


def test_dense_and_fused_optimisers_agree(train: Train) -> None:
    sae = sae_config(**CLASSES, **SMOOTH)
    fused = [row["loss"] for row in train(sae).history]
    dense = [row["loss"] for row in train(sae, replace(RUN, fused=False)).history]
    assert dense == pytest.approx(fused, rel=1e-4)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_low_precision_trains_nearly_as_well(train: Train, amp: Any) -> None:
    sae, run = sae_config(**CLASSES, **SMOOTH), replace(RUN, max_steps=60, log_every=60)
    exact, rounded = train(sae, run).history[-1], train(sae, replace(run, amp=amp)).history[-1]
    for name in ("loss", "probe_loss", "temporal_loss"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"grad_acc_steps": 2, "amp": "fp16"}, {"fused": False}])
def test_a_stopped_run_resumes_bit_equal(
    train: Train, labelled_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    sae = sae_config(**CLASSES, **SMOOTH)
    straight = train(sae, replace(RUN, **changes))
    run = replace(RUN, shard_dir=str(labelled_dir), checkpoint_dir=str(tmp_path), **changes)
    for stop_at in (3, 11):
        with Trainer(sae, run, show_progress=False) as trainer:
            while trainer.step < stop_at:
                trainer.advance()
        run = replace(run, resume_from="latest")
    resumed = train(sae, run)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in straight.history]
    assert all(map(torch.equal, _parameters(resumed), _parameters(straight)))
    own = resumed.optimizer.state_dict()
    for name, moment in straight.optimizer.state_dict().items():
        assert torch.equal(own[name], moment)


class _Replay:
    """A recorder that repeats the work of a capture, like a graph."""

    @contextmanager
    def side_stream(self) -> Any:
        yield

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def finish(self) -> None:
        pass


def test_a_graph_reads_labels_and_starts_where_they_are_copied_to(
    data: dict[str, torch.Tensor],
) -> None:
    config = sae_config(d_in=D_IN, probe_classes=4, **CLASSES, **SMOOTH)
    columns = {name: data[name] for name in (RULE, "position")}
    found = []
    for graphed in (False, True):
        sae = SparseAutoencoder(config)
        sae.initialize_(torch.Generator().manual_seed(0))
        step = TrainingStep(sae, RowOptimizer(sae), LossScaler(enabled=False), "screened")
        source = TensorStream(data["x"], batch_size=64, columns=columns, whole_sequences=True)
        run: Any = GraphedStep(step, _Replay()).run if graphed else step.run  # type: ignore[arg-type]
        metrics = []
        for _ in range(WARMUP_STEPS + 4):
            batches = [source.next_rows() for _ in range(2)]
            run(batches, StepSettings(1e-2, k_aux=0))
            for rows in batches:  # the source may reuse its memory afterwards
                rows.map(torch.Tensor.zero_)
            metrics.append(step.read({}).metrics)
        found.append(metrics)
    assert found[0] == found[1]


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_of_a_step_carry_their_columns(
    device: torch.device, data: dict[str, torch.Tensor], ahead: bool
) -> None:
    device = torch.device("cuda", 0) if device.type == "cuda" else device

    def opened(place: torch.device) -> TensorStream:
        columns = {name: data[name] for name in (RULE, SCORE, "position")}
        return TensorStream(
            data["x"], batch_size=50, columns=columns, whole_sequences=True, device=place
        )

    plain, source = opened(torch.device("cpu")), opened(device)
    batches = StepBatches(source, device, 2, ahead=ahead)
    for _ in range(30):
        taken = batches.take()
        batches.prefetch()
        for rows in taken:
            expected = plain.next_rows()
            assert set(rows.columns) == {RULE, SCORE, "position", STARTS}
            assert torch.equal(rows.x.cpu(), expected.x)
            for name, column in rows.columns.items():
                assert column.device == device
                assert torch.equal(column.cpu(), expected.columns[name])


def test_the_plan_counts_the_probe_and_the_pairs() -> None:
    fields: dict[str, Any] = {"d_in": 100, "d_sae": 1000, "k": 8}
    run = TrainConfig(batch_size=64)
    plain = plan_memory(SAEConfig(**fields), run, native=True, pool_bytes=0).parts
    probed = SAEConfig(**fields, **CLASSES, probe_classes=5, **SMOOTH)
    parts = plan_memory(probed, run, native=True, pool_bytes=0).parts
    assert parts["parameters"] - plain["parameters"] == 4 * 5 * 1001
    assert parts["optimiser states"] - plain["optimiser states"] == 8 * 5 * 1001
    assert parts["probe"] == 4 * 5 * (1000 + 4 * 64)
    assert parts["temporal smoothness"] == 48 * 64 * 8
    assert not {"probe", "temporal smoothness"} & set(plain)


class _Unlabelled:
    """A caller's source without columns."""

    d_in, rows_per_epoch, tokens_served, stall_seconds = D_IN, 640, 0, 0.0

    def next_batch(self) -> torch.Tensor:
        return torch.zeros(64, D_IN)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"probe_loss_coeff": 0.5}, "tensor", "probe_labels is missing: .* with --probe-labels"),
        (CLASSES, "tensor", r"probe_labels needs the column 'labels/rule', .*\(there: none\)"),
        (CLASSES, "position", r"probe_labels needs the column .*\(there: position\)"),
        (SMOOTH, "tensor", "no doc_id, no position, and the activations are not 3-D"),
        (CLASSES, "source", "probe_labels needs the column 'labels/rule'"),
        (SMOOTH, "source", "temporal_smoothness_coeff needs the column 'starts'"),
        ({}, "columns alone", "columns go with a tensor of activations, and none is given"),
    ],
)
def test_data_that_lack_what_a_term_needs_are_refused(
    data: dict[str, torch.Tensor], fields: dict[str, Any], kind: str, message: str
) -> None:
    given: Any = data["x"] if kind in ("tensor", "position") else _Unlabelled()
    columns = None if kind in ("tensor", "source") else {"position": data["position"]}
    with pytest.raises(ValueError, match=message):
        Trainer(sae_config(**fields), RUN, given, columns=columns, show_progress=False)


def test_rows_without_columns_go_through_a_step_unchanged(data: dict[str, torch.Tensor]) -> None:
    source = TensorStream(data["x"], batch_size=50)
    (rows,) = StepBatches(source, torch.device("cpu"), 1, ahead=False).take()
    assert isinstance(rows, Rows)
    assert rows.columns == {}
