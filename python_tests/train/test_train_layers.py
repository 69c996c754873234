"""`--shard-dir` on a folder with a folder of shards for each layer, as a capture writes it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from train_runs import Run, assert_same, metrics, refused

from sae_fast.activations import write_shard
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig

WIDTHS = {"mlp_out.1": 12, "residual.0": 8, "residual.10": 8}


def write_layers(parent: str, suffix: str, write: Callable[[Path, torch.Tensor], object]) -> None:
    for number, (name, width) in enumerate(WIDTHS.items()):
        folder = Path(parent, name)
        folder.mkdir(parents=True)
        for part in ("shard_00000", "heldout_00"):
            generator = torch.Generator().manual_seed(number)
            write(folder / f"{part}{suffix}", torch.randn(300, width, generator=generator))


@pytest.fixture(autouse=True)
def _layers() -> None:
    """Write rows of three hook points, in two widths, with held-out rows."""
    write_layers("captured", ".h5", write_shard)
    Path("captured", "capture.json").write_text("{}")


def test_every_layer_has_the_run_that_it_would_have_alone(run_small: Run) -> None:
    code, out, _ = run_small("--shard-dir", "captured", "--checkpoint-dir", "all")
    assert code == 0
    assert list(json.loads(Path("all/sweep.json").read_text())["runs"]) == list(WIDTHS)
    for name, width in WIDTHS.items():
        assert f"{name}: training topk: d_in {width}, d_sae 32, k 2; 300 rows, 6 steps" in out
        alone = run_small("--shard-dir", f"captured/{name}", "--checkpoint-dir", f"alone/{name}")
        assert alone[0] == 0
        assert_same(f"all/{name}", f"alone/{name}")
        assert metrics(f"all/{name}") == metrics(f"alone/{name}")


def test_a_longer_run_of_all_layers_goes_on_with_each(run_small: Run) -> None:
    flags = ("--shard-dir", "captured", "--checkpoint-dir")
    assert run_small(*flags, "run")[0] == 0
    refused(run_small(*flags, "run"), "mlp_out.1", "already holds a run")
    assert run_small(*flags, "run", "--resume-from", "latest", "--max-steps", "8")[0] == 0
    for name in WIDTHS:
        assert metrics(f"run/{name}")[-1]["step"] == 8


@pytest.mark.slow
def test_a_sweep_is_made_of_every_layer(run_small: Run) -> None:
    Path("sweep.json").write_text('{"k": [1, 2]}')
    flags = ("--shard-dir", "captured", "--checkpoint-dir", "runs", "--sweep", "sweep.json")
    assert run_small(*flags)[0] == 0
    for name, width in WIDTHS.items():
        for k in (1, 2):
            checkpoint = f"runs/{name}/k_{k}/checkpoints/latest"
            config = SparseAutoencoder.from_pretrained(checkpoint).config
            assert (config.d_in, config.k) == (width, k)


@pytest.mark.slow
def test_held_out_rows_and_starts_of_layers_are_in_folders_of_their_names(run_small: Run) -> None:
    for name in WIDTHS:
        Path("aside", name).mkdir(parents=True)
        Path("captured", name, "heldout_00.h5").rename(Path("aside", name, "rows.h5"))
    flags = ("--shard-dir", "captured", "--heldout", "aside", "--checkpoint-dir")
    assert run_small(*flags, "first")[0] == 0
    assert run_small(*flags, "second", "--start-from", "first")[0] == 0
    for name in WIDTHS:
        first, second = metrics(f"first/{name}"), metrics(f"second/{name}")
        assert second[0]["fvu"] < first[0]["fvu"]
        assert "heldout_fvu" in second[-1]
    Path("other").mkdir()
    result = run_small(*flags[:2], "--heldout", "other", "--checkpoint-dir", "third")
    refused(result, "heldout must have a folder mlp_out.1 too, got 'other'")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
def test_layers_of_files_of_tensors_have_the_runs_of_layers_of_shards(
    run_small: Run, suffix: str
) -> None:
    write_layers("tensors", suffix, save_rows)
    assert run_small("--shard-dir", "captured", "--checkpoint-dir", "shards")[0] == 0
    assert run_small("--shard-dir", "tensors", "--checkpoint-dir", "tensor_run")[0] == 0
    for name in WIDTHS:
        assert metrics(f"tensor_run/{name}") == metrics(f"shards/{name}")


def save_rows(path: Path, rows: torch.Tensor) -> None:
    """Write a file of tensors in the format of its suffix."""
    if path.suffix == ".npy":
        np.save(path, rows.numpy())
    elif path.suffix == ".safetensors":
        save_file({"activations": rows}, path)
    else:
        torch.save(rows, path)


def test_files_of_tensors_beside_layers_of_shards_are_no_layer(run_small: Run) -> None:
    for name in ("captured/means.pt", "captured/means.npy"):
        save_rows(Path(name), torch.ones(3, 8))
    # The folder of a model has no activations.
    model = SparseAutoencoder(SAEConfig(d_in=8, d_sae=16, k=2))
    model.save("captured/model")
    code, _, err = run_small("--shard-dir", "captured", "--checkpoint-dir", "all")
    assert code == 0
    assert list(json.loads(Path("all/sweep.json").read_text())["runs"]) == list(WIDTHS)
    assert "not read, because the folders in it hold shards" in err


def test_layers_of_two_kinds_of_files_are_refused(run_small: Run) -> None:
    for name in ("residual.3", "residual.4"):
        Path("captured", name).mkdir()
        save_rows(Path("captured", name, "rows.pt"), torch.ones(300, 8))
    line = refused(run_small("--shard-dir", "captured"), "residual.3 and residual.4 with files of")
    assert "beside mlp_out.1, residual.0 and residual.10 with HDF5 shards, not one kind" in line


def test_targets_of_several_layers_are_refused(run_small: Run) -> None:
    flags = ("--shard-dir", "captured", "--transcoder", "--target-shard-dir", "captured")
    line = refused(run_small(*flags), "target_shard_dir goes with one folder of shards")
    assert "captured holds several" in line
