"""`python -m sae_fast.train` with a probe and with temporal smoothness, and refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from train_runs import Run

from sae_fast.activations import HeldOut, open_shards, write_manifest, write_shard
from sae_fast.autoencoder import SparseAutoencoder

SAMPLE = Path(__file__).parents[2] / "examples" / "activations"
SMALL = (
    *("--d-sae", "32", "--k", "2", "--batch-size", "32", "--max-steps", "4", "--lr", "1e-2"),
    *("--log-every", "2", "--num-threads", "1", "--checkpoint-dir", "run"),
)
PROBE = ("--probe-loss-coeff", "0.5", "--probe-labels", "labels/rule")
SMOOTH = ("--temporal-smoothness-coeff", "0.1")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Write two shards with labels and positions."""
    directory = tmp_path / "shards"
    directory.mkdir()
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        write_shard(
            directory / f"train_{number:02d}.h5",
            torch.randn(300, 8, generator=generator),
            labels={"rule": torch.arange(300) % 4 - 1, "score": torch.arange(300) / 300},
            position=torch.arange(300) % 20,
        )
    return directory


@pytest.fixture
def minilm(tmp_path: Path) -> Path:
    """Write the MiniLM sample, with the rarity of each token as label, special tokens without."""
    directory = tmp_path / "minilm"
    shutil.copytree(SAMPLE, directory)
    for path in directory.glob("train_*.h5"):
        with h5py.File(path, "a") as file:
            token = file["token_ids"][:]
            rarity = np.digitize(token, (2000, 5000))
            file["labels/rarity"] = np.where(token < 999, -1, rarity)
    write_manifest(directory)
    return directory


@pytest.mark.slow
def test_a_sample_of_minilm_trains_with_probe_and_smoothness(run: Run, minilm: Path) -> None:
    flags = (
        *("--shard-dir", minilm, "--d-sae", 768, "--k", 16, "--batch-size", 512, "--lr", "3e-3"),
        *("--max-steps", 60, "--log-every", 20, "--pool-rows", 4000, "--checkpoint-dir", "run"),
    )
    guided = ("--probe-loss-coeff", 20, "--probe-labels", "labels/rarity")
    code, out, _ = run(*flags, *guided, "--temporal-smoothness-coeff", 0.02)
    assert code == 0
    for name in ("probe_loss", "temporal_loss", "probe_accuracy"):
        assert name in out
    content = json.loads(Path("run/training_history.json").read_text())
    history = content["history"]
    for name in ("probe_loss", "temporal_loss", "probe_accuracy"):
        assert len([value for value in history[name] if value is not None]) == 3
    assert content["config"]["sae"]["probe_classes"] == 3
    shares = _label_shares(minilm)
    assert content["summary"]["final_probe_accuracy"] > shares.max() + 0.1
    assert content["summary"]["final_heldout_fvu"] < 0.6
    sae = SparseAutoencoder.from_pretrained("run/checkpoints/latest")
    rows = next(iter(HeldOut(open_shards([minilm / "heldout_00.h5"]), batch_size=100)))
    assert sae.probe(sae.encode(rows)).shape == (100, 3)
    code, _, err = run("--resume-from", "run", "--max-steps", 80)
    assert code == 0
    assert "resumed from" in err


def _label_shares(directory: Path) -> Any:
    found = []
    for path in sorted(directory.glob("train_*.h5")):
        with h5py.File(path) as file:
            found.append(file["labels/rarity"][:])
    labels = np.concatenate(found)
    return np.bincount(labels[labels >= 0]) / (labels >= 0).sum()


def test_a_regression_logs_r2(run: Run, shards: Path) -> None:
    flags = ("--probe-loss-coeff", 0.1, "--probe-labels", "labels/score")
    code, out, _ = run("--shard-dir", shards, *SMALL, *flags, "--probe-task", "regression")
    assert code == 0
    assert "probe_r2" in out
    assert "probe_accuracy" not in out


def _rule(numbers: Any) -> Callable[[h5py.File], None]:
    def write(file: h5py.File) -> None:
        del file["labels/rule"]
        file["labels/rule"] = np.asarray(numbers)

    return write


def _without(name: str) -> Callable[[h5py.File], None]:
    def delete(file: h5py.File) -> None:
        del file[name]

    return delete


SECOND = "train_01.h5"
BAD_INPUT = {
    "no labels named": (PROBE[:2], None, ("probe_labels", "--probe-labels")),
    "labels that no shard has": (
        (*PROBE[:3], "labels/fact"),
        None,
        ("train_00.h5", "no dataset 'labels/fact'", "labels/rule", "labels/score", "position"),
    ),
    "labels that one shard lacks": (
        PROBE,
        _without("labels/rule"),
        (SECOND, "no dataset 'labels/rule'", "labels/score (300,)"),
    ),
    "labels of another length": (PROBE, _rule([0] * 299), (SECOND, "labels/rule", "(299,)")),
    "labels below -1": (PROBE, _rule([-2] * 300), (SECOND, "labels/rule", "row 0 holds -2")),
    "labels that are not finite": (
        (*PROBE[:3], "labels/score", "--probe-task", "regression"),
        lambda file: file["labels/score"].write_direct(np.full(300, np.nan, np.float32)),
        (SECOND, "labels/score", "row 0 holds nan"),
    ),
    "labels out of range": (
        (*PROBE, "--probe-classes", "3"),
        _rule([0] * 299 + [5]),
        (SECOND, "labels/rule has the label 5", "probe_classes is 3"),
    ),
    "a label of many millions": (
        PROBE,
        _rule([0] * 299 + [10**9]),
        (SECOND, "labels/rule has the label 1,000,000,000", "give probe_classes"),
    ),
    "a single class": (
        (*PROBE[:3], "doc_id"),
        None,
        ("doc_id", "the only label is 0"),
    ),
    "no label at all": ((*PROBE[:3], "labels/none"), None, ("labels/none", "all are -1")),
    "classes of real numbers": (
        (*PROBE[:3], "labels/score"),
        None,
        ("labels/score", "whole ones", "--probe-task"),
    ),
    "classes in a regression": (
        (*PROBE, "--probe-task", "regression", "--probe-classes", "3"),
        None,
        ("probe_classes", "regression"),
    ),
    "no sequences": (SMOOTH, _without("position"), (SECOND, "no doc_id, no position", "3-D")),
    "no neighbours": (
        SMOOTH,
        "alone",
        ("train_00.h5", "no row continues the sequence of the row"),
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, shards: Path, case: str) -> None:
    flags, spoil, parts = BAD_INPUT[case]
    for path in shards.iterdir():
        with h5py.File(path, "a") as file:
            if case == "a single class":
                file["doc_id"] = np.zeros(300, int)
            if case == "no label at all":
                file["labels/none"] = np.full(300, -1)
            if spoil == "alone":
                file["position"][:] = 7
    if callable(spoil):
        with h5py.File(shards / SECOND, "a") as file:
            spoil(file)
    code, _, err = run("--shard-dir", shards, *SMALL, *flags)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0] == err.splitlines()[-1]
    for part in parts:
        assert part in lines[0]
    assert not Path("run").exists()
