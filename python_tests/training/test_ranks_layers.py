"""`--mesh layers=R`: processes that make the trainings of a sweep, a block of them each."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import layers_worker
import pytest
import several_ranks
import torch
from safetensors.torch import load_file
from several_ranks import assert_near, tensors_of
from small_models import make_network, save_model
from small_texts import make_texts
from torch import nn

from sae_fast import RunConfig, TrainConfig
from sae_fast.activations import write_shard
from sae_fast.distributed.ranks import Ranks
from sae_fast.training import run_directory
from sae_fast.training.sweep import Sweep, own_trainings

HOOKS = [f"residual.{number}" for number in range(layers_worker.LAYERS)]
SLOTS = [f"{name}/feature_activation" for name in ("first", "second")]
LAYERS = [f"layer_{number}" for number in range(layers_worker.LAYERS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("layers")
    for number, name in enumerate(LAYERS):
        (directory / "shards" / name).mkdir(parents=True)
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(200, 16, generator=generator)
        write_shard(
            directory / "shards" / name / "train.h5",
            x,
            labels={"relation": torch.arange(200) % 3 - 1},
        )
    return directory


@pytest.fixture(scope="module")
def network(place: Path) -> nn.Module:
    network = make_network("gpt2")
    torch.save(network, place / "network.pt")
    save_model(place / "model", "gpt2")
    (place / "text.txt").write_text("\n".join(text for text in make_texts() if text))
    return network


@pytest.fixture(scope="module")
def ranks(place: Path, network: nn.Module, alone: object) -> list[dict[str, Any]]:
    """Return what two processes have done together."""
    ends = several_ranks.run("layers_worker", place)
    assert [end.returncode for end in ends] == [0, -signal.SIGKILL], ends[0].stderr + ends[1].stderr
    return [torch.load(place / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(place: Path, network: nn.Module) -> dict[str, list[Any]]:
    """Let one process make the same trainings; return what the model has read, and its losses."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
        assert layers_worker.command(place, "one")[0] == 0
        with layers_worker.counted_tokens() as tokens:
            layers_worker.from_model(place / "one-of-model", network)
        layers_worker.opened_from_model(network, place / "one-of-text").train()
        given = {"normalizations": ["mean_scale"]}
        with layers_worker.counted_tokens() as of_one:
            layers_worker.opened_from_model(network, place / "whole-of-text", **given).train()
        given["grad_acc_steps"] = 2
        layers_worker.opened_from_model(network, place / "steps-of-text", **given).train()
        for loss_fn in layers_worker.LOSSES:
            out = place / f"one-of-model-{loss_fn}"
            layers_worker.from_model(out, network, loss_fn=loss_fn)
        layers_worker.slots(place, "one-slots")
        losses = layers_worker.in_model(place)
        given = layers_worker.configs(place, checkpoint_dir=str(place / "whole"))
        Sweep(given, show_progress=False).train()
    torch.set_num_threads(threads)
    return {"losses": losses, "tokens": tokens, "tokens of one": of_one}


def assert_equal_runs(first: Path, other: Path) -> None:
    """Assert that two runs have left a last checkpoint with equal bits."""
    for name in ("sae.safetensors", "trainer.safetensors"):
        places = [run / "checkpoints/latest" / name for run in (first, other)]
        tensors, same = map(load_file, places)
        assert tensors.keys() == same.keys()
        for key, tensor in tensors.items():
            if not key.startswith("rng."):
                assert torch.equal(tensor, same[key]), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "two", "names"),
    [
        ("one", "two", LAYERS),
        ("one-of-model", "two-of-model", HOOKS),
        ("one-of-text", "two-of-text", ["residual.1/none", "residual.1/mean_scale"]),
        ("steps-of-text", "data-of-text", ["residual.1/mean_scale"]),
        ("one-of-model-ce", "two-of-model-ce", HOOKS),
        ("one-of-model-kl", "two-of-model-kl", HOOKS),
        ("one-slots", "two-slots", SLOTS),
        ("whole", "stopped", ["first", "second"]),
    ],
)
def test_the_trainings_are_those_of_one_process_to_the_bit(
    ranks: list[dict[str, Any]], place: Path, one: str, two: str, names: list[str]
) -> None:
    for name in names:
        assert_equal_runs(place / one / name, place / two / name)
    if two == "two":  # old checkpoints are removed as by one process
        folders = [
            sorted(p.name for p in (place / run).glob("*/checkpoints/*")) for run in (one, two)
        ]
        assert folders[0] == folders[1]


