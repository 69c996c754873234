"""Trainings of a registered architecture by the command: flags, resume, entry points, errors."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from train_runs import SMALL, Run, assert_same, metrics, refused

from sae_fast import RunConfig, SparseAutoencoder
from sae_fast.autoencoder.architectures import unregister_architecture
from sae_fast.config.sae import registered

PLUGIN = Path(__file__).parents[2] / "examples/gained_topk.py"
if not PLUGIN.exists():
    pytest.skip("no checkout: the examples are not installed", allow_module_level=True)
OWN = ("--arch", "gained_topk", "--gain-decay", "0.1", *SMALL)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Leave no architecture registered."""
    yield
    _unregister()


def _unregister() -> None:
    for name in registered():
        unregister_architecture(name)
    sys.modules.pop("gained_topk", None)


def test_a_plugin_is_trained_and_resumed_to_the_bit(run: Run, shards: Path) -> None:
    given = ("--plugin", PLUGIN, "--shard-dir", shards)
    assert run(*given, *OWN, "--checkpoint-dir", "a")[0] == 0
    assert run(*given, *OWN, "--max-steps", "4", "--checkpoint-dir", "b")[0] == 0
    _unregister()
    resume = ("--checkpoint-dir", "b", "--resume_from", "latest", "--max-steps", "6")
    code, _, errors = run(*given, *resume)
    assert code == 0, errors
    config = RunConfig.load("b/config.json", saved=True)
    assert (config.sae.arch, config.gain_decay) == ("gained_topk", 0.1)
    assert metrics("a")[-1].keys() >= {"gain_loss", "mean_gain"}
    assert SparseAutoencoder.from_pretrained("b").config == config.sae
    straight = run(
        *given, *OWN, "--checkpoint-dir", "c", "--resume_from", "a/checkpoints/step-00000004"
    )
    assert straight[0] == 0
    assert_same("a", "c")
    _unregister()
    refused(run("--shard-dir", shards, *resume), "gained_topk", "--plugin FILE_OR_MODULE")


def test_an_installed_package_needs_no_plugin(
    run: Run, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gained_topk.py").write_text(PLUGIN.read_text())
    info = tmp_path / "gained-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gained\nVersion: 1.0\n")
    entry = "[sae_fast.architectures]\ngained_topk = gained_topk:GainedTopK\n"
    (info / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(tmp_path)
    code, _, errors = run("--shard-dir", shards, *OWN, "--checkpoint-dir", "a")
    assert code == 0, errors
    _unregister()
    assert SparseAutoencoder.from_pretrained("a").config.arch == "gained_topk"


def test_help_shows_the_flags_of_a_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    from sae_fast.train import main

    with pytest.raises(SystemExit):
        main(["--plugin", str(PLUGIN), "--help-all"])
    shown = capsys.readouterr().out
    assert "Architecture gained_topk\n  --gain-decay FLOAT" in shown
    assert "gained_topk" in shown.partition("--arch {")[2].partition("}")[0]


def test_a_plugin_that_cannot_be_used_is_refused_in_one_line(
    run: Run, shards: Path, tmp_path: Path
) -> None:
    given = ("--shard-dir", shards, *SMALL)
    refused(run("--plugin", "no.py", *given), "plugin no.py: there is no such file")
    refused(run("--plugin", "no_module", *given), "plugin no_module: ModuleNotFoundError")
    (tmp_path / "broken_plugin.py").write_text("1 / 0\n")
    broken = "ZeroDivisionError: division by zero (broken_plugin.py, line 1)"
    refused(run("--plugin", "broken_plugin.py", *given), broken)
    (tmp_path / "empty_plugin.py").write_text("")
    refused(run("--plugin", "empty_plugin.py", *given), "it registers no architecture")
    (tmp_path / "json.py").write_text("")
    refused(run("--plugin", "json.py", *given), "a module of the name json is loaded already")
    refused(run("--arch", "gained_topk", *given), "--arch must be one of", "got 'gained_topk'")
    refused(run("--gain-decay", "1", *given), "unknown flag --gain-decay")
    left_out = "gain_decay belongs to arch gained_topk and must be left out with arch topk, got 1.0"
    refused(run("--plugin", PLUGIN, "--gain-decay", "1", *given), left_out)


def test_an_architecture_that_fails_ends_the_command_in_one_line(
    run: Run, shards: Path, tmp_path: Path
) -> None:
    given = ("--shard-dir", shards, *SMALL)
    text = Path(PLUGIN).read_text().replace("self.config.k)", "self.config.kk)")
    (tmp_path / "failing_plugin.py").write_text(text.replace("gained_topk", "failing_topk"))
    failing = run("--plugin", "failing_plugin.py", "--arch", "failing_topk", *given)
    refused(
        failing,
        "arch failing_topk: GainedTopK.infer failed with AttributeError",
        "(failing_plugin.py, line ",
    )
