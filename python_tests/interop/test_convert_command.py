"""`python -m sae_fast.convert` and `verify`: files, exit codes, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
import warm_python
from plain_models import KINDS, make, rows
from safetensors.torch import load_file, save_file

from sae_fast import SparseAutoencoder, convert, verify

FOREIGN = Path(__file__).parent / "foreign"


def saved(path, kind):
    make(kind).save(path)
    return str(path)


def last_line(capsys):
    captured = capsys.readouterr()
    return (captured.err or captured.out).strip().splitlines()[-1]


@pytest.mark.parametrize("to", ["sae_fast", "saelens", "sparsify", "dictionary_learning"])
def test_a_model_is_converted_and_verified(to, tmp_path, capsys):
    source, out = saved(tmp_path / "model", "topk"), tmp_path / "out"
    assert convert.main([source, str(out), "--to", to]) == 0
    assert f"SparseAutoencoder(topk, d_in=16, d_sae=40, k=4) as {to}; 32 rows:" in last_line(capsys)
    assert verify.main([str(out)]) == 0
    assert ": equal; 32 rows:" in last_line(capsys)
    x, sae = rows(), SparseAutoencoder.from_pretrained(source)
    again = SparseAutoencoder.from_pretrained(out)
    x_hat = again.decode(again.encode(x), x)
    torch.testing.assert_close(x_hat, sae.decode(sae.encode(x), x), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_carries_codes_that_its_own_files_give(kind, tmp_path):
    agreement = make(kind).export(tmp_path / "out", "sae_fast")
    assert agreement.holds
    assert agreement.n_rows == 32
    assert agreement.scale[0] > 1  # rows that latents are active on
    assert verify.main([str(tmp_path / "out")]) == 0


def test_foreign_dictionaries_of_all_libraries_are_converted(tmp_path):
    for number, name in enumerate(("saelens/batchtopk_in_training", "sparsify/h.4.mlp")):
        out = tmp_path / f"{number}"
        assert convert.main([str(FOREIGN / name), str(out)]) == 0
        assert json.loads((out / "config.json").read_text())["units"] == "raw"


@pytest.mark.slow
def test_a_conversion_does_not_import_what_only_compilers_need(tmp_path):
    code = (
        "import sys; from sae_fast import convert, verify; "
        "convert.main(sys.argv[1:]) or verify.main(sys.argv[2:]); print('sympy' in sys.modules)"
    )
    source = str(FOREIGN / "saelens/topk")
    done = warm_python.run(["-c", code, source, str(tmp_path / "out")])
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_changed_weight_is_found(tmp_path, capsys):
    out = tmp_path / "out"
    make("jumprelu").export(out, "saelens")
    path = out / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["threshold"] *= 1.01
    tensors["W_dec"][:, 0] *= 1.001
    save_file(tensors, path)
    assert verify.main([str(out)]) == 1
    assert ": DIFFERENT; 32 rows:" in last_line(capsys)


def test_a_damaged_dictionary_does_not_keep_others_from_being_verified(tmp_path, capsys):
    make("topk").export(tmp_path / "whole")
    make("topk").export(tmp_path / "damaged", "sae_fast")
    (tmp_path / "damaged" / "sae.safetensors").write_bytes(b"x" * 100)
    places = [str(tmp_path / name) for name in ("nothing", "damaged", "whole")]
    assert verify.main(places) == 2
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 2
    assert f"{places[2]}: equal; " in printed.out


def test_every_layer_of_a_folder_is_verified(tmp_path, capsys):
    for layer in (0, 1):
        sae = make("relu transcoder")
        sae.origin = {"model": "gpt2", "layer": layer}
        sae.export(tmp_path, "circuit_tracer")
    assert verify.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(": equal; ") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "source and destination must be given"),
        (["{model}"], "source and destination must be given"),
        (["{model}", "{model}"], "is not empty: name a new directory"),
        (["{model}", "{model}/config.json"], "config.json: is a file"),
        (["{empty}", "out"], "not a saved model, it has no config.json, and no dictionary of"),
        (["{empty}/no/such/place", "out"], "no such directory"),
        (["{model}", "out", "--to", "gemma_scope"], "to"),
        (
            ["{model}", "out", "--revision", "main"],
            "where there is no revision",
        ),
        (["{model}", "out", "--to", "circuit_tracer"], "circuit-tracer cannot express an autoenc"),
        (["{foreign}/saelens", "out"], "holds dictionaries below it: name one of abstopk"),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"model": saved(tmp_path / "model", "topk"), "foreign": FOREIGN}
    places["empty"] = tmp_path / "empty"
    assert convert.main([argument.format(**places) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not (tmp_path / "out").exists()


def test_a_directory_without_rows_is_not_verified(tmp_path, capsys):
    assert verify.main([saved(tmp_path / "model", "topk")]) == 2
    assert "only dictionaries that sae_fast has converted or exported carry" in last_line(capsys)
    assert verify.main([saved(tmp_path / "again", "topk")]) == 2
    assert last_line(capsys).endswith("python -m sae_fast.convert SRC DST makes one")
    assert verify.main([]) == 2
    assert "a directory must be given" in last_line(capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"value": lambda value: value.to(torch.complex64)},
            "value must be of floating-point numb",
        ),
        (
            {"value": lambda value: value[0]},
            "rows must be a matrix that is not empty, and value a list",
        ),
        ({"rows": lambda rows: rows[0]}, "rows must be a matrix"),
        ({"rows": lambda rows: rows.int()}, "rows must be of floating-point numbers, got int32"),
        (
            {
                **{"rows": lambda rows: rows[:0], "reconstruction": lambda rows: rows[:0]},
                **dict.fromkeys(("token", "latent", "value"), lambda entries: entries[:0]),
            },
            "rows must be a matrix that is not empty",
        ),
    ],
)
def test_rows_of_another_form_are_refused(changes, words, tmp_path, capsys):
    make("topk").export(tmp_path / "out", "sae_fast")
    path = tmp_path / "out" / "expected_codes.safetensors"
    tensors = load_file(path)
    tensors |= {name: change(tensors[name]).contiguous() for name, change in changes.items()}
    save_file(tensors, path)
    assert verify.main([str(tmp_path / "out")]) == 2
    assert words in last_line(capsys)


@pytest.mark.parametrize("name", ["rows", "token", "latent", "value", "reconstruction"])
def test_rows_that_do_not_fit_are_refused(name, tmp_path, capsys):
    make("topk").export(tmp_path / "out", "sae_fast")
    path = tmp_path / "out" / "expected_codes.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name][:, :1] if tensors[name].ndim == 2 else tensors[name] + 10**6
    if name == "value":
        tensors[name] = tensors[name][:-1]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    assert verify.main([str(tmp_path / "out")]) == 2
    assert "expected_codes.safetensors: " in last_line(capsys)