@pytest.mark.slow
def test_one_process_writes_the_summary_of_all(ranks: list[dict[str, Any]], place: Path) -> None:
    assert ranks[0]["trained"][0] == 0
    assert ranks[1]["trained"] == (0, "")  # and no log lines
    runs = [json.loads((place / run / "sweep.json").read_text())["runs"] for run in ("one", "two")]
    assert list(runs[0]) == list(runs[1]) == LAYERS
    for name in LAYERS:
        assert runs[0][name]["final_fvu"] == runs[1][name]["final_fvu"]


@pytest.mark.slow
def test_divided_latents_are_measured_in_the_language_model_as_whole_ones(
    ranks: list[dict[str, Any]], alone: dict[str, list[Any]]
) -> None:
    measured = [row for row in alone["losses"] if row]
    assert len(measured) == 2
    assert measured[0]["heldout_ce"] != measured[1]["heldout_ce"]
    assert "heldout_ce_score" in measured[0]
    for found in ranks:
        for expected, row in zip(alone["losses"], found["in model"], strict=True):
            assert row == pytest.approx(expected, 1e-4)


@pytest.mark.slow
def test_each_text_is_read_by_the_model_of_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, list[Any]]
) -> None:
    expected = alone["tokens"]
    assert len(expected) >= 8
    for rank, found in enumerate(ranks):
        assert found["tokens"] == expected[rank::2]
    passes = [found["tokens of one"] for found in ranks]  # of held-out text too
    assert sorted(passes[0] + passes[1]) == sorted(alone["tokens of one"])
    assert abs(len(passes[0]) - len(passes[1])) <= 2


@pytest.mark.slow
def test_one_training_straight_from_a_model_divides_its_batches_or_latents(
    ranks: list[dict[str, Any]], place: Path
) -> None:
    assert [found["data goes on"] for found in ranks] == [[2], [2]]
    name = "residual.1/mean_scale"
    found = [tensors_of(place / run / name) for run in ("whole-of-text", "latents-of-text")]
    assert_near(*found)
    for one in ranks:
        assert "divides one training, and these are several" in one["several"]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(ranks: list[dict[str, Any]]) -> None:
    assert [found["trainings"] for found in ranks] == [["first"], ["second"]]
    for found in ranks:
        assert found["stopped"] == found["continued"] == found["goes on"] == [3]


@pytest.mark.slow
def test_what_cannot_be_divided_is_refused_once(ranks: list[dict[str, Any]]) -> None:
    assert [code for code, _ in (found["data"] for found in ranks)] == [2, 2]
    assert "divides one training, and these are several" in ranks[0]["data"][1]
    assert ranks[1]["data"][1] == ""
    for found in ranks:
        assert "divides several trainings, and this is one" in found["one"]
        assert "more processes than there are trainings, 1" in found["few"]
        assert "rank 1 differs from rank 0 in its settings" in found["settings"]
        assert "layer_2" in found["gone"]
    assert ranks[0]["gone"].startswith("rank 1: layer_2: ")


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["killed"] == "rank 1 has ended, or did not answer in time"


def test_trainings_are_divided_into_blocks() -> None:
    config = RunConfig(mesh="layers=3")
    configs = {f"layer_{number}": config for number in range(12)}
    found = [own_trainings(configs, Ranks(rank, 3)) for rank in range(3)]
    assert list(found[0]) == ["layer_0", "layer_1", "layer_2", "layer_3"]
    assert [name for part in found for name in part] == list(configs)
    assert {config.train.mesh for part in found for config in part.values()} == {None}
    sizes = [len(own_trainings(dict(list(configs.items())[:7]), Ranks(r, 3))) for r in range(3)]
    assert sizes == [2, 2, 3]


def test_processes_divide_one_thing_only() -> None:
    with pytest.raises(ValueError, match="divide nothing else, give layers=3 alone"):
        TrainConfig(mesh="data=2,layers=3")
    assert TrainConfig(mesh="data=2,layers=1").batches_per_step == 2
