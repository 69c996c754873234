"""Protein models: sequences of amino acids are texts, and their residues are the rows."""

import numpy as np
import pytest
import torch
from captured import all_rows

from sae_fast.capture import main

AMINO_ACIDS = "LAGVSERTIDPKQNFYMHWC"
PROTEINS = ["MKTLWAGV", "GGSERT", "", "LLLLLLAGW" * 3]
LAYERS = 2


@pytest.fixture
def esm(tmp_path):
    """Make a small random ESM-2 and its tokenizer; return the folder, the model, the tokenizer."""
    from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

    words = ["<cls>", "<pad>", "<eos>", "<unk>", *AMINO_ACIDS, "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = EsmTokenizer(str(tmp_path / "vocab.txt"))
    config = EsmConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=34,
        pad_token_id=1,
        mask_token_id=len(words) - 1,
        position_embedding_type="rotary",
        token_dropout=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = EsmForMaskedLM(config).eval()
    folder = tmp_path / "esm"
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "proteins.txt").write_text("\n".join(PROTEINS))
    return folder, network, tokenizer


def run(folder, out, *flags):
    options = ("--layers", "0", "--hook-points", "mlp_out.1", "--dtype", "float32")
    inputs = (str(folder), str(folder.parent / "proteins.txt"))
    assert main([*inputs, *options, "--num-threads", "1", "--out", str(out), *flags]) == 0


def test_the_rows_of_a_protein_are_its_residues(esm, tmp_path):
    folder, network, tokenizer = esm
    run(folder, tmp_path / "out")
    rows = all_rows(tmp_path / "out" / "residual.0")
    expected = {}
    for number, protein in enumerate(PROTEINS):
        tokens = tokenizer(protein, return_tensors="pt")
        assert len(tokens["input_ids"][0]) == len(protein) + 2  # <cls> and <eos>
        with torch.no_grad():
            hidden = network(**tokens, output_hidden_states=True).hidden_states[1][0]
        for place in range(1, len(protein) + 1):
            key = number, place, 4 + AMINO_ACIDS.index(protein[place - 1])
            expected[key] = hidden[place].numpy()
    assert set(rows) == set(expected)
    for key, row in rows.items():
        np.testing.assert_allclose(row, expected[key], rtol=1e-4, atol=1e-5)


def test_the_special_tokens_of_proteins_are_stored_where_it_is_asked_for(esm, tmp_path):
    folder, _, tokenizer = esm
    run(folder, tmp_path / "out", "--exclude-special-tokens", "false")
    tokens = [token for *_, token in all_rows(tmp_path / "out" / "residual.0")]
    proteins = [protein for protein in PROTEINS if protein]
    assert tokens.count(tokenizer.cls_token_id) == tokens.count(tokenizer.eos_token_id) == 3
    assert len(tokens) == sum(len(protein) + 2 for protein in proteins)
