"""A caller's own source and tensors: faults are reported, and they are not changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.activations import TARGETS, Column, Rows
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.trainer import Trainer

D_IN, BATCH = 12, 32
ROWS = torch.randn(320, D_IN, generator=torch.Generator().manual_seed(0)) + 3
SAE = SAEConfig(d_sae=40, k=4)
RUN = TrainConfig(batch_size=BATCH, max_steps=12, lr=1e-2, log_every=1)


class Source:
    """Serves views of rows in order, without end, with labels and targets if requested."""

    d_in, rows_per_epoch, stall_seconds, epoch = D_IN, len(ROWS), 0.0, 0

    def __init__(self, rows: torch.Tensor, **columns: torch.Tensor) -> None:
        self.rows, self.beside, self.served = rows, columns, 0
        kinds = {"labels": torch.int64, "scores": torch.float32, TARGETS: torch.float32}
        self.columns = {
            name: Column(
                *(name, kinds[name]),
                maximum=float(column.max()),
                width=0 if column.ndim == 1 else column.shape[1],
            )
            for name, column in columns.items()
        }

    @property
    def tokens_served(self) -> int:
        return BATCH * self.served

    def next_batch(self) -> Any:
        return self.next_rows().x

    def next_rows(self) -> Any:
        first = BATCH * self.served % len(self.rows)
        self.served += 1
        place = slice(first, first + BATCH)
        return Rows(self.rows[place], {name: part[place] for name, part in self.beside.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]

    def close(self) -> None:
        pass


class Reusing(Source):
    """A source that fills one buffer again and again."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__(rows)
        self._buffer = torch.empty(BATCH, D_IN)

    def next_batch(self) -> torch.Tensor:
        return self._buffer.copy_(super().next_rows().x)

    next_rows = None  # type: ignore[assignment]


def trained(source: Any, sae: SAEConfig = SAE, run: TrainConfig = RUN, **more: Any) -> Trainer:
    trainer = Trainer(sae, run, source, show_progress=False, **more)
    trainer.train()
    return trainer


def same(one: Trainer, other: Trainer) -> bool:
    pairs = zip(one.sae.state_dict().values(), other.sae.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["mean_scale", "none"])
@pytest.mark.parametrize("arch", ["topk", "batch_topk", "relu", "jumprelu", "gated", "slots"])
def test_what_a_source_serves_stays_as_it_is(arch: Any, normalize: Any) -> None:
    rows, targets = ROWS.clone(), ROWS[:, :7].clone()
    beside = {"labels": torch.arange(len(ROWS)) % 3, "scores": torch.rand(len(ROWS))}
    own = {}
    if arch == "slots":
        own = {"n_relations": 3, "n_answers": 3, "relation_labels": "labels"}
        own |= {"answer_labels": "labels"}
    sae = SAEConfig(arch=arch, d_sae=40, normalize_activations=normalize, **own)
    before = {name: column.clone() for name, column in beside.items()}
    trained(Source(rows, **beside), sae)
    assert torch.equal(rows, ROWS)
    assert all(torch.equal(beside[name], column) for name, column in before.items())
    transcoder = SAEConfig(transcoder=True, d_sae=40, normalize_activations=normalize)
    trained(Source(rows, targets=targets), transcoder)
    assert torch.equal(rows, ROWS)
    assert torch.equal(targets, ROWS[:, :7])


@pytest.mark.parametrize("normalize", ["mean_scale", "none"])
def test_given_tensors_stay_as_they_are(normalize: Any) -> None:
    given = {name: ROWS.clone() for name in ("data", "heldout")}
    columns = {"labels": torch.arange(len(ROWS)) % 3, "targets": ROWS[:, :7].clone()}
    sae = SAEConfig(
        d_sae=40,
        normalize_activations=normalize,
        transcoder=True,
        probe_loss_coeff=0.5,
        probe_labels="labels",
    )
    heldout_columns = {"targets": ROWS[:, :7].clone()}
    trained(
        given["data"],
        sae,
        heldout=given["heldout"],
        columns=columns,
        heldout_columns=heldout_columns,
    )
    assert all(torch.equal(tensor, ROWS) for tensor in given.values())
    assert torch.equal(columns["labels"], torch.arange(len(ROWS)) % 3)
    assert torch.equal(columns["targets"], ROWS[:, :7])
    assert torch.equal(heldout_columns["targets"], ROWS[:, :7])


@pytest.mark.parametrize("normalize", ["mean_scale", "none"])
@pytest.mark.parametrize("init", ["random", "active_subspace"])
def test_a_source_may_use_one_buffer_for_all_batches(normalize: Any, init: Any) -> None:
    sae = replace(SAE, normalize_activations=normalize, decoder_init=init)
    run = replace(RUN, grad_acc_steps=2, max_steps=6)
    assert same(trained(Reusing(ROWS), sae, run), trained(Source(ROWS), sae, run))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_every_float_type_are_trained_on_as_float32(dtype: torch.dtype) -> None:
    rows = ROWS.to(dtype)
    assert same(trained(Source(rows)), trained(Source(rows.float())))


