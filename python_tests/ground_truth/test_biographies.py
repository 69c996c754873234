"""Biographies: the sentences, the language model, the shards, and the command that makes them."""

import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from small_biographies import TINY
from transformers import GPT2LMHeadModel

from sae_fast.activations import open_shards
from sae_fast.biographies import main
from sae_fast.ground_truth.biographies import files
from sae_fast.ground_truth.biographies.probes import probe_accuracy
from sae_fast.ground_truth.biographies.text import Biographies, make_biographies
from sae_fast.train import main as train
from sae_fast.training import run_directory


def column(data: Path, shard: str, name: str, layer: int = 0) -> Any:
    with h5py.File(data / f"layer_{layer}" / shard) as file:
        return file[name][:]


def test_no_two_people_have_one_name_and_no_two_sentences_one_prompt() -> None:
    biographies = make_biographies(500, 6, 0.2, seed=3)
    assert len({entity.name for entity in biographies.entities}) == 500
    prompts = [biographies.prompt(sentence) for sentence in biographies.sentences()]
    assert len(set(prompts)) == len(prompts) == 500 * 6 * 6


def test_a_word_answers_one_relation_only() -> None:
    answers = [word for item in make_biographies(5, 1, 0.2, 0).relations for word in item.answers]
    assert len(set(answers)) == len(answers)
    assert all(len(word.split()) == 1 for word in answers)


def test_the_seed_decides_names_facts_and_split() -> None:
    first, same, other = (make_biographies(40, 2, 0.25, seed) for seed in (1, 1, 2))
    assert first == same
    for name in ("name", "answers", "heldout"):
        assert [getattr(item, name) for item in first.entities] != [
            getattr(item, name) for item in other.entities
        ]
    assert sum(entity.heldout for entity in first.entities) == 10


def test_people_answer_with_the_first_words_where_fewer_are_asked_for() -> None:
    full, few = make_biographies(60, 1, 0.2, 0), make_biographies(60, 1, 0.2, 0, answers=3)
    for relation, other in zip(few.relations, full.relations, strict=True):
        assert relation.answers == other.answers[:3]
    assert {answer for item in few.entities for answer in item.answers} == {0, 1, 2}
    assert few.answer_count == 18


def test_biographies_survive_json() -> None:
    biographies = make_biographies(8, 3, 0.5, 0)
    assert Biographies.from_dict(json.loads(json.dumps(biographies.to_dict()))) == biographies


@pytest.mark.slow
def test_same_seed_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        flags = ("--steps", "3", "--seed", str(seed), "--out", str(tmp_path / name))
        assert main([*TINY, *flags]) == 0
    for file in ("biographies.json", "model/model.safetensors", "layer_1/manifest.json"):
        one, two, three = (
            (tmp_path / name / file).read_bytes() for name in ("one", "two", "three")
        )
        assert one == two
        assert one != three


@pytest.mark.slow
def test_held_out_people_are_in_no_training_shard(data: Path) -> None:
    entities = files.load(data).biographies.entities
    for layer in (0, 1):
        seen = set(column(data, files.TRAIN, "labels/entity", layer).tolist())
        hidden = set(column(data, files.HELD_OUT, "labels/entity", layer).tolist())
        assert hidden == {number for number, entity in enumerate(entities) if entity.heldout}
        assert seen == set(range(12)) - hidden


@pytest.mark.slow
@pytest.mark.parametrize("heldout", [False, True])
def test_labels_are_those_of_the_sentence_and_rows_its_activations(
    data: Path, heldout: bool
) -> None:
    """Labels are compared with the sentence's words, rows with the output of transformers."""
    shard = files.HELD_OUT if heldout else files.TRAIN
    biographies = files.load(data).biographies
    network = GPT2LMHeadModel.from_pretrained(data / "model").eval()
    answers = [word for relation in biographies.relations for word in relation.answers]
    sentences = biographies.sentences(heldout=heldout)
    rows = column(data, shard, "activations")
    assert len(rows) == len(sentences)
    for number in range(0, len(rows), 7):
        item = sentences[column(data, shard, "doc_id")[number]]
        relation = biographies.relations[item.relation]
        words = ["<start>", *biographies.prompt(item).split()]
        assert column(data, shard, "labels/relation")[number] == item.relation
        assert column(data, shard, "labels/template")[number] == item.template
        answer = answers[column(data, shard, "labels/answer")[number]]
        assert answer == biographies.answer(item.entity, item.relation)
        assert answer in relation.answers
        assert column(data, shard, "position")[number] == len(words) - 1
        tokens = [biographies.vocabulary.index(word) for word in words]
        assert column(data, shard, "token_ids")[number] == tokens[-1]
        with torch.no_grad():
            hidden = network(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(rows[number], hidden[1][0, -1], atol=1e-5)


def test_the_language_model_knows_the_answers_of_all_people(data: Path) -> None:
    model = files.load(data)
    assert model.accuracy(model.prompts(model.biographies.sentences())) > 0.95
    measured = json.loads((data / "biographies.json").read_text())["measured"]
    assert measured["accuracy"] > 0.95
    assert measured["probes"].keys() == {"0", "1"}
    assert measured["probes"]["1"]["relation"] == 1.0


def test_transformers_reads_the_language_model_and_says_the_same(data: Path) -> None:
    model = files.load(data)
    prompts = model.prompts(model.biographies.sentences(heldout=True))
    network = GPT2LMHeadModel.from_pretrained(data / "model").eval()
    with torch.no_grad():
        scores = network(prompts.tokens).logits[torch.arange(len(prompts)), prompts.last]
        torch.testing.assert_close(model.logits(prompts), scores)


def test_padding_changes_nothing(data: Path) -> None:
    model = files.load(data)
    sentences = model.biographies.sentences()
    shortest = min(sentences, key=lambda item: len(model.biographies.prompt(item)))
    with torch.no_grad():
        among_others = model.logits(model.prompts(sentences))[sentences.index(shortest)]
        alone = model.logits(model.prompts([shortest]))[0]
    torch.testing.assert_close(among_others, alone)


def test_activations_replaced_by_themselves_change_nothing_and_by_others_do(data: Path) -> None:
    model = files.load(data)
    prompts = model.prompts(model.biographies.sentences())
    for layer in (0, 1):
        own = torch.cat([rows[layer] for _, rows in model.activations(prompts, [layer])])
        words = model.next_tokens(prompts)
        assert torch.equal(model.next_tokens(prompts, layer, own), words)
    # After the last block only the last token's activation matters: every answer is shifted by one.
    moved = model.next_tokens(prompts, 1, own.roll(1, 0))
    assert torch.equal(moved, words.roll(1))
    assert torch.equal(model.next_tokens(prompts), words)


def test_a_probe_reads_what_is_linear_and_not_what_is_random() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 10, generator=generator)
    linear = (x @ torch.randn(10, 4, generator=generator)).argmax(1)
    random = torch.randint(0, 4, (600,), generator=generator)
    assert probe_accuracy(x[:500], linear[:500], x[500:], linear[500:]) > 0.9
    assert probe_accuracy(x[:500], random[:500], x[500:], random[500:]) < 0.45


