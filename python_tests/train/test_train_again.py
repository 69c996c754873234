"""A command that names an existing run resumes it, has nothing to do, or is refused."""

import json
from pathlib import Path

import pytest
from train_runs import Run, assert_same, killed_at, metrics, refused

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.checkpoint import CheckpointError
from sae_fast.training.run_directory import check_holds_no_runs

LATEST = ("--resume-from", "latest")


def _files(directory: str) -> dict[str, bytes]:
    paths = (path for path in Path(directory).rglob("*") if path.is_file())
    # The record of scanned shards is made again for shards that are as young as a test's.
    return {str(path): path.read_bytes() for path in paths if path.name != "shards.json"}


@pytest.fixture
def sweep(run_small: Run, shards: Path) -> tuple[str, ...]:
    """Return the command of one run in the directory of a sweep with `sw/a` and `sw/b`."""
    Path("two.json").write_text('[{"name": "a", "k": 1}, {"name": "b", "k": 2}]')
    flags = ("--shard-dir", str(shards), "--checkpoint-dir", "sw")
    assert run_small(*flags, "--sweep", "two.json")[0] == 0
    return flags


@pytest.mark.parametrize("more", [(), LATEST])
def test_one_run_is_not_made_in_the_directory_of_a_sweep(
    run_small: Run, sweep: tuple[str, ...], more: tuple[str, ...]
) -> None:
    before = _files("sw")
    result = run_small(*sweep, *more)
    refused(result, "sw holds the runs a and b: add --sweep FILE, or name one of them")
    assert _files("sw") == before
    assert run_small("--resume-from", "sw/a", "--k", "1", "--max-steps", "8")[0] == 0
    assert metrics("sw/a")[-1]["step"] == 8


def test_slots_are_not_trained_beside_the_runs_of_a_sweep(sweep: tuple[str, ...]) -> None:
    train = TrainConfig(checkpoint_dir="sw")
    with pytest.raises(CheckpointError, match="sw holds the runs a and b: add --sweep FILE"):
        check_holds_no_runs(SAEConfig(arch="slots", d_sae=32), train)
    # The runs of its modes are there, and no other architecture has any.
    Path("sw/a").rename("joint")
    Path("sw/b").rename("feature_activation")
    train = TrainConfig(checkpoint_dir=".")
    check_holds_no_runs(SAEConfig(arch="slots", d_sae=32), train)
    with pytest.raises(CheckpointError, match="holds the runs feature_activation and joint"):
        check_holds_no_runs(SAEConfig(k=2, d_sae=32), train)


def test_a_sweep_of_one_run_is_not_taken_for_that_run(run_small: Run, shards: Path) -> None:
    Path("one.json").write_text('{"k": [2]}')
    flags = ("--shard-dir", str(shards), "--checkpoint-dir", "sw")
    assert run_small(*flags, "--sweep", "one.json")[0] == 0
    for more in ((), LATEST):
        refused(run_small(*flags, *more), "sw holds the run k_2: add --sweep FILE")
    assert not Path("sw/checkpoints").exists()


def test_a_sweep_is_not_made_in_the_directory_of_a_run(run_small: Run, shards: Path) -> None:
    flags = ("--shard-dir", str(shards), "--checkpoint-dir", "run")
    assert run_small(*flags)[0] == 0
    Path("two.json").write_text('{"k": [1, 2]}')
    before = _files("run")
    for more in ((), LATEST):
        refused(run_small(*flags, "--sweep", "two.json", *more), "run already holds a run")
    assert _files("run") == before


def test_a_run_goes_on_no_further_than_it_is(run_small: Run, shards: Path) -> None:
    flags = ("--shard-dir", str(shards), "--checkpoint-dir", "run", *LATEST)
    assert run_small(*flags)[0] == 0
    before = _files("run")
    made = "the run has made 6 steps"
    refused(run_small(*flags, "--max-steps", "4"), f"{made}, max_steps is 4")
    tokens = ("--max-tokens", "100")
    refused(run_small(*flags, *tokens), f"{made}, max_tokens is 100, which allows 3")
    assert _files("run") == before


@pytest.mark.parametrize(
    ("limit", "flag"), [((), "--max-steps"), (("--max-tokens", "64"), "--max-tokens")]
)
def test_a_complete_run_has_nothing_to_do(
    run_small: Run, shards: Path, limit: tuple[str, ...], flag: str
) -> None:
    flags = ("--shard-dir", str(shards), "--checkpoint-dir", "run", *limit)
    assert run_small(*flags)[0] == 0
    (Path("run/plots")).mkdir(exist_ok=True)
    Path("run/plots/training.png").write_bytes(b"")  # plots are left out here
    before = _files("run")
    steps = metrics("run")[-1]["step"]
    code, out, _ = run_small(*flags, *LATEST, "--lr", "0.5", "--log-every", "1")
    assert code == 0
    assert out == f"nothing to do: all {steps} steps are made; raise {flag} to continue\n"
    assert _files("run") == before