def test_tensors_made_in_inference_mode_are_trained_on() -> None:
    with torch.inference_mode():
        rows = ROWS.clone()
    sae = replace(SAE, normalize_activations="none")
    assert same(trained(Source(rows), sae), trained(Source(ROWS), sae))


def without(name: str) -> Any:
    """Return a source without one of its members."""
    kinds = {key: value for key, value in vars(Source).items() if key != name}
    return type("Own", (), kinds)(ROWS)


def serving(batch: Any, **changes: Any) -> Source:
    source = Source(ROWS)
    vars(source).update(next_rows=lambda: batch, next_batch=lambda: batch, **changes)
    return source


GOOD = ROWS[:BATCH]
LABELLED: dict[str, Any] = {"columns": {"a": Column("a", torch.int64)}}
WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: without("d_in"), "a source of activations has d_in, .*; Own lacks d_in$"),
    (lambda: without("load_state_dict"), "Own lacks load_state_dict$"),
    (lambda: without("close"), "Own lacks close$"),
    (lambda: serving(GOOD, d_in=0), "data: d_in must be a whole number from 1, got 0"),
    (lambda: serving(GOOD, rows_per_epoch=2.5), "rows_per_epoch must be a whole number .* got 2.5"),
    (lambda: serving(GOOD, batch_size=7), "batch_size must be 32, got a source that serves 7"),
    (lambda: serving(GOOD.numpy()), r"must give a tensor \[32, 12\], got ndarray"),
    (lambda: serving(None), r"must give a tensor \[32, 12\], got NoneType"),
    (lambda: serving(GOOD[:, :5]), r"must give a tensor \[32, 12\], got shape \[32, 5\]"),
    (lambda: serving(GOOD[:9]), r"must give a tensor \[32, 12\], got shape \[9, 12\]"),
    (lambda: serving(GOOD[None]), r"must give a tensor \[32, 12\], got shape \[1, 32, 12\]"),
    (lambda: serving(GOOD.long()), "activations must be float16, .*, got torch.int64"),
    (lambda: serving(GOOD + 0j), "activations must be float16, .*, got torch.complex64"),
    (lambda: serving(GOOD, **LABELLED), "next_rows must give rows and a dictionary of columns"),
    (lambda: serving((GOOD, {}), **LABELLED), "next_rows has not served the columns a"),
    (
        lambda: serving((GOOD, {"a": torch.arange(5)}), **LABELLED),
        r"next_rows: a must be a tensor \[32\], got shape \[5\]",
    ),
    (
        lambda: serving((GOOD, {"a": torch.rand(BATCH)}), **LABELLED),
        "next_rows: a must be torch.int64, got torch.float32",
    ),
    (
        lambda: serving(GOOD, state_dict=lambda: {"at": torch.ones(2)}),
        "state_dict must give what json can write: Object of type Tensor",
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_what_is_wrong_with_a_source_is_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        trained(make())
    assert "\n" not in str(caught.value)


def test_a_batch_that_is_wrong_is_told_in_the_middle_of_a_training() -> None:
    source = Source(ROWS)
    good = source.next_batch
    source.next_batch = lambda: good()[:, : 5 if source.served > 20 else None]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"data: next_batch must give a tensor \[32, 12\]"):
        trained(source, run=replace(RUN, max_steps=40))


def test_labels_of_a_source_are_those_that_its_column_says() -> None:
    labels = torch.arange(len(ROWS)) % 3
    sae = replace(SAE, probe_loss_coeff=0.5, probe_labels="labels")
    assert trained(Source(ROWS, labels=labels), sae).sae_config.probe_classes == 3
    source = Source(ROWS, labels=labels)
    labels[20 * BATCH % len(ROWS) + 5] = 3
    with pytest.raises(ValueError, match="labels holds 3, labels are -1 for none or 0 to 2"):
        trained(source, sae)
    source.columns = {"labels": Column("labels", torch.int64)}
    with pytest.raises(ValueError, match="the source must say the largest label"):
        trained(source, sae)


def test_a_source_is_resumed_where_it_stood(tmp_path: Path) -> None:
    run = replace(RUN, checkpoint_dir=str(tmp_path), decay_fraction=0.2, warmup_steps=1)
    straight = trained(Source(ROWS), run=replace(run, checkpoint_dir=None))
    trained(Source(ROWS), run=replace(run, checkpoint_every=5))
    going_on = replace(run, resume_from=str(tmp_path / "checkpoints/step-00000005"))
    resumed = trained(Source(ROWS), run=replace(going_on, checkpoint_dir=None))
    assert same(straight, resumed)
    assert json.dumps(resumed.batches.state_dict()) == json.dumps({"served": 12})
