"""`python -m sae_fast.train --transcoder` on real activations, and refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from train_runs import Run

from sae_fast.activations import write_manifest, write_shard
from sae_fast.autoencoder import SparseAutoencoder

SAMPLE = Path(__file__).parents[2] / "examples" / "activations"
D_IN, D_OUT = 384, 48
SMALL = (
    *("--transcoder", "--d-sae", "256", "--batch-size", "256", "--max-steps", "120"),
    *("--lr", "3e-3", "--log-every", "20", "--eval-every", "0", "--num-threads", "1"),
    *("--checkpoint-dir", "run"),
)
MODELS: dict[str, tuple[str, ...]] = {
    "topk": ("--k", "16"),
    "skip": ("--k", "16", "--skip-connection", "--decoder-init", "orthogonal"),
    "batch_topk": ("--arch", "batch_topk", "--k", "16"),
    "jumprelu": ("--arch", "jumprelu", "--jumprelu-threshold-lr", "3", "--skip-connection"),
    "gated": ("--arch", "gated", "--b-dec-init", "mean"),
}


def mlp(x: torch.Tensor) -> torch.Tensor:
    """Return the outputs [n, 48] of a fixed MLP on the real activations."""
    generator = torch.Generator().manual_seed(4)
    inner = torch.randn(D_IN, 96, generator=generator) / D_IN**0.5
    outer = torch.randn(96, D_OUT, generator=generator)
    return (8 * x @ inner).relu() @ outer


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the MiniLM sample and the outputs to `x`, as two datasets, and the outputs to `y`."""
    parent = tmp_path_factory.mktemp("pairs")
    shutil.copytree(SAMPLE, parent / "x")
    (parent / "y").mkdir()
    for path in (parent / "x").glob("*.h5"):
        with h5py.File(path, "a") as file:
            y = mlp(torch.from_numpy(file["activations"][:]).float())
            file["outputs"] = y.half().numpy()
            columns = {name: file[name][:] for name in ("token_ids", "position") if name in file}
        write_shard(parent / "y" / path.name, y, **columns)
    for name in ("x", "y"):
        write_manifest(parent / name)
    return parent


def _rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_training_on_real_pairs_explains_most_of_the_targets(
    model: str, run: Run, pairs: Path
) -> None:
    places = ("--shard-dir", pairs / "x", "--target-shard-dir", pairs / "y")
    code, out, _ = run(*SMALL, *MODELS[model], *places)
    assert code == 0
    kind = "skip transcoder" if "--skip-connection" in MODELS[model] else "transcoder"
    assert f"{kind}: d_in {D_IN}, d_out {D_OUT}, d_sae 256" in out
    row = _rows(Path("run"))[-1]
    assert row["heldout_fvu"] < 0.5
    sae = SparseAutoencoder.from_pretrained(Path("run") / "checkpoints" / "latest")
    with h5py.File(pairs / "x" / "heldout_00.h5") as file:
        x = torch.from_numpy(file["activations"][:]).float()
    with torch.no_grad():
        found = sae.get_reconstruction_error(mlp(x), sae(x))
    assert found["fvu"] == pytest.approx(row["heldout_fvu"], rel=0.01)


@pytest.mark.slow
def test_both_ways_to_name_the_targets_train_the_same_model(run: Run, pairs: Path) -> None:
    flags = (*SMALL, "--k", "8", "--shard-dir", pairs / "x", "--max-steps", "5")
    ways = {
        "one": ("--target-key", "outputs"),
        "two": ("--target-shard-dir", pairs / "y"),
        "apart": ("--target-shard-dir", pairs / "y", "--target-heldout", pairs / "y"),
    }
    fvu = {}
    for name, way in ways.items():
        if name == "apart":  # a directory of held-out targets must hold no others
            (pairs.parent / "held").mkdir(exist_ok=True)
            shutil.copy(pairs / "y" / "heldout_00.h5", pairs.parent / "held")
            way = (*way[:2], "--target-heldout", pairs.parent / "held")
        assert run(*flags, *way, "--checkpoint-dir", name)[0] == 0
        fvu[name] = _rows(Path(name))[-1]["heldout_fvu"]
    assert fvu["two"] == fvu["apart"] == pytest.approx(fvu["one"], rel=1e-3)  # float32 and 16


