"""`python -m sae_fast.train MODEL DATASET --cache-dir DIR`: the shards that it keeps."""

from pathlib import Path
from typing import Any

import h5py
import pytest
from train_runs import Run, assert_same, killed_at

from sae_fast.capture import main as capture
from sae_fast.train import main


def _shards(directory: str) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(Path(directory).rglob("*.h5")):
        assert not path.name.startswith(".")
        with h5py.File(path) as file:
            found[str(path.relative_to(directory))] = {
                name: file[name][:].tolist() for name in file
            }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("step", [None, 1, 6])
def test_the_shards_that_are_kept_are_those_of_a_capture(
    run_on_model: Run, inputs: tuple[str, str], step: int | None
) -> None:
    common = [
        *(f"{inputs[0]}/gpt2", inputs[1], "--layers", "0", "2", "--ctx-len", "16"),
        *("--batch-size", "4", "--max-tokens", "640", "--heldout-tokens", "100"),
    ]
    assert capture([*common, "--shard-tokens", "200", "--out", "captured"]) == 0
    flags: tuple[str, ...] = ("--layers", "0", "2", "--cache_dir", "kept", "--run_name", "r")
    # Four shards; and no estimate of the normalisation, for which most of them would be read.
    flags = (*flags, "--shard_tokens", "200", "--normalize_activations", "none")
    if step is not None:
        with killed_at(step):
            assert run_on_model(*flags)[0] == 130
        assert not Path("kept/residual.0/manifest.json").exists()
        flags = (*flags, "--resume_from", "latest")
    assert run_on_model(*flags)[0] == 0
    kept = _shards("kept")
    assert kept == _shards("captured")
    assert len(kept) == 2 * 5
    # A training can read them, and the capture command has nothing left to do.
    shards = ["--shard-dir", "kept/residual.2", "--d-sae", "32", "--batch-size", "64", "--k", "4"]
    assert main([*shards, "--checkpoint-dir", "from_shards", "--max-steps", "2"]) == 0
    assert capture([*common, "--shard-tokens", "200", "--out", "kept"]) == 0


def test_a_cache_of_another_training_is_not_mixed_in(run_on_model: Run) -> None:
    flags = ("--cache_dir", "kept", "--run_name")
    assert run_on_model(*flags, "one")[0] == 0
    code, _, err = run_on_model(*flags, "two", "--layers", "1")
    assert code == 2
    assert "error: out: kept holds another capture: its hook points are residual.0" in err
    assert run_on_model(*flags, "three")[0] == 0  # complete: nothing is written
    assert_same("output/one/residual.0", "output/three/residual.0")
    assert (
        "cache_dir needs loss_fn mse or fvu" in run_on_model(*flags, "four", "--loss_fn", "ce")[2]
    )
