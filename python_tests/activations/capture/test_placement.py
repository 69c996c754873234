"""Models divided over devices, or with matrices of few bits, and code that comes with a model."""

import builtins
import sys

import pytest
import torch
from captured import all_rows, make_inputs
from small_models import make_network, make_tokenizer, save_model

from sae_fast.activations.capture.language_model import load_language_model
from sae_fast.activations.capture.loading import device_of, weights_digest
from sae_fast.capture import main

FLAGS = ("--layers", "0", "--max-tokens", "60", "--num-threads", "1", "--dtype", "float32")


def error_of(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "missing", "message"),
    [
        (
            ["--device-map", "auto"],
            "accelerate",
            "device_map = 'auto' needs accelerate: install it (pip install 'sae_fast[devices]')",
        ),
        (
            ["--quantization", "8bit"],
            "bitsandbytes",
            "quantization = '8bit' needs bitsandbytes: install it (pip install 'sae_fast[quant",
        ),
        (["--device-map", "auto", "--device", "cuda"], None, "device_map = 'auto' decides"),
        (["--device-map", "evenly"], None, "got 'evenly'"),
        (["--quantization", "3bit"], None, "got '3bit'"),
    ],
)
def test_what_is_missing_is_refused_in_one_line(
    tmp_path, monkeypatch, capsys, flags, missing, message
):
    inputs = make_inputs(tmp_path)
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    assert main([*inputs, *FLAGS, *flags, "--out", str(tmp_path / "out")]) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_device_map_gives_the_rows_of_one_device(tmp_path):
    pytest.importorskip("accelerate")
    inputs = make_inputs(tmp_path)
    for name, flags in (("one", ()), ("map", ("--device-map", "auto"))):
        assert main([*inputs, *FLAGS, *flags, "--out", str(tmp_path / name)]) == 0
    one, other = (all_rows(tmp_path / name / "residual.0") for name in ("one", "map"))
    assert set(one) == set(other)
    assert all((one[key] == other[key]).all() for key in one)


def test_weights_that_are_fetched_have_a_digest_and_a_device():
    accelerate = pytest.importorskip("accelerate")
    network = make_network("llama")
    digest = weights_digest(network)
    accelerate.cpu_offload(network, execution_device="cpu")
    assert next(network.parameters()).is_meta
    assert device_of(network) == torch.device("cpu")
    assert weights_digest(network) == digest


@pytest.mark.parametrize(("bits", "error"), [("8bit", 0.05), ("4bit", 0.3)])
def test_matrices_of_few_bits_give_rows_near_the_whole_ones(tmp_path, bits, error):
    pytest.importorskip("bitsandbytes")
    folder = save_model(tmp_path / "llama", "llama", hidden_size=64, intermediate_size=128)
    whole = load_language_model(str(folder))
    packed = load_language_model(str(folder), quantization=bits)
    assert packed.network.model.layers[0].mlp.down_proj.weight.dtype in (torch.int8, torch.uint8)
    assert packed.weights_digest() != whole.weights_digest()
    tokens = torch.arange(7, 17)[None]
    one, other = (model.network(tokens).logits.float() for model in (whole, packed))
    assert 0 < float((one - other).norm() / one.norm()) < error


def test_code_that_comes_with_a_model_is_never_asked_about(tmp_path, monkeypatch, capsys):
    import json

    folder = save_model(tmp_path / "llama", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config["model_type"] = "own"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('this code must not run')\n")
    make_tokenizer(True).save_pretrained(folder)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat"}\n')
    given = [str(folder), str(tmp_path / "texts.jsonl")]
    assert main([*given, *FLAGS, "--out", str(tmp_path / "out")]) == 2
    assert "needs code of its own to be run, which --trust-remote-code does" in error_of(capsys)
