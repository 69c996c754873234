"""`python -m sae_fast.ground_truth`: its files, its repetition, and what it refuses."""

import importlib
import json
import shlex
import signal
import sys

import pytest

from sae_fast.directory_lock import FileLock
from sae_fast.ground_truth import main, pictures, runs
from sae_fast.ground_truth.command import TASKS
from sae_fast.ground_truth.results import Results
from sae_fast.ground_truth.superposition import Superposition
from sae_fast.training.history import read_history
from sae_fast.training.signals import StopOnSignal

pytest.importorskip("scipy")
TINY = ("superposition", "--rows", "600", "--heldout-rows", "200", "--max-steps", "4")
TINY += ("--batch-size", "64", "--seeds", "1", "2", "--num-threads", "1")
TWO = ("--arch", "topk", "relu")
SMALL = (
    "--max-steps",
    "3",
    "--batch-size",
    "32",
    "--d-sae",
    "32",
    "--k",
    "2",
    "--num-threads",
    "1",
)
OTHERS = {  # tiny flags and the pictures of the other tasks
    "modular_addition": (
        ("--p", "7", "--d-model", "8", "--heads", "2", "--d-mlp", "16", "--model-steps", "4"),
        {"transformer.png", "waves.png"},
    ),
    "state_machine": (
        ("--hidden", "8", "--model-steps", "3", "--rows", "200", "--heldout-rows", "150"),
        {"states.png"},
    ),
    "circuit": (
        (
            *("--d-model", "8", "--heads", "2", "--model-steps", "3", "--rows", "200"),
            *("--heldout-rows", "150", "--vocabulary", "8", "--length", "16", "--model-batch", "4"),
        ),
        {"tokens.png"},
    ),
    "biographies": (
        (
            *("--entities", "10", "--templates", "2", "--answers", "3", "--blocks", "1"),
            *("--d-model", "16", "--heads", "2", "--model-steps", "3", "--model-batch", "8"),
        ),
        {"truths.png"},
    ),
}


@pytest.fixture
def no_pictures(monkeypatch):
    """Let pictures be made and not drawn, which takes long."""
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path, dots: path.touch())


