"""Losses of language models with reconstructions in them, against plain hooks of torch."""

import math
from typing import Any

import pytest
import torch
from small_models import CAUSAL, VOCABULARY, make_network
from small_texts import make_batches, make_texts
from torch import Tensor
from torch.nn import functional

from sae_fast.activations.capture import resolve_hooks
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.evaluation.core import CorePass, core_metrics
from sae_fast.evaluation.definitions import DEFINITIONS
from sae_fast.evaluation.language_model import (
    KEPT,
    LABELS,
    MASK,
    TOKENS,
    ModelText,
    language_model_metrics,
    token_columns,
)

LAYER, TOKENS_READ = 1, 150


def _text(name: str, *, exclude: bool = False) -> ModelText:
    network = make_network(name).requires_grad_(False)
    (hook,) = resolve_hooks(network, [LAYER])
    causal = name in CAUSAL
    batches = make_batches(make_texts(30), causal=causal, exclude=exclude)
    masked = None if causal else VOCABULARY["[MASK]"]
    device = torch.device("cpu")
    return ModelText(
        *(network, hook, None, causal),
        lambda: token_columns(batches, masked, 3, TOKENS_READ, device),
    )


def _sae() -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(d_in=16, d_sae=40, k=4))
    sae.initialize_(torch.Generator().manual_seed(0))
    return sae.eval().requires_grad_(False)


def _blocks(network: Any) -> Any:
    return network.transformer.h if hasattr(network, "transformer") else network.bert.encoder.layer


def _replaced(kept: Tensor, new: Any) -> Any:
    """Return what gives the activations that are kept another value."""

    def change(own: Tensor) -> Tensor:
        own = own.clone()
        own[kept] = new(own[kept])
        return own

    return change


def _plain(text: ModelText, sae: SparseAutoencoder) -> tuple[dict[str, float], Tensor]:
    """Return CE and KL of each kind of activations, and the rows, by hooks of torch alone."""
    network, columns = text.network, list(text.batches())
    block = _blocks(network)[LAYER]

    def forward(batch: Any, change: Any) -> Tensor:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            own = output[0] if isinstance(output, tuple) else output
            new = change(own)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = block.register_forward_hook(hook)
        try:
            mask = batch[MASK].long()
            return network(input_ids=batch[TOKENS], attention_mask=mask).logits.double()
        finally:
            handle.remove()

    found: list[Tensor] = []
    for batch in columns:
        forward(batch, lambda own, kept=batch[KEPT]: found.append(own[kept]) or own)
    rows = torch.cat(found)
    mean = rows.double().mean(0).float()
    sums = dict.fromkeys(("without", "sae", "ablation", "mean"), 0.0)
    divergence = dict(sums)
    predicted = tokens = 0
    for batch in columns:
        kept, mask = batch[KEPT], batch[MASK]

        changes = {
            "without": lambda own: own,
            "sae": _replaced(kept, sae),
            "ablation": _replaced(kept, torch.zeros_like),
            "mean": _replaced(kept, mean.expand_as),
        }
        own = forward(batch, changes["without"])[mask].log_softmax(-1)
        for name, change in changes.items():
            logits = forward(batch, change)
            if text.causal:
                right, guesses = batch[TOKENS][:, 1:][mask[:, 1:]], logits[:, :-1][mask[:, 1:]]
            else:
                chosen = batch[LABELS] != -100
                right, guesses = batch[LABELS][chosen], logits[chosen]
            sums[name] += float(functional.cross_entropy(guesses, right, reduction="sum"))
            other = logits[mask].log_softmax(-1)
            divergence[name] += float((own.exp() * (own - other)).sum())
        predicted += len(right)
        tokens += int(mask.sum())
    ce = {f"ce_{name}": value / predicted for name, value in sums.items()}
    return ce | {f"kl_{name}": value / tokens for name, value in divergence.items()}, rows


@pytest.mark.parametrize(("name", "exclude"), [("gpt2", False), ("gpt2", True), ("bert", False)])
def test_losses_are_the_ones_of_plain_hooks(name: str, exclude: bool) -> None:
    text, sae = _text(name, exclude=exclude), _sae()
    core = CorePass(sae)
    found = language_model_metrics(sae, text, core)
    plain, rows = _plain(text, sae)
    zero, mean = plain["ce_ablation"], plain["ce_mean"]
    own, spliced = plain["ce_without"], plain["ce_sae"]
    assert found["model_performance_preservation"] == pytest.approx(
        {
            "ce_loss_without_sae": own,
            "ce_loss_with_sae": spliced,
            "ce_loss_increase": spliced - own,
            "ce_loss_with_ablation": zero,
            "ce_loss_score": (zero - spliced) / (zero - own),
            "ce_loss_with_mean_ablation": mean,
            "ce_loss_score_mean_ablation": (mean - spliced) / (mean - own),
        },
        rel=2e-3,
        abs=2e-5,
    )
    kl, kl_zero, kl_mean = plain["kl_sae"], plain["kl_ablation"], plain["kl_mean"]
    assert found["model_behavior_preservation"] == pytest.approx(
        {
            "kl_div_with_sae": kl,
            "kl_div_with_ablation": kl_zero,
            "kl_div_score": (kl_zero - kl) / kl_zero,
            "kl_div_with_mean_ablation": kl_mean,
            "kl_div_score_mean_ablation": (kl_mean - kl) / kl_mean,
        },
        rel=2e-3,
        abs=2e-5,
    )
    for group, metrics in found.items():
        assert metrics.keys() <= DEFINITIONS[group].keys()
    in_pass = core.result().sections["reconstruction_quality"]
    assert in_pass["fvu"] == pytest.approx(
        core_metrics(sae, [rows]).sections["reconstruction_quality"]["fvu"]
    )


def test_a_perfect_reconstruction_loses_nothing() -> None:
    text = _text("gpt2")
    config = SAEConfig(arch="relu", d_in=16, d_sae=32, normalize_activations="none")
    sae = SparseAutoencoder(config).eval().requires_grad_(False)
    sae.W_enc.copy_(torch.cat([torch.eye(16), -torch.eye(16)]))
    sae.W_dec.copy_(sae.W_enc)
    found = language_model_metrics(sae, text)
    losses, behavior = (found[f"model_{kind}_preservation"] for kind in ("performance", "behavior"))
    assert losses["ce_loss_increase"] == pytest.approx(0, abs=1e-5)
    assert losses["ce_loss_score"] == pytest.approx(1, abs=1e-3)
    assert behavior["kl_div_score"] == pytest.approx(1, abs=1e-3)
    assert all(math.isfinite(value) for value in (*losses.values(), *behavior.values()))


def test_a_text_without_tokens_is_refused() -> None:
    text = _text("gpt2")._replace(batches=lambda: iter(()))
    with pytest.raises(ValueError, match="no token whose activations are kept"):
        language_model_metrics(_sae(), text)


def test_four_whole_passes_are_made_for_a_batch() -> None:
    """The model's own pass gives the activations too; the others have replaced ones."""
    text, calls = _text("gpt2"), []
    handle = text.network.lm_head.register_forward_hook(lambda *_: calls.append(1))
    language_model_metrics(_sae(), text)
    handle.remove()
    assert len(calls) == 4 * len(list(text.batches()))