def test_resuming_needs_no_flag_of_the_targets(run: Run, pairs: Path) -> None:
    flags = (*SMALL, "--k", "8", "--shard-dir", pairs / "x", "--target-shard-dir", pairs / "y")
    assert run(*flags, "--max-steps", "2")[0] == 0
    assert run("--resume-from", "run", "--max-steps", "3")[0] == 0
    assert [row["step"] for row in _rows(Path("run"))][-1] == 3


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Write two small shards of inputs and outputs, and one held out."""
    for side, width in (("x", 8), ("y", 5)):
        (tmp_path / side).mkdir()
        for number, name in enumerate(("train_00", "train_01", "heldout_00")):
            generator = torch.Generator().manual_seed(number)
            rows = torch.randn(300, width, generator=generator)
            write_shard(tmp_path / side / f"{name}.h5", rows, token_ids=torch.arange(300) + number)
    return tmp_path


def _without_held(small: Path) -> None:
    (small / "y" / "heldout_00.h5").unlink()


def _fewer_held(small: Path) -> None:
    write_shard(small / "y" / "heldout_00.h5", torch.randn(299, 5))


def _wider_held(small: Path) -> None:
    write_shard(small / "y" / "heldout_00.h5", torch.randn(300, 6))


def _not_finite(small: Path) -> None:
    with h5py.File(small / "y" / "train_01.h5", "a") as file:
        file["activations"][7] = float("nan")
        file.attrs.pop("checksum")


def _swapped(small: Path) -> None:
    (small / "y" / "train_01.h5").rename(small / "y" / "other")
    (small / "y" / "train_00.h5").rename(small / "y" / "train_01.h5")
    (small / "y" / "other").rename(small / "y" / "train_00.h5")


APART = ("--target-shard-dir", "y")
BAD: dict[str, tuple[tuple[str, ...], Callable[[Path], None] | None, str]] = {
    "no targets": (("--transcoder",), None, "a transcoder needs targets: name their data set"),
    "no transcoder": (("--target-key", "outputs"), None, "target_key belongs to a transcoder"),
    "no transcoder, a directory": (APART, None, "target_shard_dir belongs to a transcoder"),
    "skip without": (("--skip-connection",), None, "skip_connection belongs to a transcoder"),
    "no such key": (
        ("--transcoder", "--target-key", "outs"),
        None,
        "no dataset 'outs'; it holds activations (300, 8) and token_ids (300,) (name one with -",
    ),
    "no such directory": (
        ("--transcoder", "--target-shard-dir", "z"),
        None,
        "z: no such directory",
    ),
    "another d_out": (("--transcoder", *APART, "--d-out", "6"), None, "d_out must be 5, the width"),
    "held-out targets missing": (
        ("--transcoder", *APART),
        _without_held,
        "y: has no heldout_00.h5 with the targets of x/heldout_00.h5",
    ),
    "fewer held out": (("--transcoder", *APART), _fewer_held, "has 299 rows of targets, x/held"),
    "wider held out": (("--transcoder", *APART), _wider_held, "heldout_00.h5: rows are 6 wide"),
    "not finite": (("--transcoder", *APART), _not_finite, "y/train_01.h5: row 7 holds NaN or Inf"),
    "other tokens": (
        ("--transcoder", *APART),
        _swapped,
        "y/train_00.h5: row 0 belongs to another token",
    ),
    "one file for all": (
        ("--transcoder", "--target-shard-dir", "y/train_00.h5"),
        None,
        "y/train_00.h5: targets of one shard, but there are 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_targets_are_one_line(case: str, run: Run, small: Path) -> None:
    flags, spoil, message = BAD[case]
    if spoil is not None:
        spoil(small)
    code, _, err = run("--shard-dir", "x", "--batch-size", "32", "--k", "2", *flags)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) == (2, 1)
    assert message in lines[0]
    assert not Path("runs").exists()


def test_a_row_that_is_not_finite_can_be_dropped_with_its_input(run: Run, small: Path) -> None:
    _not_finite(small)
    flags = ("--transcoder", *APART, "--skip-nonfinite", "--max-steps", "2", "--k", "2")
    code, out, _ = run("--shard-dir", "x", "--batch-size", "32", *flags)
    assert code == 0
    assert "599 rows" in out


def test_single_files_are_a_pair_whatever_their_names(run: Run, small: Path) -> None:
    (small / "y" / "train_00.h5").rename(small / "outputs.h5")
    flags = ("--transcoder", "--target-shard-dir", "outputs.h5", "--max-steps", "2", "--k", "2")
    code, out, _ = run("--shard-dir", "x/train_00.h5", "--batch-size", "32", *flags)
    assert code == 0
    assert "d_in 8, d_out 5" in out


def test_single_files_with_held_out_rows_need_targets_of_these(run: Run, small: Path) -> None:
    flags = (
        "--transcoder",
        "--target-shard-dir",
        "y/train_00.h5",
        "--heldout",
        "x/heldout*",
        "--k",
    )
    code, _, err = run("--shard-dir", "x/train_00.h5", "--batch-size", "32", *flags, "2")
    assert code == 2
    assert "target_heldout is missing: y/train_00.h5 is one file" in err
