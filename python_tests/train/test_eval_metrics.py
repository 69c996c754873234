"""`--eval-metrics`: what the language model loses with the reconstructions, during a training."""

from pathlib import Path

import h5py
import pytest
import torch
from small_models import WORDS, save_model
from train_runs import Run, assert_same, metrics, refused

from sae_fast.activations import ShardMetadata, write_shard
from sae_fast.activations.capture.plan import open_capture
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config.model_text import CaptureConfig
from sae_fast.evaluation.language_model import language_model_metrics
from sae_fast.evaluation.model_text import model_text

NAMES = ("heldout_ce", "heldout_ce_model", "heldout_ce_increase", "heldout_ce_score")
TOKENS = 120


@pytest.fixture
def shards() -> Path:
    """Write a model, a text, and shards that name a hook point of the model."""
    save_model("model", "gpt2")
    lines = [" ".join(WORDS[n % len(WORDS)] for n in range(k, k + 9)) for k in range(30)]
    Path("text.txt").write_text("\n".join(lines))
    Path("shards").mkdir()
    metadata = ShardMetadata(model="model", hook="residual.1", layer=1)
    for seed, name in enumerate(("train_00", "heldout_00")):
        rows = torch.randn(300, 16, generator=torch.Generator().manual_seed(seed))
        write_shard(Path("shards") / f"{name}.h5", rows, metadata=metadata)
    return Path("shards")


FLAGS = ("--eval-metrics", 2, "--eval-dataset", "text.txt", "--eval-tokens", TOKENS)


def _expected(directory: str) -> dict[str, float]:
    """Return the losses with the dictionary that a run has ended with, by the command's code."""
    sae = SparseAutoencoder.from_pretrained(directory)
    capture = open_capture(
        CaptureConfig(
            model="model", dataset="text.txt", hook_points=("residual.1",), max_tokens=TOKENS
        )
    )
    text = model_text(
        *(capture, capture.batches, capture.hooked.hooks, (16,)), seed=0, max_tokens=TOKENS
    )
    return language_model_metrics(sae, text)["model_performance_preservation"]


def test_losses_are_measured_at_every_second_evaluation(run_small: Run, shards: Path) -> None:
    where = ("--shard-dir", shards, "--eval-every", 1, "--max-steps", 5, "--log-every", 1)
    code, out, _ = run_small(*where, *FLAGS, "--checkpoint-dir", "measured")
    assert code == 0
    rows = metrics("measured")
    assert [row["step"] for row in rows if "heldout_ce" in row] == [2, 4, 5]
    assert all(set(NAMES) <= row.keys() for row in rows if "heldout_ce" in row)
    last, expected = rows[-1], _expected("measured")
    assert last["heldout_ce"] == pytest.approx(expected["ce_loss_with_sae"], rel=1e-5)
    assert last["heldout_ce_model"] == pytest.approx(expected["ce_loss_without_sae"], rel=1e-5)
    assert last["heldout_ce_score"] == pytest.approx(expected["ce_loss_score"], rel=1e-4)
    assert last["heldout_ce_increase"] == pytest.approx(
        last["heldout_ce"] - last["heldout_ce_model"]
    )
    assert "heldout_ce_score" in out
    # Measuring changes no bit of the training.
    assert run_small(*where, "--checkpoint-dir", "plain")[0] == 0
    assert_same("measured", "plain")
    plain = [{key: value for key, value in row.items() if key not in NAMES} for row in rows]
    assert plain == metrics("plain")


@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_a_training_from_a_model_measures_on_its_held_out_text(
    run_on_model: Run, model: str
) -> None:
    flags = ("--layers", "0", "2", "--eval_metrics", "--run_name", "r")
    assert run_on_model(*flags, model=model)[0] == 0
    for layer in (0, 2):
        rows = [row for row in metrics(f"output/r/residual.{layer}") if "heldout_ce" in row]
        assert [row["step"] for row in rows] == [5, 10]  # the bare flag: at every evaluation
        assert rows[0]["heldout_ce_model"] == rows[1]["heldout_ce_model"] > 0


def test_beside_a_loss_of_the_model_the_increase_is_added(run_on_model: Run) -> None:
    flags = ("--loss_fn", "ce", "--eval_metrics", "1", "--run_name", "r")
    assert run_on_model(*flags)[0] == 0
    last = metrics("output/r/residual.0")[-1]
    assert set(NAMES) <= last.keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--eval-metrics",), "eval_metrics = 1 needs --eval-dataset"),
        (("--eval-dataset", "text.txt"), "eval_dataset = 'text.txt' needs eval_metrics"),
        ((*FLAGS, "--eval-hook", "residual.9"), "residual.9"),
        (
            (*FLAGS, "--eval-model", "nowhere", "--eval-hook", "residual.1"),
            "model: nowhere cannot be loaded",
        ),
        ((*FLAGS, "--transcoder", "--target-key", "activations"), "not measured in the training"),
    ],
)
def test_what_is_missing_is_named(
    run_small: Run, shards: Path, flags: tuple[object, ...], message: str
) -> None:
    refused(run_small("--shard-dir", shards, *flags, "--checkpoint-dir", "r"), message)
    assert not Path("r").exists()


def test_a_dictionary_of_another_width_is_refused(run_small: Run, shards: Path) -> None:
    save_model("other", "gpt2", n_embd=24)
    flags = ("--shard-dir", shards, *FLAGS, "--eval-model", "other", "--eval-hook", "residual.1")
    refused(run_small(*flags), "the dictionary has 16 numbers a row, residual.1 of other has 24")


def test_a_model_of_another_name_is_refused_unless_the_hook_point_is_given(
    run_small: Run, shards: Path
) -> None:
    save_model("other", "gpt2")
    flags = ("--shard-dir", shards, *FLAGS, "--eval-model", "other", "--max-steps", 2)
    difference = "the activations are of model 'model', and the model given is 'other'"
    refused(run_small(*flags), f"{difference}; --eval-hook")
    code, out, err = run_small(*flags, "--eval-hook", "residual.1", "--checkpoint-dir", "r")
    assert code == 0
    assert difference in out + err


def test_a_model_of_another_vocabulary_is_refused_unless_the_hook_point_is_given(
    run_small: Run, shards: Path
) -> None:
    for path in shards.iterdir():
        with h5py.File(path, "a") as file:
            file.attrs["capture"] = '{"model": {"vocabulary": "9 tokens, sha256:00"}}'
    flags = ("--shard-dir", shards, *FLAGS, "--max-steps", 2)
    difference = "the activations are of a vocabulary of 9 tokens, sha256:00, and the tokenizer"
    refused(run_small(*flags), difference)
    code, out, err = run_small(*flags, "--eval-hook", "residual.1", "--checkpoint-dir", "r")
    assert code == 0
    assert difference in out + err


def test_held_out_text_is_needed(run_on_model: Run) -> None:
    flags = ("--eval_metrics", "3", "--heldout_tokens", "0")
    refused(run_on_model(*flags), "eval_metrics = 3 needs held-out text, heldout_tokens above 0")
