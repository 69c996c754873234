"""`python -m sae_fast.train MODEL DATASET --loss-fn ce` and kl: training through the model."""

import json
from pathlib import Path

import pytest
import torch
from small_models import VOCABULARY, WORDS, make_network, make_tokenizer
from train_runs import Run, assert_same, killed_at, metrics, refused

from sae_fast.train import main


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "bert"])
@pytest.mark.parametrize("loss_fn", ["ce", "kl"])
def test_training_through_the_model(run_on_model: Run, model: str, loss_fn: str) -> None:
    flags = ("--layers", "0", "2", "--loss_fn", loss_fn, "--save_every", "2", "--eval_every", "1")
    assert run_on_model(*flags, "--run_name", "whole", model=model)[0] == 0
    for layer in (0, 2):
        rows = metrics(f"output/whole/residual.{layer}")
        losses = [row[f"heldout_{loss_fn}"] for row in rows if f"heldout_{loss_fn}" in row]
        assert len(losses) == 10
        assert all(0 < loss < 10 for loss in losses)
        if loss_fn == "ce":
            (own,) = {row["heldout_ce_model"] for row in rows if "heldout_ce_model" in row}
            assert own == pytest.approx(losses[-1], rel=0.5)
    with killed_at(5):
        assert run_on_model(*flags, "--run_name", "parts", model=model)[0] == 130
    resumed = ("--run_name", "parts", "--resume_from", "latest")
    assert run_on_model(*flags, *resumed, model=model)[0] == 0
    for layer in (0, 2):
        assert_same(f"output/whole/residual.{layer}", f"output/parts/residual.{layer}")
        assert metrics(f"output/whole/residual.{layer}") == metrics(
            f"output/parts/residual.{layer}"
        )


@pytest.mark.slow
def test_cross_entropy_falls_where_the_model_knows_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The small model has learned to count, and a bad reconstruction spoils its predictions."""
    network = make_network("gpt2").train()
    tokenizer = make_tokenizer(True)
    ring = [VOCABULARY[word] for word in WORDS]
    starts = torch.arange(len(ring))
    texts = torch.tensor([[ring[(start + n) % len(ring)] for n in range(16)] for start in starts])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(60):
        loss = network(input_ids=texts, labels=texts).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3
    network.eval().save_pretrained(tmp_path / "counter")
    tokenizer.save_pretrained(tmp_path / "counter")
    lines = [" ".join(WORDS[(n + i) % len(WORDS)] for i in range(15)) for n in range(200)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    command = [
        *("counter", "texts.jsonl", "--layers", "1", "--loss_fn", "ce", "--no_pack", "--k", "2"),
        *("--num_latents", "32", "--ctx_len", "16", "--batch_size", "8", "--max_tokens", "12800"),
        *("--heldout_tokens", "200", "--log_every", "20", "--eval_every", "1"),
        *("--num_threads", "1", "--run_name", "r", "--lr", "1e-2"),
    ]
    assert main(command) == 0
    rows = metrics("output/r/residual.1")
    losses = [row["heldout_ce"] for row in rows if "heldout_ce" in row]
    own = rows[-1]["heldout_ce_model"]
    assert losses[0] > own + 0.2
    assert losses[-1] < own + 0.2 * (losses[0] - own)


def test_a_model_without_a_head_has_no_cross_entropy(
    inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_network("bert").bert.save_pretrained(tmp_path / "headless")
    make_tokenizer(False).save_pretrained(tmp_path / "headless")
    assert main(["headless", inputs[1], "--loss_fn", "ce", "--heldout_tokens", "0"]) == 2
    assert "error: loss_fn ce needs a model that predicts tokens: BertModel" in (
        capsys.readouterr().err
    )


def test_a_shuffle_pool_is_refused_where_no_rows_are_shuffled(run_on_model: Run) -> None:
    line = refused(run_on_model("--loss_fn", "kl", "--pool_rows", "70"), "pool_rows = 70 needs")
    assert "loss_fn mse or fvu, where rows are shuffled" in line