@pytest.mark.slow
def test_all_files_are_written_and_repeat_to_the_bit(tmp_path, capsys, monkeypatch):
    out, again = tmp_path / "a", tmp_path / "b"
    assert main([*TINY, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path, dots: path.touch())
    assert main([*TINY, "--arch", "jumprelu", "--out", str(again)]) == 0
    assert {path.name for path in out.iterdir()} == {
        *("results.json", "results.md", "report.html", "scores.png", "features.png", "models"),
        "task",
    }
    one, other = (json.loads((place / "results.json").read_text()) for place in (out, again))
    assert [entry for entry in one["entries"] if entry["arch"] == "jumprelu"] == other["entries"]
    assert one["overlap"]["jumprelu"] == other["overlap"]["jumprelu"]
    arches = ("topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated", "untrained")
    assert [(entry["arch"], entry["seed"]) for entry in one["entries"]] == [
        (arch, seed) for arch in arches for seed in (1, 2)
    ]
    assert set(one["overlap"]) == set(arches[:-1])
    assert one["overlap"]["topk"]["pw_mcc"] > 0
    text = (out / "results.md").read_text()
    assert all(f"{score.heading} (`{score.name}`) | " in text for score in Superposition.scores)
    assert text.split("\n\n")[3] in printed
    assert printed.splitlines()[-1] == f"report: {out / 'report.html'}"
    html = (out / "report.html").read_text()
    # FVU over L0, two curves over tokens, and two histograms of each architecture.
    assert html.count("<svg") == 3 + 2 * len(arches)
    assert read_history(out / "models" / "topk_1").rows[-1]["step"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_second_call_keeps_what_is_finished(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*TINY, *TWO, "--out", str(out)]) == 0
    whole = json.loads((out / "results.json").read_text())
    killed = {**whole, "entries": whole["entries"][:3]}  # as after a kill in the last training
    (out / "results.json").write_text(json.dumps(killed))
    capsys.readouterr()
    assert main([*TINY, *TWO, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(": kept") for line in lines[:4]] == [True, True, True, False]
    assert json.loads((out / "results.json").read_text()) == whole


@pytest.mark.usefixtures("no_pictures")
def test_a_training_that_a_signal_stops_is_no_result(tmp_path, capsys, monkeypatch):
    class Stopping(StopOnSignal):
        def __init__(self):
            super().__init__()
            self.received = signal.SIGTERM

    out = tmp_path / "out"
    call = [*TINY, "--arch", "topk", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "StopOnSignal", Stopping)
        assert main(call) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.startswith("stopped by SIGTERM; what is finished is kept")
    assert json.loads((out / "results.json").read_text())["entries"] == []
    assert main(call) == 0
    assert len(json.loads((out / "results.json").read_text())["entries"]) == 2


@pytest.mark.usefixtures("no_pictures")
def test_other_architectures_join_those_that_are_there(tmp_path):
    out = tmp_path / "out"
    assert main([*TINY, "--arch", "relu", "--out", str(out)]) == 0
    assert main([*TINY, "--arch", "topk", "untrained", "--out", str(out)]) == 0
    content = json.loads((out / "results.json").read_text())
    assert {entry["arch"] for entry in content["entries"]} == {"relu", "topk", "untrained"}
    assert set(content["overlap"]) == {"relu", "topk"}
    report = (out / "report.html").read_text()
    assert f"<code>python -m sae_fast.ground_truth {shlex.join(TINY)} --arch topk" in report
    assert f"--out {out}</code>" in report
    assert "<code>untrained</code> is a topk before its first step" in report
    assert "SAELens <code>mean_correlation_coefficient</code>" in report
    assert "`" not in report


@pytest.mark.usefixtures("no_pictures")
def test_a_mean_over_fewer_seeds_says_over_how_many(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*TINY, "--arch", "relu", "--out", str(out)]) == 0
    assert "of 2)" not in capsys.readouterr().out
    assert main([*TINY, "--seeds", "3", "--arch", "topk", "relu", "--out", str(out)]) == 0
    topk, relu = capsys.readouterr().out.splitlines()[-4:-2]
    name, *cells = topk.strip("| ").split(" | ")
    assert name == "topk"
    assert {cell.partition(" ")[2] for cell in cells if cell != "none"} == {"(1 of 3)"}
    assert "of 3)" not in relu
    sentence = (
        "Mean and standard deviation over the seeds 1, 2, 3; (n of 3): over n seeds, since the "
        "others have no training or no value."
    )
    assert sentence in (out / "results.md").read_text()
    assert sentence in (out / "report.html").read_text()


def test_a_score_without_a_value_for_one_seed_is_marked():
    results = Results(task_of("superposition"), "")
    for seed, mcc in enumerate((0.5, None, 0.7)):
        results.add({"arch": "topk", "seed": seed, "scores": {"mcc": mcc, "fvu": 0.1}})
    assert results.mean("topk", "mcc") == "0.600 ± 0.141 (2 of 3)"
    assert results.mean("topk", "fvu") == "0.100 ± 0.000"
    assert results.mean("topk", "f1") == "none"
    results.add({"arch": "relu", "seed": 0, "scores": {}})
    results.overlap = {"topk": {"pw_mcc": 0.3}, "relu": {}}
    assert results.shared("topk", "pw_mcc") == "0.300"
    assert results.shared("relu", "pw_mcc") == "none"


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", OTHERS)
def test_every_task_runs_and_keeps_its_model(name, tmp_path, capsys):
    if name == "biographies":
        pytest.importorskip("transformers")
    flags, images = OTHERS[name]
    out = tmp_path / "out"
    has_labels = name in ("state_machine", "biographies")
    arches = ("relu", "slots", "untrained") if has_labels else ("relu", "untrained")
    call = (name, *flags, *SMALL, "--seeds", "5", "--arch", *arches, "--out", str(out))
    assert main(call) == 0
    model = next(path for path in (out / "task").rglob("*.safetensors"))
    written = model.stat().st_mtime_ns
    names = {path.name for path in out.iterdir()}
    assert names == {
        "results.json",
        "results.md",
        "report.html",
        "scores.png",
        "models",
        "task",
        *images,
    }
    content = json.loads((out / "results.json").read_text())
    scores = [score.name for score in Results(task_of(name), "").scores]
    for entry in content["entries"]:
        assert list(entry["scores"]) == [*scores[-3:], *scores[:-3]]
    # The transformer, LSTM or language model is kept, and a training made again is equal.
    (out / "results.json").write_text(json.dumps({**content, "entries": []}))
    assert main(call) == 0
    assert model.stat().st_mtime_ns == written
    assert json.loads((out / "results.json").read_text()) == content
    assert ": kept" not in capsys.readouterr().out


def task_of(name):
    entry = TASKS[name]
    module = importlib.import_module(f"sae_fast.ground_truth.{entry.module}")
    return getattr(module, entry.maker)(entry.config())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("modular_addition", "--p", "8"), "p must be an odd number, got 8"),
        (("modular_addition", "--heads", "3"), "d_model must be a multiple of heads = 3, got 128"),
        (("state_machine", "--automaton", "tomita"), "--automaton must be one of 'reber'"),
        (("circuit", "--layer", "3"), "layer must be between 1 and 2, got 3"),
        (("circuit", "--d-model", "6"), "d_model must be a multiple of heads = 4, got 6"),
        (("biographies", "--layer", "2"), "layer must be below blocks = 2, got 2"),
        (("biographies", "--entities", "2"), "entities"),
        (("circuit", "--rows", "1"), "rows must be at least 2, got 1"),
    ],
)
def test_settings_of_a_task_are_checked_in_one_line(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.usefixtures("no_pictures")
def test_bad_input_is_refused_in_one_line(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main([*TINY, "--arch", "topk", "--out", out]) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    capsys.readouterr()
    for arguments, message in [
        ([], "the name of a task must come first, one of superposition"),
        (["superposed"], "unknown task 'superposed' (did you mean 'superposition'?)"),
        (["superposition"], "out must be given: --out DIR"),
        (["superposition", "--out", __file__], "is a file, and must be a directory"),
        (["superposition", "--out", str(tmp_path / "run")], "it holds a trained model"),
        ([*TINY, "--arch", "topk", "--out", out, "--rows", "601"], "rows = 600, this call has 601"),
        ([*TINY, "--out", str(tmp_path / "other")], "no results of sae_fast.ground_truth"),
        ([*TINY, "--out", out, "--arch", "topp"], "arch must be one of 'topk'"),
        ([*TINY, "--out", out, "--arch", "slots"], "arch slots needs labels, and superposition"),
        ([*TINY, "--out", out, "--k", "161"], "k must be at most d_sae = 160, got 161"),
        ([*TINY, "--out", out, "--features", "20"], "parents * (1 + children) = 64, got 20"),
        ([*TINY, "--out", out, "--active", "50"], "below a quarter of features = 160, got 50"),
        ([*TINY, "--out", out, "--correlation", "1"], "correlation must be from 0 to below 1"),
        (
            [*TINY, "--out", out, "--featurs", "3"],
            "unknown flag --featurs (did you mean --features",
        ),
    ]:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error


def test_two_calls_do_not_share_a_folder(tmp_path, capsys):
    lock = FileLock(tmp_path / ".lock")
    lock.take()
    assert main([*TINY, "--out", str(tmp_path)]) == 2
    assert "is locked by process" in capsys.readouterr().err
    lock.release()
    assert not (tmp_path / "results.json").exists()


def test_scipy_is_named_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert main([*TINY, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: matching latents needs scipy: install it (pip install 'sae_fast[evaluate]')\n"
    )
    assert not (tmp_path / "out").exists()


def test_help_lists_the_tasks_and_their_flags(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in TASKS)
    for name in TASKS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert "--seeds" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["superposition", "modular_addition", "state_machine", "circuit", "biographies"]
)
def test_a_seed_that_the_data_are_drawn_from_is_refused(name, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([name, "--out", str(out), "--seeds", "3", "0"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: seeds must not have data_seed, from which the data are drawn")
    assert not out.exists()
