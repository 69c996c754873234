"""Swaps of relation slots in a constructed case with known results, and the command.

In the constructed case the activation after block 0 holds the relation asked and the person, each
in dimensions of its own; block 1 looks the answer up.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae_fast import SAEConfig, SparseAutoencoder
from sae_fast.ground_truth.biographies import files
from sae_fast.ground_truth.biographies.language_model import BiographyModel
from sae_fast.ground_truth.biographies.swap import swap_success
from sae_fast.ground_truth.biographies.text import Biographies, make_biographies
from sae_fast.swap import main
from sae_fast.train import main as train
from sae_fast.training import run_directory

R, PEOPLE = 6, 10


class Block(nn.Module):
    """One of the two blocks; its output replaces the residual stream."""

    def __init__(self, table: Tensor | None) -> None:
        super().__init__()
        self.table = table

    def forward(self, hidden: Tensor) -> Tensor:
        if self.table is None:
            return hidden
        relation, person = hidden[..., :R], hidden[..., R : R + PEOPLE]
        scores = torch.einsum("ntr,nte,rev->ntv", relation, person, self.table)
        return torch.cat([hidden[..., : R + PEOPLE], scores], -1)


class Network(nn.Module):
    """Answers from a table; has the members of a GPT2LMHeadModel that BiographyModel uses."""

    def __init__(self, biographies: Biographies) -> None:
        super().__init__()
        words = len(biographies.vocabulary)
        token = {word: number for number, word in enumerate(biographies.vocabulary)}
        self.questions: dict[tuple[int, ...], tuple[int, int]] = {}
        for item in biographies.sentences():
            prompt = ["<start>", *biographies.prompt(item).split()]
            self.questions[tuple(token[word] for word in prompt)] = (item.relation, item.entity)
        table = torch.zeros(R, PEOPLE, words)
        for relation in range(R):
            for person in range(PEOPLE):
                table[relation, person, token[biographies.answer(person, relation)]] = 1.0
        self.blocks = nn.ModuleList([Block(None), Block(table)])
        self.config = SimpleNamespace(n_embd=R + PEOPLE + words)
        self.transformer = Transformer(self)

    def lm_head(self, hidden: Tensor) -> Tensor:
        return hidden[..., R + PEOPLE :]


class Transformer:
    """The blocks under the names of GPT-2."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.h = network.blocks

    def __call__(self, tokens: Tensor, use_cache: bool) -> SimpleNamespace:
        hidden = torch.zeros(*tokens.shape, self.network.config.n_embd)
        for number, row in enumerate(tokens.tolist()):
            relation, person = self.network.questions[tuple(word for word in row if word != 0)]
            hidden[number, :, relation] = 2.0
            hidden[number, :, R + person] = 2.0
        for block in self.h:
            hidden = block(hidden)
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.fixture
def model() -> BiographyModel:
    biographies = make_biographies(PEOPLE, 2, 0.3, seed=5)
    return BiographyModel(Network(biographies), biographies)


def bound_sae(model: BiographyModel, *, normalized: bool = False) -> SparseAutoencoder:
    """Return a model whose last six latents are the relations; the others are other dimensions."""
    width = model.d_model
    scaling = "mean_scale" if normalized else "none"
    sae = SparseAutoencoder(
        SAEConfig(arch="relu", d_in=width, d_sae=width, normalize_activations=scaling)
    )
    rows = torch.eye(width).roll(-R, 0)
    with torch.no_grad():
        sae.W_enc.copy_(rows)
        sae.W_dec.copy_(rows)
        if normalized:
            sae.set_normalization_(torch.zeros(width), 0.25)
    return sae


@pytest.mark.parametrize("normalized", [False, True])
def test_bound_slots_swap_every_answer(model: BiographyModel, normalized: bool) -> None:
    sae = bound_sae(model, normalized=normalized)
    sentences = model.biographies.sentences(heldout=True)
    table = swap_success(sae, model, sentences, layer=0, strengths=(1.0, 3.0))
    assert table.prompts == 3 * R * 2
    assert table.model_accuracy == table.reconstruction_accuracy == table.patch_success == 1.0
    assert table.typical == pytest.approx([0.5 if normalized else 2.0] * R)
    for row in table.strengths:
        assert (row.success, row.relation_success, row.unmoved) == (1.0, 1.0, 0.0)
        for source in range(R):
            expected = [None if target == source else 1.0 for target in range(R)]
            assert row.by_pair[source] == expected


def test_a_slot_at_nothing_answers_nothing(model: BiographyModel) -> None:
    sentences = model.biographies.sentences(heldout=True)
    (row,) = swap_success(bound_sae(model), model, sentences, 0, (0.0,)).strengths
    assert (row.success, row.relation_success, row.unmoved) == (0.0, 0.0, 0.0)


def test_after_the_lookup_slots_move_nothing_but_a_patch_does(model: BiographyModel) -> None:
    sentences = model.biographies.sentences(heldout=True)
    table = swap_success(bound_sae(model), model, sentences, 1, (1.0,))
    assert table.reconstruction_accuracy == table.patch_success == 1.0
    assert (table.strengths[0].success, table.strengths[0].unmoved) == (0.0, 1.0)


