"""`python -m sae_fast.ground_truth`: its files, its repetition, and what it refuses."""

import json

import pytest

from sae_fast.ground_truth import main
from sae_fast.ground_truth.command import TASKS
from sae_fast.ground_truth.superposition import Superposition

pytest.importorskip("scipy")
TINY = ("superposition", "--rows", "600", "--heldout-rows", "200", "--max-steps", "4")
TINY += ("--batch-size", "64", "--seeds", "1", "2", "--num-threads", "1")
TWO = ("--arch", "topk", "relu")


def test_all_files_are_written_and_repeat_to_the_bit(tmp_path, capsys):
    outs = [tmp_path / name for name in ("a", "b")]
    for out in outs:
        assert main([*TINY, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    names = {path.name for path in outs[0].iterdir()}
    assert names == {
        *("results.json", "results.md", "scores.png", "features.png", "models", "task"),
    }
    one, other = (json.loads((out / "results.json").read_text()) for out in outs)
    assert one.pop("command") != other.pop("command")
    assert one == other
    arches = ("topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated", "untrained")
    assert [(entry["arch"], entry["seed"]) for entry in one["entries"]] == [
        (arch, seed) for arch in arches for seed in (1, 2)
    ]
    assert set(one["overlap"]) == set(arches[:-1])
    assert one["overlap"]["topk"]["pw_mcc"] > 0
    text = (outs[0] / "results.md").read_text()
    assert all(f"{score.heading} (`{score.name}`) | " in text for score in Superposition.scores)
    assert text.split("\n\n")[3] in printed


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


def test_other_architectures_join_those_that_are_there(tmp_path):
    out = tmp_path / "out"
    assert main([*TINY, "--arch", "relu", "--out", str(out)]) == 0
    assert main([*TINY, "--arch", "topk", "untrained", "--out", str(out)]) == 0
    content = json.loads((out / "results.json").read_text())
    assert {entry["arch"] for entry in content["entries"]} == {"relu", "topk", "untrained"}
    assert set(content["overlap"]) == {"relu", "topk"}


def test_bad_input_is_refused_in_one_line(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main([*TINY, "--arch", "topk", "--out", out]) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    capsys.readouterr()
    for arguments, message in [
        ([], "the name of a task must come first, one of superposition"),
        (["superposed"], "unknown task 'superposed' (did you mean 'superposition'?)"),
        (["superposition"], "out must be given: --out DIR"),
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


def test_help_lists_the_tasks_and_their_flags(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in TASKS)
    for name in TASKS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert "--seeds" in capsys.readouterr().out
