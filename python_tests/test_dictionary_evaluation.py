"""`evaluate_dictionary`: the metrics and files of the command in one call."""

import json
from pathlib import Path

import pytest
import torch

import sae_fast
from sae_fast import SAEConfig, SparseAutoencoder, evaluate_dictionary
from sae_fast.activations import ShardMetadata, write_shard
from sae_fast.evaluate import main

ORIGIN = {"model": "some/model", "hook": "residual.1", "layer": "1"}
ROWS = 120


@pytest.fixture
def place(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "shards").mkdir()
    metadata = ShardMetadata(model="some/model", hook="residual.1", layer=1)
    columns = {"token_ids": torch.arange(ROWS) % 7, "doc_id": torch.arange(ROWS) // 9}
    rows = torch.randn(ROWS, 16, generator=generator)
    write_shard(tmp_path / "shards" / "heldout_00.h5", rows, metadata=metadata, **columns)
    write_shard(tmp_path / "shards" / "train_00.h5", rows, metadata=metadata, **columns)
    sae = SparseAutoencoder(SAEConfig(d_in=16, d_sae=30, k=4, arch="batch_topk"))
    sae.initialize_(generator)
    sae.get_buffer("threshold_updates").fill_(1)  # as after a training
    sae.get_buffer("threshold").fill_(0.5)
    sae.origin = dict(ORIGIN)
    sae.save(tmp_path / "sae")
    return tmp_path


def test_one_call_gives_the_numbers_and_files_of_the_command(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, command = place / "shards", place / "command"
    words = (place / "sae", "--shard-dir", shards, "--top-rows", 4, "--out", command)
    assert main(list(map(str, words))) == 0
    found = evaluate_dictionary(place / "sae", shards, top_rows=4)
    found.save(place / "call")
    assert sorted(path.name for path in command.iterdir()) == sorted(
        path.name for path in (place / "call").iterdir()
    )
    for path in command.iterdir():
        if path.name != "saebench_core.json":  # which has the time and an identifier
            assert path.read_bytes() == (place / "call" / path.name).read_bytes(), path.name
    content = json.loads((command / "metrics.json").read_text())
    assert content["metrics"]["sparsity"] == found.metrics["sparsity"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {command / 'report.html'}"
    l0, by_training = (found.metrics["sparsity"][name] for name in ("l0", "l0_training_rule"))
    assert f"L0 {l0:.1f} is by the rule of inference" in lines[1]
    assert lines[1].endswith(f"it is {by_training:.1f}")
    assert by_training == pytest.approx(4)
    assert l0 != pytest.approx(4)


def test_a_model_in_memory_is_measured_and_left_as_it_is(place: Path) -> None:
    read = evaluate_dictionary(place / "sae", place / "shards", top_rows=0)
    sae = SparseAutoencoder.from_pretrained(place / "sae", trainable=True).train()
    found = evaluate_dictionary(sae, place / "shards", name="mine", top_rows=0)
    assert found.metrics == read.metrics
    assert (found.name, read.name) == ("mine", "sae")
    assert found.to_dict()["sae"]["path"] is None
    assert sae.training
    assert sae.W_dec.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "labels/kind"}, "labels/kind"),
        ({"lables": "labels/kind"}, "lables"),
        ({"ablate_latents": [3]}, "needs a dataset that the model reads"),
        ({"out": "metrics"}, "out"),
        ({"max_rows": 0}, "max_rows"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(
    place: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        evaluate_dictionary(place / "sae", place / "shards", **settings)
    assert "\n" not in str(error.value)


def test_rows_must_be_named(place: Path) -> None:
    with pytest.raises(ValueError, match="shards or dataset must be given"):
        sae_fast.evaluate_dictionary(place / "sae")


@pytest.mark.parametrize("sae", [None, 5, b"sae", object(), ""])
def test_what_is_no_dictionary_is_refused_by_its_name(place: Path, sae: object) -> None:
    with pytest.raises(ValueError, match="sae must be a SparseAutoencoder or the path") as error:
        evaluate_dictionary(sae, place / "shards")  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shards", [torch.ones(3, 16), [[1.0] * 16], 5, ""])
def test_what_is_no_directory_of_shards_is_refused_by_its_name(place: Path, shards: object) -> None:
    with pytest.raises(ValueError, match="shards must be the path of a directory") as error:
        evaluate_dictionary(place / "sae", shards)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
