"""Tables in Markdown, and the cells that would break one."""

import torch

from sae_fast import SAEConfig, SparseAutoencoder
from sae_fast.autoencoder.model_card import model_card
from sae_fast.evaluation.comparison import compare
from sae_fast.markdown import markdown_table


def test_bars_and_line_breaks_do_not_end_a_cell() -> None:
    table = markdown_table(["a|b", "c"], [("|x|", "1\n2"), ("y", "3")], texts=1)
    assert table.splitlines() == [
        "| a\\|b | c |",
        "| --- | ---: |",
        "| \\|x\\| | 1 2 |",
        "| y | 3 |",
    ]


def test_names_with_bars_keep_the_columns_of_tables() -> None:
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    table = compare({"a|b": rows, "c": rows}).table()
    assert "| a\\|b | c |" in table
    sae = SparseAutoencoder(SAEConfig(d_in=4, d_sae=8, k=2))
    sae.origin = {"model": "m|n", "a|key": "x"}
    card = model_card(sae, "owner/name", "sae_fast", {"f|g": 0.5})
    assert "| model | m\\|n |" in card
    assert "| a\\|key | x |" in card
    assert "| f\\|g | 0.5 |" in card
