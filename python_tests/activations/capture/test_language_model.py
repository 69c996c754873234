"""Loading a model: its kind, its context, its digests, and one line for what cannot be loaded."""

import json

import pytest
import torch
from small_models import CAUSAL, CONTEXT, MASKED, make_network, make_tokenizer, save_model

from sae_fast.activations.capture.language_model import load_language_model


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2", "bert", "roberta"])
def test_a_model_is_loaded_with_its_head_and_knows_its_kind_and_context(tmp_path, name):
    model = load_language_model(str(save_model(tmp_path, name)))
    expected = make_network(name)
    assert type(model.network) is type(expected)
    assert model.causal == (name in CAUSAL)
    assert model.context == CONTEXT
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.network.get_parameter(name), parameter), name


def test_positions_behind_that_of_padding_do_not_count(tmp_path):
    network, tokenizer = make_network("roberta"), make_tokenizer(False)
    tokenizer.model_max_length = 10**30
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert network.config.max_position_embeddings == CONTEXT + 1
    assert load_language_model(str(tmp_path)).context == CONTEXT


def test_an_encoder_without_a_head_is_loaded_as_it_is(tmp_path):
    make_network("bert").bert.save_pretrained(tmp_path)
    make_tokenizer(False).save_pretrained(tmp_path)
    model = load_language_model(str(tmp_path))
    assert type(model.network).__name__ == "BertModel"
    assert not model.causal


def test_a_dtype_is_taken(tmp_path):
    model = load_language_model(str(save_model(tmp_path, "llama")), dtype="bfloat16")
    assert model.network.dtype == torch.bfloat16


def test_digests_tell_weights_and_tokenizers_apart(tmp_path):
    first = load_language_model(str(save_model(tmp_path / "a", "llama", seed=0)))
    again = load_language_model(str(save_model(tmp_path / "b", "llama", seed=0)))
    other = load_language_model(str(save_model(tmp_path / "c", "llama", seed=1)))
    make_tokenizer(True, bos=None).save_pretrained(tmp_path / "c")
    retokenised = load_language_model(str(tmp_path / "c"))
    assert first.weights_digest() == again.weights_digest() != other.weights_digest()
    assert first.tokenizer_digest() == again.tokenizer_digest() == other.tokenizer_digest()
    assert retokenised.tokenizer_digest() != first.tokenizer_digest()


def test_digests_of_a_tokenizer_do_not_depend_on_its_use(tmp_path):
    from tokenizers import Tokenizer

    save_model(tmp_path, "llama")
    limited = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    limited.enable_truncation(8)
    limited.save(str(tmp_path / "tokenizer.json"))
    model = load_language_model(str(tmp_path))
    digests = [model.tokenizer_digest()]
    for settings in ({}, {"truncation": True, "max_length": 4, "padding": "max_length"}):
        model.tokenizer(["the cat sat on a mat"], **settings)
        digests.append(model.tokenizer_digest())
        assert bool(model.tokenizer.backend_tokenizer.truncation) == bool(settings)
    assert len(set(digests)) == 1


def test_a_vocabulary_is_the_one_of_the_file_and_tells_numbers_of_tokens_apart(tmp_path):
    from tokenizers import Tokenizer

    from sae_fast.activations.capture.tokens import vocabulary_of

    tokenizer = make_tokenizer(True)
    tokenizer.save_pretrained(tmp_path)
    own = vocabulary_of(tokenizer)
    assert own == vocabulary_of(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    assert own.startswith("18 tokens, sha256:")
    file = tmp_path / "tokenizer.json"
    text = file.read_text()
    assert '"cat": 8' in text
    assert '"sat": 9' in text
    file.write_text(text.replace('"cat": 8', '"cat": 9').replace('"sat": 9', '"sat": 8'))
    other = vocabulary_of(Tokenizer.from_file(str(file)))
    assert other != own
    assert other.startswith("18 tokens, sha256:")


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_a_base_model_of_any_architecture_knows_whether_it_is_causal(name):
    from sae_fast.activations.capture.language_model import is_causal

    config = make_network(name).base_model.config
    config.architectures = [type(make_network(name).base_model).__name__]
    assert is_causal(config) == (name in CAUSAL)


def test_an_unknown_model_is_one_line_with_the_nearest_there_is(tmp_path):
    save_model(tmp_path / "my_llama", "llama")
    with pytest.raises(
        ValueError, match=r"cannot be loaded \(did you mean .*my_llama\?\)"
    ) as caught:
        load_language_model(str(tmp_path / "my_lama"))
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_gets_no_hint(tmp_path):
    for name in ("my_llama", "my_lama"):
        (tmp_path / name).mkdir()
    (tmp_path / "my_llama" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^model: .*my_lama cannot be loaded: "):
        load_language_model(str(tmp_path / "my_lama"))


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^model: .* cannot be loaded") as caught:
        load_language_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dtype": "int8"}, "model_dtype must be one of auto, float32, bfloat16, float16"),
        ({"device": "gpu"}, "device: torch has no device 'gpu'"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        load_language_model(str(tmp_path), **option)


def test_a_model_with_code_of_its_own_is_refused_without_a_question(tmp_path, monkeypatch):
    folder = tmp_path / "remote"
    save_model(folder, "llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.OwnConfig"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('this was run')")

    def asked(*_):
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(ValueError, match="it needs code of its own to be run") as error:
        load_language_model(str(folder))
    assert "did you mean" not in str(error.value)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_is_run_where_that_is_asked_for(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "trusted"
    save_model(folder, "llama")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"auto_map": own, "model_type": "own", "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE)
    with pytest.raises(ValueError, match="which --trust-remote-code does"):
        load_language_model(str(folder))
    model = load_language_model(str(folder), trust_remote_code=True)
    assert type(model.network).__name__ == "OwnForCausalLM"
    assert model.causal


def test_a_model_that_cannot_be_loaded_is_not_its_own_hint(tmp_path):
    save_model(tmp_path / "broken", "llama")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ValueError, match="cannot be loaded: ") as error:
        load_language_model(str(tmp_path / "broken"))
    assert "did you mean" not in str(error.value)
