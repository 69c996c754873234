"""Documents that are tokens give the rows that their texts give, to the bit."""

import json

import pytest
from captured import assert_same_shards, make_inputs, shards, write_texts
from small_models import CAUSAL, make_tokenizer, save_model
from small_texts import make_texts

from sae_fast.activations.capture.documents import Kind
from sae_fast.activations.capture.opening import load_documents
from sae_fast.capture import main

TEXTS = [text for text in make_texts(60) if text and not text.isspace()]
FLAGS = ("--layers", "0", "--heldout-tokens", "50", "--batch-size", "4", "--num-threads", "1")


def write_tokens(path, documents):
    path.write_text("".join(json.dumps({"input_ids": tokens}) + "\n" for tokens in documents))
    return str(path)


def tokens_of(name, *, special):
    tokenizer = make_tokenizer(name in CAUSAL)
    documents = tokenizer(TEXTS, add_special_tokens=special)["input_ids"]
    if special and tokenizer.bos_token_id is not None and name in CAUSAL:
        begin = [tokenizer.bos_token_id]
        documents = [d if d[:1] == begin else begin + d for d in documents]
    return documents


@pytest.mark.slow
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_tokens_give_the_shards_of_their_texts(tmp_path, name, special):
    model = str(save_model(tmp_path / name, name))
    texts = str(write_texts(tmp_path / "texts.jsonl", TEXTS))
    tokens = write_tokens(tmp_path / "tokens.jsonl", tokens_of(name, special=special))
    assert main([model, texts, *FLAGS, "--out", str(tmp_path / "texts")]) == 0
    column = ("--tokens-column", "input_ids")
    assert main([model, tokens, *FLAGS, *column, "--out", str(tmp_path / "tokens")]) == 0
    assert_same_shards(tmp_path / "texts", tmp_path / "tokens")
    assert shards(tmp_path / "tokens")
    recipe = json.loads((tmp_path / "tokens" / "capture.json").read_text())
    assert "is_tokenised" in json.dumps(recipe)


def test_documents_of_tokens_keep_an_order_and_may_be_empty(tmp_path):
    path = write_tokens(tmp_path / "tokens.jsonl", [[1, 2, 3], [], [4], None])
    documents = load_documents(path, tokens_column="input_ids")
    assert documents.kind is Kind.TOKENS
    assert documents.column == "input_ids"
    numbers, tokens = documents.read(0, 9)
    assert numbers.tolist() == [0, 1, 2, 3]
    assert [part.tolist() for part in tokens] == [[1, 2, 3], [], [4], []]
    shuffled = load_documents(path, tokens_column="input_ids", shuffle_seed=1)
    numbers, parts = shuffled.read(0, 4)
    assert [part.tolist() for part in parts] == [tokens[i].tolist() for i in numbers]
    other = write_tokens(tmp_path / "other.jsonl", [[1, 2, 4], [], [4], None])
    assert load_documents(other, tokens_column="input_ids").fingerprint() != documents.fingerprint()


@pytest.mark.parametrize(
    ("tokens", "flags", "message"),
    [
        ([[1, 99999]], ["--tokens-column", "input_ids"], "document 0 holds the token 99999"),
        ([[1, -100]], ["--tokens-column", "input_ids"], "document 0 holds the token -100"),
        ([[1, 2]], ["--tokens-column", "tokens"], "has no column 'tokens'; it has input_ids"),
        ([["a"]], ["--tokens-column", "input_ids"], "has no column of tokens 'input_ids'"),
        ([[1]], ["--tokens-column", "a", "--text-column", "b"], "give one of the two"),
        ([[1, 2]], [], "name it with --tokens-column"),
    ],
)
def test_tokens_that_cannot_be_read_are_refused(tmp_path, capsys, tokens, flags, message):
    model, _ = make_inputs(tmp_path)
    path = write_tokens(tmp_path / "tokens.jsonl", tokens)
    assert main([model, path, "--layers", "0", *flags, "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
