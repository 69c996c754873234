"""`python -m sae_fast.train`: shards, directories and checkpoints that are refused in one line."""

import math
from pathlib import Path

import h5py
import pytest
import torch
from full_disk import files_up_to
from train_runs import D_IN, Run, refused

from sae_fast.activations import write_shard
from sae_fast.autoencoder.topk import TopK


def test_k_larger_than_what_the_data_allow(run: Run, shards: Path) -> None:
    result = run("--shard-dir", shards, "--k", 9, "--expansion-factor", 1)
    refused(result, "k must be at most d_sae = 8, got 9")


@pytest.mark.parametrize("flags", [(), ("--shard-dir", "nowhere"), ("--shard-dir", "empty")])
def test_no_shards(run_small: Run, tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "empty").mkdir()
    refused(run_small(*flags), flags[1] if flags else "--shard-dir")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_shard(run_small: Run, shards: Path, share: float) -> None:
    path = shards / "train_01.h5"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(run_small("--shard-dir", shards), path)
    assert not Path("runs").exists()


def test_a_file_that_is_not_hdf5(run_small: Run, shards: Path) -> None:
    (shards / "train_02.h5").write_text("activations, honestly")
    refused(run_small("--shard-dir", shards), "train_02.h5", "not an HDF5 file")


def test_a_wrong_dataset_key_lists_what_is_there(run_small: Run, shards: Path) -> None:
    result = run_small("--shard-dir", shards, "--activations-key", "acts")
    refused(result, "'acts'", "activations (300, 8)")


def test_shards_of_different_width(run_small: Run, shards: Path) -> None:
    write_shard(shards / "train_02.h5", torch.randn(50, D_IN + 1))
    refused(run_small("--shard-dir", shards), "train_02.h5", "9", "8")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite(run_small: Run, shards: Path, value: float) -> None:
    rows = torch.randn(300, D_IN)
    rows[123, 4] = value
    with h5py.File(shards / "train_02.h5", "w") as file:
        file["activations"] = rows.numpy()
    refused(run_small("--shard-dir", shards), "train_02.h5", "row 123", "--skip-nonfinite")


def test_rows_that_were_never_written(run_small: Run, shards: Path) -> None:
    with h5py.File(shards / "train_02.h5", "w") as file:
        rows = file.create_dataset("activations", (4000, D_IN), "f4", chunks=(100, D_IN))
        rows[:2000] = torch.randn(2000, D_IN).numpy()
    refused(run_small("--shard-dir", shards), "train_02.h5", "20 of its 40 chunks")


@pytest.mark.parametrize("flags", [(), ("--normalize-activations", "none")])
def test_rows_that_are_all_zero(run_small: Run, shards: Path, flags: tuple[str, ...]) -> None:
    write_shard(shards / "train_02.h5", torch.zeros(50, D_IN))
    refused(run_small("--shard-dir", shards, *flags), "train_02.h5", "--repeated-rows")
    for name in ("train_00", "train_01", "train_02"):
        write_shard(shards / f"{name}.h5", torch.zeros(20, D_IN))
    refused(run_small("--shard-dir", shards, *flags), "all rows are zero")


def test_rows_too_small_for_a_scale(run_small: Run, shards: Path) -> None:
    for path in shards.iterdir():
        write_shard(path, torch.randn(300, D_IN) * 1e-43)
    refused(run_small("--shard-dir", shards), "no float32 scales them")


def test_fewer_rows_than_a_step_takes(run: Run, shards: Path) -> None:
    result = run("--shard-dir", shards, "--batch-size", 700)
    refused(result, "max_epochs = 1 of 600 rows", "700")


def test_cuda_where_there_is_none(run_small: Run, shards: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(run_small("--shard-dir", shards, "--device", "cuda"), "device", "CUDA", "--device cpu")


def test_memory_that_runs_out(
    run_small: Run, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(TopK, "loss", full)
        result = run_small("--shard-dir", shards, "--checkpoint-dir", "full")
    found = ("step 1: out of memory (CUDA out of memory)", "planned (largest: ")
    refused(result, *found, "lower batch_size, expansion_factor", "step-00000000 is intact")
    assert (
        run_small("--shard-dir", shards, "--checkpoint-dir", "full", "--resume-from", "latest")[0]
        == 0
    )


def test_what_cannot_fit_in_memory(run_small: Run, shards: Path) -> None:
    result = run_small("--shard-dir", shards, "--d-sae", 2**34)
    refused(result, "GiB", "available", "optimiser states")
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_full_disk_while_checkpointing_leaves_the_previous_one(
    run_small: Run, shards: Path
) -> None:
    run = ("--shard-dir", shards, "--checkpoint-dir", "run")
    assert run_small(*run, "--max-steps", 2)[0] == 0
    size = max(path.stat().st_size for path in Path("run/checkpoints/latest/").iterdir())
    resumed = (*run, "--resume-from", "latest", "--max-steps", 40)
    with files_up_to(size - 1):
        result = run_small(*resumed)
    line = refused(result, "step-0000000", "step-00000002 is the last")
    assert "File too large" in line
    assert run_small(*resumed)[0] == 0


def test_a_directory_that_cannot_be_written(run_small: Run, shards: Path) -> None:
    Path("file").write_text("")
    refused(run_small("--shard-dir", shards, "--checkpoint-dir", "file/run"), "file/run")


def test_a_directory_that_holds_another_run(run_small: Run, shards: Path) -> None:
    arguments = ("--shard-dir", shards, "--checkpoint-dir", "run")
    assert run_small(*arguments)[0] == 0
    before = sorted(Path("run").rglob("*"))
    refused(run_small(*arguments), "run already holds a run", "--resume-from latest")
    assert sorted(Path("run").rglob("*")) == before


def test_a_checkpoint_of_another_width(run_small: Run, shards: Path, tmp_path: Path) -> None:
    assert run_small("--shard-dir", shards, "--checkpoint-dir", "run")[0] == 0
    other = tmp_path / "other"
    other.mkdir()
    write_shard(other / "a.h5", torch.randn(300, D_IN + 2))
    result = run_small("--shard-dir", other, "--checkpoint-dir", "run", "--resume-from", "latest")
    refused(result, "step-00000006", "d_in = 8", "10 wide")


def test_a_corrupted_checkpoint_falls_back_and_says_so(run_small: Run, shards: Path) -> None:
    arguments = ("--shard-dir", shards, "--checkpoint-dir", "run")
    assert run_small(*arguments)[0] == 0
    for name in ("trainer.json", "sae.safetensors"):
        victim = Path("run/checkpoints/step-00000006") / name
        content = victim.read_bytes()
        victim.write_bytes(content[: len(content) // 2])
        code, out, err = run_small(*arguments, "--resume-from", "latest")
        assert code == 0
        assert f"{victim} is corrupted" in err
        assert "resumed from run/checkpoints/step-00000004" in err
        assert "trained 6 steps" in out


def test_no_intact_checkpoint_is_left(run_small: Run, shards: Path) -> None:
    arguments = ("--shard-dir", shards, "--checkpoint-dir", "run")
    assert run_small(*arguments)[0] == 0
    for path in Path("run/checkpoints").glob("step-*/trainer.json"):
        path.write_text("{}")
    refused(
        run_small(*arguments, "--resume-from", "latest"), "step-00000006", "no intact checkpoint"
    )
