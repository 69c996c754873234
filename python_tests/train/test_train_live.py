"""`python -m sae_fast.train MODEL DATASET --live`: pages of a training straight from a model."""

import json
from pathlib import Path

from train_runs import Run, assert_same, refused


def test_pages_show_the_text_that_the_model_reads_and_change_no_bit(run_on_model: Run) -> None:
    # More batches than a training looks at before its first step, which the stream has read then.
    flags = ("--layers", "2", "--max_tokens", "1600", "--pool_rows", "1600", "--run_name")
    assert run_on_model("--live", "pages", *flags, "with")[0] == 0
    assert run_on_model(*flags, "without")[0] == 0
    assert_same("output/with/residual.2", "output/without/residual.2")
    folders = sorted(Path("pages").glob("data_*"))
    assert folders[-1].name == "data_000000025"
    (call,) = (folders[-1] / "vocabulary.js").read_text().splitlines()
    texts = json.loads(call.removeprefix("saeFast.vocabulary(").removesuffix(");"))["texts"]
    assert " cat" in texts
    meta = (folders[-1] / "meta.js").read_text()
    assert '"step": 25' in meta


def test_a_pool_that_is_too_small_for_pages_is_told(run_on_model: Run) -> None:
    code, _, told = run_on_model("--live", "pages", "--layers", "2", "--run_name", "r")
    assert code == 0
    assert "no live pages were written" in told
    assert not list(Path("pages").glob("data_*"))


def test_a_file_for_live_pages_is_refused_before_the_run_is_made(run_small: Run) -> None:
    Path("pages").write_text("")
    flags = ("--shard-dir", "shards", "--live", "pages/deeper", "--checkpoint-dir", "r")
    refused(run_small(*flags), "--live pages/deeper: pages is a file, and must be a directory")
    assert not Path("r").exists()


def test_live_pages_are_of_one_training(run_on_model: Run) -> None:
    refused(run_on_model("--live", "pages", "--layers", "0", "2"), "are of one training")