def test_slots_bound_in_another_order_answer_other_questions(model: BiographyModel) -> None:
    """Slots 0 and 1 are exchanged, so only swaps among 2 to 5 succeed."""
    sae = bound_sae(model)
    order = [*range(sae.config.d_sae - R), *(sae.config.d_sae - R + i for i in (1, 0, 2, 3, 4, 5))]
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc[order])
        sae.W_dec.copy_(sae.W_dec[order])
    sentences = model.biographies.sentences()
    table = swap_success(sae, model, sentences, 0, (1.0,))
    assert table.reconstruction_accuracy == 1.0
    assert table.typical == [0.0, 0.0, 2.0, 2.0, 2.0, 2.0]
    by_pair = table.strengths[0].by_pair
    assert all(by_pair[r][t] == 1.0 for r in range(2, R) for t in range(2, R) if r != t)
    assert all(by_pair[r][t] == 0.0 for r in range(2, R) for t in range(2))


def test_what_does_not_fit_is_refused(model: BiographyModel) -> None:
    sentences = model.biographies.sentences()
    sae = bound_sae(model)
    with pytest.raises(ValueError, match="layer must be from 0 to 1, got 2"):
        swap_success(sae, model, sentences, 2, (1.0,))
    with pytest.raises(ValueError, match="strengths must be given"):
        swap_success(sae, model, sentences, 0, ())
    with pytest.raises(ValueError, match="every relation"):
        swap_success(sae, model, sentences[:1], 0, (1.0,))
    narrow = SparseAutoencoder(SAEConfig(arch="relu", d_in=8, d_sae=16))
    with pytest.raises(ValueError, match="d_in 8"):
        swap_success(narrow, model, sentences, 0, (1.0,))
    sizes = {"d_in": model.d_model, "d_sae": 16, "transcoder": True, "d_out": model.d_model}
    with pytest.raises(ValueError, match="got a transcoder"):
        swap_success(
            SparseAutoencoder(SAEConfig(arch="relu", **sizes)), model, sentences, 0, (1.0,)
        )
    few = SparseAutoencoder(SAEConfig(arch="relu", d_in=model.d_model, d_sae=5))
    with pytest.raises(ValueError, match="6 slots, got 5"):
        swap_success(few, model, sentences, 0, (1.0,))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a short training of slots on layer 0."""
    directory = tmp_path_factory.mktemp("slots")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
        flags = (
            *("--shard-dir", str(data / "layer_0"), "--arch", "slots", "--d-sae", "64"),
            *("--batch-size", "60", "--lr", "1e-2", "--max-steps", "60", "--num-threads", "1"),
        )
        assert train([*flags, "--checkpoint-dir", str(directory)]) == 0
    return directory / "joint"


@pytest.mark.slow
def test_the_command_takes_the_layer_from_the_run(data: Path, run: Path, capsys: Any) -> None:
    out = run / "swap" / "table.json"
    flags = ("--data", str(data), "--strengths", "1", "4", "--out", str(out))
    assert main([str(run), *flags]) == 0
    printed = capsys.readouterr().out
    table = json.loads(out.read_text())
    assert f"layer {table['layer']}, 24 prompts of held-out people" in printed
    assert table["layer"] == 0
    assert [row["strength"] for row in table["strengths"]] == [1.0, 4.0]
    assert table["relations"][0] == "birth_year"
    sae = SparseAutoencoder.from_pretrained(run / "checkpoints" / "latest")
    model = files.load(data)
    sentences = model.biographies.sentences(heldout=True)
    assert table == json.loads(
        json.dumps(swap_success(sae, model, sentences, 0, (1.0, 4.0)).to_dict())
    )


@pytest.mark.slow
def test_the_command_takes_a_saved_model_and_some_of_the_people(
    data: Path, run: Path, tmp_path: Path, capsys: Any
) -> None:
    SparseAutoencoder.from_pretrained(run / "checkpoints" / "latest").save(tmp_path / "sae")
    flags = (str(tmp_path / "sae"), "--data", str(data))
    assert main(flags) == 2
    assert "layer must be given" in capsys.readouterr().err
    assert main([*flags, "--layer", "1", "--max-entities", "1"]) == 0
    assert "layer 1, 12 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ((), "a checkpoint and --data must be given"),
        (("nowhere",), "a checkpoint and --data must be given"),
        (("nowhere", "--data", "."), "nowhere is no saved model, no checkpoint and no run"),
        (("{run}", "--data", "{run}"), "no biographies, it has no biographies.json"),
        (("{run}", "--data", "{data}", "--layer", "9"), "layer must be from 0 to 1, got 9"),
        (("{run}", "--data", "{data}", "--max-entities", "0"), "max_entities"),
        (("{run}", "--data", "{data}", "--strengths", "much"), "--strengths"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    data: Path, run: Path, capsys: Any, flags: tuple[str, ...], part: str
) -> None:
    assert main([flag.format(run=run, data=data) for flag in flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert part in lines[0]