@pytest.mark.parametrize(
    ("flags", "figure", "floor"),
    [
        (("--arch", "topk", "--k", "8", "--probe-loss-coeff", "1"), "probe_accuracy", 0.9),
        (("--arch", "slots"), "heldout_slot_accuracy", 0.9),
    ],
)
def test_shards_train_what_their_labels_guide(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    figure: str,
    floor: float,
) -> None:
    monkeypatch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
    if "--probe-loss-coeff" in flags:
        flags = (*flags, "--probe-labels", "labels/relation")
    common = (
        *("--shard-dir", str(data / "layer_0"), "--d-sae", "64", "--batch-size", "60", "--lr"),
        *("1e-2", "--max-steps", "80", "--num-threads", "1", "--checkpoint-dir", str(tmp_path)),
    )
    assert train([*common, *flags]) == 0
    run = tmp_path / "joint" if "slots" in flags else tmp_path
    summary = json.loads((run / "training_history.json").read_text())["summary"]
    assert summary[f"final_{figure}"] > floor


def test_layers_choose_the_shards_that_are_written(tmp_path: Path, capsys: Any) -> None:
    flags = ("--steps", "2", "--layers", "1", "--out", str(tmp_path / "made"))
    assert main([*TINY, *flags]) == 0
    printed = capsys.readouterr()
    assert not (tmp_path / "made" / "layer_0").exists()
    shards = open_shards(sorted((tmp_path / "made" / "layer_1").glob("*.h5")))
    assert shards.rows == 144
    assert "12 people (2 held out)" in printed.out
    assert "more --steps" in printed.err


BAD_INPUT = {
    "no directory": ((), ("out must be given",)),
    "too few people": (("--entities", "4"), ("entities must be from 5", "got 4")),
    "too many people": (("--entities", "10000000"), ("entities", "10000000")),
    "too many phrasings": (("--templates", "7"), ("templates must be from 1 to 6", "7")),
    "one answer": (("--answers", "1"), ("answers must be from 2 to 16", "1")),
    "nobody held out": (("--heldout-fraction", "0"), ("heldout_fraction", "0.0")),
    "everybody held out": (("--heldout-fraction", "1"), ("heldout_fraction", "1.0")),
    "heads that do not fit": (("--heads", "5"), ("d_model", "heads = 5", "32")),
    "no steps": (("--steps", "0"), ("steps must be at least 1",)),
    "a layer that is not there": (("--layers", "2"), ("layers must be from 0 to 1", "2")),
    "no learning rate": (("--learning-rate", "0"), ("learning_rate", "0.0")),
    "an unknown flag": (("--people", "3"), ("--people",)),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: Any, case: str) -> None:
    flags, parts = BAD_INPUT[case]
    where = ("--out", str(tmp_path / "made")) if flags else ()
    assert main([*TINY, *where, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    for part in ("error: ", *parts):
        assert part in lines[0]
    assert not (tmp_path / "made").exists()


def test_nothing_is_written_over(data: Path, capsys: Any) -> None:
    before = (data / "biographies.json").read_bytes()
    assert main([*TINY, "--out", str(data)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert (data / "biographies.json").read_bytes() == before


def test_without_transformers_the_remedy_is_named(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main([*TINY, "--out", str(tmp_path / "made")]) == 2
    assert "pip install 'sae_fast[biographies]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "spoilt", "part"),
    [
        ("biographies.json", "{}", "biographies.json: not a file of biographies"),
        ("biographies.json", None, "has no biographies.json"),
        ("model/model.safetensors", "{}", "model.safetensors"),
        ("model/config.json", '{"n_embd": 32}', "config.json: .*divisible"),
        ("model/config.json", '{"n_embd": 48}', "not the tensors of config.json"),
        ("model/model.safetensors", None, "no language model, it has no model.safetensors"),
    ],
)
def test_a_damaged_directory_is_named(
    data: Path, tmp_path: Path, file: str, spoilt: str | None, part: str
) -> None:
    for name in ("biographies.json", "model/config.json", "model/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((data / name).read_bytes())
    (tmp_path / file).unlink()
    if spoilt is not None:
        (tmp_path / file).write_text(spoilt)
    with pytest.raises((ValueError, OSError), match=part):
        files.load(tmp_path)
