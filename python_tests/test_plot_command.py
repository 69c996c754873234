"""`python -m sae_fast.plot`: plots of real runs, their names, and every bad input."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sae_fast import plot as command
from sae_fast.activations import write_shard
from sae_fast.plot import main
from sae_fast.report.front import Point
from sae_fast.report.panels import Panel, loss_terms, overview
from sae_fast.train import main as train
from sae_fast.training import run_directory

ROWS, D_IN = 200, 8
BASE = (
    *("--d-sae", "32", "--batch-size", "32", "--max-steps", "6", "--lr", "1e-2"),
    *("--log-every", "2", "--eval-every", "3", "--checkpoint-every", "2", "--num-threads", "1"),
)
RUNS: dict[str, tuple[str, ...]] = {
    "topk": (
        *("--k", "2", "--multi-topk", "--k-anneal-start", "6", "--decorrelation-coeff", "0.1"),
        *("--dead-after-tokens", "1", "--average-decay", "0.5"),
    ),
    "batch_topk": ("--arch", "batch_topk", "--k", "2", "--dead-after-tokens", "1"),
    "matryoshka": ("--arch", "matryoshka", "--k", "2", "--matryoshka-prefixes", "8", "32"),
    "relu": (
        *("--arch", "relu", "--target-l0", "4", "--temporal-smoothness-coeff", "0.1"),
        *("--probe-loss-coeff", "1", "--probe-labels", "labels/relation"),
        *("--independence-coeff", "1", "--orthogonality-coeff", "1", "--correlation-split", "16"),
    ),
    "jumprelu": (
        *("--arch", "jumprelu", "--sparsity-penalty", "tanh", "--pre-act-loss-coeff", "0.1"),
        *("--dead-after-tokens", "1", "--jumprelu-init-threshold", "1.5"),
        *("--probe-loss-coeff", "1", "--probe-labels", "labels/answer"),
        *("--probe-task", "regression"),
    ),
    "gated": ("--arch", "gated"),
    "slots": ("--arch", "slots", "--value-hidden", "8"),
    "transcoder": ("--transcoder", "--skip-connection", "--k", "2", "--target-key", "activations"),
}
# Columns beside the common ones and the terms of the loss.
OWN: dict[str, set[str]] = {
    "topk": {"k", "multi_topk_loss", "decorr_loss", "aux_loss"},
    "batch_topk": {"aux_loss"},
    "matryoshka": set(),
    "relu": {
        *("l1_loss", "sparsity_coeff", "temporal_loss", "probe_loss", "probe_accuracy"),
        *("independence_loss", "orthogonality_loss"),
    },
    "jumprelu": {"sparsity_loss", "pre_act_loss", "mean_threshold", "probe_loss", "probe_r2"},
    "gated": {"l1_loss", "aux_loss"},
    "slots": {
        *("l1_loss", "alignment_loss", "value_loss", "slot_accuracy", "value_accuracy"),
        *("independence_loss", "orthogonality_loss"),
    },
    "transcoder": set(),
}
STANDARD = {
    "gram_mean",
    *("loss", "recon_loss", "fvu", "l0", "dead_fraction"),
    *("learning_rate", "grad_norm", "tokens_per_second"),
}


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of each architecture; return their directory."""
    directory = tmp_path_factory.mktemp("runs")
    shards = directory / "shards"
    shards.mkdir()
    for number, name in enumerate(("train_00", "heldout_00")):
        rows = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(number))
        labels = {"relation": torch.arange(ROWS) % 3, "answer": torch.arange(ROWS) % 5}
        sequences = {"doc_id": torch.zeros(ROWS), "position": torch.arange(ROWS)}
        write_shard(shards / f"{name}.h5", rows, labels=labels, **sequences)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
        for name, flags in RUNS.items():
            place = ("--shard-dir", str(shards), "--checkpoint-dir", str(directory / name))
            assert train([*BASE, *flags, *place]) == 0
    return directory


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the runs, for plots."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Collect the plots instead of drawing them."""
    found: list[dict[str, Any]] = []

    def note(runs: Any, panels: list[Panel], path: Path, title: str) -> Path:
        found.append({"runs": runs, "panels": panels, "path": path, "title": title})
        return path

    monkeypatch.setattr(command, "draw", note)
    monkeypatch.setattr(
        command, "plot_run", lambda rows, path, title: note({"": rows}, overview(rows), path, title)
    )
    return found


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the single line of a refusal, with exit code 2."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line