def test_a_complete_run_gets_the_results_that_a_kill_has_kept_from_it(
    run_small: Run, shards: Path
) -> None:
    flags = ("--shard-dir", str(shards), "--checkpoint-dir", "run", "--average-decay", "0.5")
    assert run_small(*flags)[0] == 0
    history = json.loads(Path("run/training_history.json").read_text())
    Path("run/training_history.json").unlink()
    Path("run/averaged/sae.safetensors").unlink()
    code, out, _ = run_small(*flags, *LATEST)
    assert code == 0
    assert out.startswith("nothing to do: all 6 steps are made")
    assert Path("run/averaged/sae.safetensors").exists()
    again = json.loads(Path("run/training_history.json").read_text())
    assert (again["config"], again["history"]) == (history["config"], history["history"])


def test_history_and_plot_of_a_shorter_run_are_no_results_of_a_longer_one(
    run_small: Run, shards: Path
) -> None:
    flags = ("--shard-dir", str(shards), "--checkpoint-dir", "run")
    assert run_small(*flags, "--max-steps", "4")[0] == 0
    Path("run/plots").mkdir(exist_ok=True)
    Path("run/plots/training.png").write_bytes(b"")
    short = Path("run/training_history.json").read_bytes()
    assert run_small(*flags, *LATEST)[0] == 0
    Path("run/training_history.json").write_bytes(short)
    Path("run/plots/training.png").write_bytes(b"")
    assert run_small(*flags, *LATEST)[0] == 0
    summary = json.loads(Path("run/training_history.json").read_text())["summary"]
    assert summary["steps"] == 6


def test_a_complete_sweep_has_nothing_to_do(run_small: Run, sweep: tuple[str, ...]) -> None:
    for name in "ab":
        Path("sw", name, "plots").mkdir(exist_ok=True)
        Path("sw", name, "plots/training.png").write_bytes(b"")
    before = _files("sw")
    code, out, _ = run_small(*sweep, "--sweep", "two.json", *LATEST)
    assert code == 0
    said = "nothing to do: all 6 steps are made; raise --max-steps to continue"
    assert out.splitlines() == [f"a: {said}", f"b: {said}", "sweep      sw/sweep.json"]
    assert _files("sw") == before


@pytest.mark.slow
@pytest.mark.parametrize("first", [(), ("--pool_rows", "100000"), ("--pool_rows", "150")])
def test_a_run_from_a_model_is_extended_with_the_pool_that_it_has(
    run_on_model: Run, first: tuple[str, ...]
) -> None:
    flags = ("--run_name", "r", *(first or ("--pool_rows", "65536")))
    assert run_on_model(*flags, "--max_tokens", "320")[0] == 0
    begin = metrics("output/r/residual.0")
    longer = ("--max_tokens", "640", *LATEST)
    code, out, _ = run_on_model("--run_name", "r", "--pool_rows", "65536", *longer)
    assert code == 0, out
    rows = metrics("output/r/residual.0")
    assert rows[: len(begin)] == begin
    assert rows[-1]["step"] == 10
    # An explicit pool that differs is refused.
    refused(run_on_model("--run_name", "r", "--pool_rows", "99", *longer), "pool_rows is 99")


@pytest.mark.slow
def test_an_extended_run_from_a_model_is_bit_equal_after_a_kill(run_on_model: Run) -> None:
    open_pool = ("--pool_rows", "65536")
    one, two = ("--run_name", "one"), ("--checkpoint-dir", "output/two")
    for directory in (one, two):
        assert run_on_model(*directory, *open_pool, "--max_tokens", "320")[0] == 0
    longer = ("--max_tokens", "640", *LATEST, *open_pool)
    assert run_on_model(*one, *longer)[0] == 0
    with killed_at(9):
        assert run_on_model(*two, *longer)[0] == 130
    assert run_on_model(*two, *longer)[0] == 0
    assert metrics("output/one/residual.0") == metrics("output/two/residual.0")
    assert_same("output/one/residual.0", "output/two/residual.0")
    result = run_on_model(*two, *open_pool, *LATEST, "--max_tokens", "320")
    refused(result, "the run has made 10 steps, max_tokens is 320, which allows 5")


def test_a_run_from_a_model_is_told_from_one_on_shards(run_on_model: Run, run: Run) -> None:
    assert run_on_model("--run_name", "two", "--init_seeds", "1", "2")[0] == 0
    way = "continue it with MODEL DATASET --run_name two --resume_from latest"
    place = "output/two/residual.0/seed_1"
    for flags in (("--resume-from", place), ("--checkpoint-dir", place, *LATEST)):
        refused(run(*flags), f"{place} is a run from a model: {way}")
    way = "continue with MODEL DATASET --run_name two --resume_from latest"
    for place in ("output/two", "output/two/residual.0"):
        flags = ("--checkpoint-dir", place, "--d-sae", "32", "--k", "2", *LATEST)
        refused(run(*flags), f"{place} holds the runs", "seed_1 and", "from a model", way)


def test_a_run_name_that_is_taken_is_answered_in_its_own_words(run_on_model: Run) -> None:
    assert run_on_model("--run_name", "two")[0] == 0
    line = refused(run_on_model("--run_name", "two"), "already holds a run", "another --run_name")
    assert "--checkpoint-dir" not in line
