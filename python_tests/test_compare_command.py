"""`python -m sae_fast.compare`: its files, its names, and what it refuses in one line."""

import json
import shutil

import pytest
import torch
import warm_python

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.compare import main
from sae_fast.config import SAEConfig
from sae_fast.tensor_files import save_tensors

pytest.importorskip("scipy")


def save(path, seed, origin=None, **fields):
    config = SAEConfig(**{"d_in": 8, "d_sae": 12, "k": 2, **fields})
    sae = SparseAutoencoder(config)
    sae.initialize_(torch.Generator().manual_seed(seed))
    sae.origin = origin or {}
    sae.save(path)
    return str(path)


@pytest.fixture
def models(tmp_path):
    return [save(tmp_path / f"seed_{seed}", seed) for seed in range(3)]


def test_a_file_in_the_place_of_the_directory_is_refused(models, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*models, "--out", str(tmp_path / "file")]) == 2
    assert "file is a file, and must be a directory" in capsys.readouterr().err


def test_all_files_are_written(models, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*models, "--out", str(out), "--thresholds", "0.5"]) == 0
    assert {path.name for path in out.iterdir()} == {
        *(
            "compare.json",
            "compare.md",
            "compare.png",
            "report.html",
            "latents.csv",
            "latents.json",
        ),
    }
    figures = json.loads((out / "compare.json").read_text())
    assert [entry["name"] for entry in figures["dictionaries"]] == ["seed_0", "seed_1", "seed_2"]
    assert [entry["path"] for entry in figures["dictionaries"]] == models
    assert len(figures["pairs"]) == 3
    assert "shared_at_0.5" in figures["mean"]
    printed = capsys.readouterr().out
    assert (out / "compare.md").read_text() in printed
    assert f"mean PW-MCC {figures['mean']['pw_mcc']:.4f}" in printed
    assert printed.splitlines()[-2:] == [str(out), f"report: {out / 'report.html'}"]
    assert json.loads((out / "latents.json").read_text()).keys() == {"seed_0", "seed_1", "seed_2"}


def test_dictionaries_of_several_sizes_and_other_programs(models, tmp_path, capsys):
    large = save(tmp_path / "large", 4, d_sae=20)
    theirs = tmp_path / "theirs.safetensors"
    save_tensors(theirs, {"W_dec": SparseAutoencoder.from_pretrained(models[0]).W_dec * 3})
    assert main([models[0], large, str(theirs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| seed_0 | large | 12, 20 | 0, 0 |" in lines[2]
    assert "| seed_0 | theirs.safetensors | 12, 12 | 0, not known | 1.000 |" in lines[3]


def test_activations_of_different_layers_are_warned_of(tmp_path, capsys):
    models = [save(tmp_path / f"{layer}", layer, {"layer": layer}) for layer in range(2)]
    assert main(models) == 0
    warning = capsys.readouterr().err
    assert warning == "warning: 0 and 1 are of other activations: layer 0, not 1\n"


def test_a_copy_of_a_dictionary_is_warned_of(models, tmp_path, capsys):
    copy = shutil.copytree(models[0], tmp_path / "copy")
    assert main([*models, str(copy)]) == 0
    printed = capsys.readouterr()
    assert printed.err == (
        f"warning: {models[0]} and {copy} are one dictionary: their decoder rows are equal\n"
    )
    assert "| seed_0 | copy | 12, 12 | 0, 0 | 1.000 | 1.000 | 100.0% | 100.0% |" in printed.out


def test_bad_input_is_refused_in_one_line(models, tmp_path, capsys):
    wide = save(tmp_path / "wide", 0, d_in=16)
    no_matrix = tmp_path / "bias.safetensors"
    save_tensors(no_matrix, {"b_dec": torch.zeros(8)})
    infinite, empty = tmp_path / "infinite.safetensors", tmp_path / "empty.safetensors"
    save_tensors(infinite, {"W_dec": torch.full((3, 8), torch.inf)})
    save_tensors(empty, {"W_dec": torch.zeros(0, 8)})
    for arguments, message in [
        ([models[0]], "two dictionaries or more must be given"),
        (
            [models[0], models[1], f"{tmp_path}/seed_1/../seed_0"],
            f"dictionaries must be different ones: {models[0]} and {tmp_path}/seed_1/../seed_0 "
            f"are {models[0]}",
        ),
        ([models[0], wide], "dictionaries must have one width: seed_0 has 8, wide has 16"),
        ([models[0], str(tmp_path / "none")], str(tmp_path / "none")),
        ([models[0], str(no_matrix)], "must have a matrix W_dec [latents, width]"),
        ([models[0], str(infinite)], f"{infinite}: W_dec holds NaN or Inf"),
        ([models[0], str(empty)], f"{empty}: W_dec is empty, [0, 8]"),
        ([*models, "--thresholds", "2"], "thresholds must be between -1 and 1"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error


@pytest.mark.slow
def test_scipy_is_named_where_it_is_missing(models):
    program = (
        "import sys\n"
        "sys.modules['scipy'] = None\n"
        "from sae_fast.compare import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = warm_python.run(["-c", program, *models])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: matching latents needs scipy: install it (pip install 'sae_fast[evaluate]')"
    ]