# ---- plots -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_drawn_into_two_images(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs / "topk")]) == 0
    plots = runs / "topk" / "plots"
    paths = [plots / "training.png", plots / "loss_terms.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    assert sorted(plots.iterdir()) == sorted(paths)
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.size[0] > 900


@pytest.mark.slow
@pytest.mark.parametrize("arch", RUNS)
def test_everything_an_architecture_logs_has_its_panel(arch: str, trained: Path) -> None:
    run = trained / arch / "joint" if arch == "slots" else trained / arch
    rows = _rows(run)
    panels = [*overview(rows), *loss_terms(rows)]
    shown = {curve.metric for panel in panels for curve in panel.curves}
    logged = {name for row in rows for name, value in row.items() if value}
    not_shown = {"step", "tokens", "epoch", "time_per_step_ms", "activation_fraction"}
    explained = {name for name in logged if "explained_variance" in name}  # 1 - FVU, which is drawn
    assert logged - shown - explained <= not_shown
    # Plotted only if the reader ever stalled, a latent is silent or dead, or there are outlier
    # rows; the objective only with a penalty.
    optional = {"reader_stall_fraction", "silent_fraction", "aux_loss", "ordinary_fvu", "objective"}
    mains = {panel.main for panel in panels}
    assert mains - optional == (STANDARD | OWN[arch]) - optional
    assert len({panel.title for panel in panels}) == len(panels)


@pytest.mark.slow
def test_several_runs_are_drawn_over_each_other(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "all.png"
    names = [name for name in RUNS if name != "slots"]
    assert main(["--out", str(out), *(str(runs / name) for name in names)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as image:
        assert image.size[0] > 900
    assert not (runs / "topk" / "plots").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_out_may_be_a_vector_graphic(kind: str, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / f"run.{kind}"
    assert main([str(runs / "gated"), "--out", str(out)]) == 0
    assert {"pdf": b"%PDF", "svg": b"<svg"}[kind] in out.read_bytes()[:2000]


def test_one_run_and_out_make_one_image_of_all_panels(
    runs: Path, tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    assert main([str(runs / "relu"), "--out", str(tmp_path / "a.png")]) == 0
    (image,) = drawn
    assert STANDARD | OWN["relu"] <= {panel.main for panel in image["panels"]}
    assert image["title"] == "relu: relu: d_in 8, d_sae 32"


def test_runs_are_named_by_what_tells_them_apart(
    runs: Path, tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    shutil.copytree(runs / "topk", runs / "again" / "topk")
    paths = [runs / "topk", runs / "again" / "topk", runs / "slots"]
    assert main([*map(str, paths), "--out", str(tmp_path / "a.png")]) == 0
    assert list(drawn[0]["runs"]) == ["topk", "again/topk", "slots/joint"]
    assert drawn[0]["title"] == "3 runs"


def test_slots_are_found_in_the_folder_of_their_mode(
    runs: Path, drawn: list[dict[str, Any]]
) -> None:
    for run in (runs / "slots", runs / "slots" / "joint"):
        assert main([str(run)]) == 0
    assert drawn[0]["path"] == drawn[2]["path"] == runs / "slots/joint/plots/training.png"
    assert drawn[0]["title"] == drawn[2]["title"] == "slots/joint: slots: d_in 8, d_sae 32"


def test_a_history_alone_draws_what_its_run_draws(
    runs: Path, tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    sent = tmp_path / "sent" / "by_mail.json"
    sent.parent.mkdir()
    shutil.copy(runs / "topk" / "training_history.json", sent)
    history = runs / "topk" / "training_history.json"
    for path in (runs / "topk", history, sent):
        assert main([str(path)]) == 0
    of_run, of_history, of_sent = drawn[::2]
    assert of_run["path"] == of_history["path"] == runs / "topk/plots/training.png"
    assert of_sent["path"] == sent.parent / "plots" / "training.png"
    assert of_sent["title"] == "by_mail: topk: d_in 8, d_sae 32, k 2"
    for other in (of_history, of_sent):
        rows = [
            {name: value for name, value in row.items() if value is not None}
            for row in other["runs"][""]
        ]
        assert rows == of_run["runs"][""]
        assert other["panels"] == of_run["panels"]


def test_two_histories_of_one_folder_are_two_runs(
    runs: Path, tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    for name in ("topk", "relu"):
        shutil.copy(runs / name / "training_history.json", tmp_path / f"{name}.json")
    files = [str(tmp_path / f"{name}.json") for name in ("topk", "relu")]
    assert main([*files, "--out", str(tmp_path / "a.png")]) == 0
    assert list(drawn[0]["runs"]) == ["topk.json", "relu.json"]


def test_a_resumed_run_is_drawn_from_its_first_step_on(
    trained: Path, tmp_path: Path, drawn: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
    run = tmp_path / "run"
    place = ("--shard-dir", str(trained / "shards"), "--checkpoint-dir", str(run))
    assert train([*BASE, "--k", "2", *place]) == 0
    assert train(["--resume-from", str(run), "--max-steps", "10"]) == 0
    assert main([str(run)]) == 0
    assert [row["step"] for row in drawn[0]["runs"][""]] == [2, 3, 4, 6, 8, 9, 10]


def test_a_run_that_still_goes_on_is_drawn_from_what_it_has_logged(
    runs: Path, drawn: list[dict[str, Any]]
) -> None:
    run = runs / "topk"
    (run / "training_history.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tok')
    assert main([str(run)]) == 0
    assert [row["step"] for row in drawn[0]["runs"][""]] == [2, 3, 4, 6]


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("output/first/residual.3", "residual.3"),
        ("output/first/residual.3/seed_1", "residual.3/seed_1"),
        ("models/joint", "models/joint"),
    ],
)
def test_a_seed_or_a_mode_is_named_with_the_directory_above_it(directory: str, name: str) -> None:
    assert run_directory.run_name(Path(directory)) == name


def test_a_configuration_of_another_version_costs_no_more_than_the_title(
    runs: Path, drawn: list[dict[str, Any]]
) -> None:
    settings = json.loads((runs / "topk" / "config.json").read_text())
    settings["sae"]["flux"] = 1
    (runs / "topk" / "config.json").write_text(json.dumps(settings))
    assert main([str(runs / "topk")]) == 0
    assert drawn[0]["title"] == "topk"


@pytest.mark.slow
def test_any_name_of_a_run_can_be_written_above_it(runs: Path, tmp_path: Path) -> None:
    strange = runs / f"_$a_{{$ {'long ' * 40}"
    (runs / "topk").rename(strange)
    assert main([str(strange)]) == 0
    assert main([str(strange), str(runs / "gated"), "--out", str(tmp_path / "a.png")]) == 0


# ---- sweeps and fronts -------------------------------------------------------------------------


def test_a_directory_of_runs_draws_them_together(
    runs: Path, drawn: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(runs)]) == 0
    overview_image, terms = drawn
    names = [name if name != "slots" else "slots/joint" for name in sorted(RUNS)]
    assert list(overview_image["runs"]) == list(terms["runs"]) == names
    assert overview_image["title"] == "8 runs"
    paths = [runs / "plots" / "training.png", runs / "plots" / "loss_terms.png"]
    assert [image["path"] for image in drawn] == paths
    assert capsys.readouterr().out.split() == [str(path) for path in paths]


def test_runs_of_a_sweep_are_in_the_order_of_the_numbers_in_their_names(
    runs: Path, drawn: list[dict[str, Any]], tmp_path: Path
) -> None:
    for name in ("layer_9/k_16", "layer_9/k_2", "layer_10/k_2"):
        shutil.copytree(runs / "topk", tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "layer_10" / "k_16").mkdir()
    (tmp_path / "sweep" / "layer_10" / "k_16" / "metrics.jsonl").touch()  # nothing logged yet
    assert main([str(tmp_path / "sweep"), "--out", str(tmp_path / "a.png")]) == 0
    assert list(drawn[0]["runs"]) == ["layer_9/k_2", "layer_9/k_16", "layer_10/k_2"]


@pytest.mark.slow
def test_a_real_sweep_is_drawn_and_has_a_front(trained: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.json"
    sweep.write_text(json.dumps({"k": [2, 4, 8]}))
    place = ("--shard-dir", str(trained / "shards"), "--checkpoint-dir", str(tmp_path / "runs"))
    assert train([*BASE, "--sweep", str(sweep), *place]) == 0
    for flags, name in (([], "training.png"), (["--front"], "front.png")):
        assert main([str(tmp_path / "runs"), *flags]) == 0
        with Image.open(tmp_path / "runs" / "plots" / name) as image:
            assert image.size[0] > 900


@pytest.fixture
def fronts(monkeypatch: pytest.MonkeyPatch) -> list[list[Point]]:
    """Collect the points of fronts instead of drawing them."""
    found: list[list[Point]] = []

    def note(points: list[Point], path: Path, title: str) -> Path:
        found.append(points)
        return path

    monkeypatch.setattr(command, "draw_front", note)
    return found


def test_a_front_has_the_last_held_out_figures_of_each_run(
    runs: Path, tmp_path: Path, fronts: list[list[Point]], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["topk", "relu", "transcoder"]
    out = tmp_path / "front.pdf"
    assert main(["--front", *(str(runs / name) for name in names), "--out", str(out)]) == 0
    rows = [_rows(runs / name)[-1] for name in names]
    wanted = [
        Point(kind, row["heldout_l0"], row["heldout_fvu"])
        for kind, row in zip(("topk", "relu", "topk skip transcoder"), rows, strict=True)
    ]
    assert fronts == [wanted]
    assert capsys.readouterr() == (f"{out}\n", "")


def test_a_run_that_is_not_complete_is_left_out_of_a_front(
    runs: Path, tmp_path: Path, fronts: list[list[Point]], capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "topk" / "training_history.json").unlink()
    both = (str(runs / "topk"), str(runs / "relu"))
    assert main([*both, "--front", "--out", str(tmp_path / "a.png")]) == 0
    assert [point.series for point in fronts[0]] == ["relu"]
    assert capsys.readouterr().err == "warning: topk is not complete and left out\n"


def test_a_front_without_a_complete_run_is_one_line(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "topk" / "training_history.json").unlink()
    assert main([str(runs / "topk"), "--front"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: front needs runs that are complete: none has a training_history.json"
    assert not (runs / "topk" / "plots").exists()


@pytest.mark.parametrize("missing", ["final_heldout_l0", "final_heldout_fvu", None])
def test_a_front_without_held_out_figures_is_one_line(
    missing: str | None, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "topk" / "training_history.json"
    content = json.loads(path.read_text())
    if missing is None:
        content["summary"] = 3
    else:
        del content["summary"][missing]
    path.write_text(json.dumps(content))
    line = _refusal(capsys, runs / "topk", "--front")
    assert f"{runs / 'topk'} has no held-out figures" in line
    assert "--heldout" in line


def test_a_damaged_history_is_one_line_of_a_front(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "topk" / "training_history.json"
    for content in ("[1]", "{"):
        path.write_text(content)
        assert str(runs / "topk") in _refusal(capsys, runs / "topk", "--front")


def test_the_target_l0_is_a_line_in_the_panel_of_l0(
    runs: Path, drawn: list[dict[str, Any]], tmp_path: Path
) -> None:
    history = runs / "relu" / "training_history.json"
    both = [str(runs / "relu"), str(runs / "topk"), "--out", str(tmp_path / "a.png")]
    for line in ([str(runs / "relu")], [str(history)], both):
        assert main(line) == 0
    for image in (drawn[0], drawn[2], drawn[4]):
        rows = next(iter(image["runs"].values()))
        assert {row["target_l0"] for row in rows} == {4.0}
        (panel,) = (panel for panel in image["panels"] if panel.main == "l0")
        assert panel.curves[-1].label == "target"
        assert "target_l0" not in {panel.main for panel in image["panels"]}
    assert "target_l0" not in list(drawn[4]["runs"].values())[1][0]  # topk has none


# ---- bad input ---------------------------------------------------------------------------------


def test_no_run_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "runs must be given: python -m sae_fast.plot RUN" in _refusal(capsys)
    assert f"{tmp_path / 'nope'}: no such run" in _refusal(capsys, tmp_path / "nope")
    (tmp_path / "checkpoints").mkdir()
    line = _refusal(capsys, tmp_path)
    assert f"{tmp_path} is no run: it holds no metrics.jsonl and no training_history" in line


@pytest.mark.slow
def test_a_wrong_out_or_flag_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = (runs / "topk", runs / "relu")
    assert "out must be given with several runs" in _refusal(capsys, *both)
    line = _refusal(capsys, *both, "--out", "all.jpeg")
    assert "out must end in .png, .pdf, .svg, got all.jpeg" in line
    assert "--outt" in _refusal(capsys, runs / "topk", "--outt", "all.png")
    (tmp_path / "a.png").mkdir()
    assert "a.png" in _refusal(capsys, runs / "topk", "--out", tmp_path / "a.png")
    assert list(tmp_path.glob(".*")) == []  # nothing half written is left


def test_a_run_given_twice_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = (runs / "topk", runs / "relu" / ".." / "topk" / "training_history.json")
    assert "runs must be different ones" in _refusal(capsys, *twice, "--out", "a.png")


def test_of_several_modes_one_must_be_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "slots" / "joint", runs / "slots" / "feature_activation")
    line = _refusal(capsys, runs / "slots")
    assert "holds 2 runs" in line
    for name in ("joint", "feature_activation"):
        assert str(runs / "slots" / name) in line


def _history(rows: object) -> str:
    return json.dumps({"config": {}, "summary": {}, "history": rows})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "", "nothing has been logged yet"),
        ("training_history.json", _history({}), "nothing has been logged yet"),
        ("training_history.json", "", "neither a training_history.json nor a metrics.jsonl"),
        ("training_history.json", "[1]", "neither a training_history.json nor a metrics.jsonl"),
        ("training_history.json", '{"loss": 1}', "neither a training_history.json nor"),
        ("training_history.json", _history([]), "neither a training_history.json nor"),
        ("training_history.json", _history({"step": 1}), "neither a training_history.json"),
        (
            "training_history.json",
            _history({"step": [1, 2], "tokens": [1]}),
            "neither a training_history.json nor a metrics.jsonl",
        ),
        ("training_history.json", _history({"step": [1], "fvu": [0.1]}), "lacks step or tokens"),
        (
            "training_history.json",
            _history({"step": [1], "tokens": [1], "fvu": ["x"]}),
            "fvu is 'x'",
        ),
        ("metrics.jsonl", '{"step": 1, "tokens": 1, "fvu": [2]}\n', "fvu is [2]"),
        ("sae.safetensors", "\udcff\udcfe", "neither a training_history.json nor a metrics"),
    ],
)
def test_what_holds_no_metrics_is_one_line_that_names_the_file(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    given = [path] if name == "sae.safetensors" else [path, tmp_path]
    for run in given:
        line = _refusal(capsys, run)
        assert message in line
        assert str(path) in line
    assert not (tmp_path / "plots").exists()


def test_help_tells_of_runs_and_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--out" in text
    assert "training_history.json" in text
