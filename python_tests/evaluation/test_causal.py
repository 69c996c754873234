"""The impact of ablated latents, against a model with the dictionary attached to it."""

from typing import Any

import pytest
import torch
from small_models import VOCABULARY, make_network
from small_texts import make_batches, make_texts
from torch import Tensor
from torch.nn import functional

from sae_fast.activations.capture import resolve_hooks
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.evaluation.causal import causal_impact
from sae_fast.evaluation.definitions import CAUSAL
from sae_fast.evaluation.language_model import KEPT, MASK, TOKENS, ModelText, token_columns

LAYER, D_SAE = 1, 40


def _sae(scale: float = 1.0, **fields: Any) -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(d_in=16, d_sae=D_SAE, k=4, **fields))
    sae.initialize_(torch.Generator().manual_seed(0))
    sae.W_enc.data *= scale
    return sae.eval().requires_grad_(False)


def _text(target: str | None = None, *, exclude: bool = False, tokens: int = 100) -> ModelText:
    network = make_network("gpt2").requires_grad_(False)
    (source,) = resolve_hooks(network, [LAYER])
    targets = [] if target is None else resolve_hooks(network, [], [target])
    batches = make_batches(make_texts(30), exclude=exclude)
    device = torch.device("cpu")
    return ModelText(
        *(network, source, targets[0] if targets else None, True),
        lambda: token_columns(batches, None, 3, tokens, device),
    )


def _logits(text: ModelText, columns: Any) -> Tensor:
    mask = columns[MASK].long()
    out = text.network(input_ids=columns[TOKENS], attention_mask=mask)
    return out.logits.double()


def _entropy(logits: Tensor, columns: Any) -> Tensor:
    right = columns[TOKENS][:, 1:][columns[MASK][:, 1:]]
    return functional.cross_entropy(logits[:, :-1][columns[MASK][:, 1:]], right, reduction="sum")


def _plain(text: ModelText, sae: SparseAutoencoder, latent: int) -> dict[str, float]:
    """Return what ablating a latent changes, by an attached dictionary in mode error."""
    hooks = {"target_hook": text.target.name} if text.target else {}
    loss = kl = apart = 0.0
    tokens = predicted = 0
    for columns in text.batches():
        mask = columns[MASK]
        own = _logits(text, columns)
        with sae.attached(text.network, text.source.name, "error", **hooks) as run:
            run.ablate(latent, positions=columns[KEPT])
            other = _logits(text, columns)
        loss += float(_entropy(other, columns) - _entropy(own, columns))
        p, q = own[mask].log_softmax(-1), other[mask].log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        apart += float((own - other)[mask].abs().mean(-1).sum())
        tokens += int(mask.sum())
        predicted += int(mask[:, 1:].sum())
    return {
        "loss_change": loss / predicted,
        "kl_div": kl / tokens,
        "logit_change": apart / tokens,
    }


@pytest.mark.parametrize(("transcodes", "exclude"), [(False, False), (False, True), (True, False)])
def test_ablations_are_the_ones_of_an_attached_dictionary(transcodes: bool, exclude: bool) -> None:
    text = _text("mlp_out.2" if transcodes else None, exclude=exclude)
    sae = _sae(**({"transcoder": True, "d_out": 16} if transcodes else {}))
    found = causal_impact(sae, text, top=3, latents=(7,))
    assert len(found.latents) in (3, 4)
    assert 7 in found.latents
    assert found.columns.keys() == CAUSAL.keys()
    for row in found.rows():
        plain = _plain(text, sae, int(row["latent"]))
        assert {name: row[name] for name in plain} == pytest.approx(plain, rel=2e-3, abs=1e-6)
    changes = found.columns["loss_change"]
    assert changes == sorted(changes, reverse=True)


def test_the_estimate_is_the_attribution_of_the_model() -> None:
    text, sae = _text(), _sae()
    found = causal_impact(sae, text, top=1).all_latents
    effects = torch.zeros(D_SAE, dtype=torch.float64)
    mass, active = torch.zeros_like(effects), torch.zeros_like(effects)
    predicted = rows = 0
    for columns in text.batches():
        inputs = {"input_ids": columns[TOKENS], "attention_mask": columns[MASK].long()}
        code = sae.attribution(
            lambda out, columns=columns: _entropy(out.logits, columns),
            *(text.network, inputs, text.source.name),
        )
        effects -= code.dense().flatten(0, -2).sum(0).double()
        with sae.attached(text.network, text.source.name, "observe") as run:
            _logits(text, columns)
        values = run.codes[0].dense().flatten(0, -2).double()
        mass += (values.abs() * sae.W_dec.norm(dim=1)).sum(0)
        active += (values > 0).sum(0)
        predicted += int(columns[MASK][:, 1:].sum())
        rows += int(columns[KEPT].sum())
    torch.testing.assert_close(found.attribution, effects / predicted, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found.mass, mass / rows, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.frequency, active / rows)


def test_small_latents_change_the_loss_as_the_estimate_says() -> None:
    """The estimate is the limit of the exact change for small activations."""
    text, sae = _text(), _sae(normalize_activations="none")
    sae.W_dec.mul_(1e-2)
    found = causal_impact(sae, text, top=5, by="attribution")
    exact, estimate = found.columns["loss_change"], found.columns["attribution"]
    assert estimate == pytest.approx(exact, rel=0.05, abs=2e-6)


def test_latents_are_chosen_by_what_was_asked_for() -> None:
    text, sae = _text(tokens=40), _sae()
    for by in ("mass", "frequency", "attribution"):
        found = causal_impact(sae, text, top=2, by=by)
        largest = getattr(found.all_latents, by).abs().topk(2).indices.tolist()
        assert sorted(found.latents) == sorted(largest)


def test_a_latent_that_never_fires_changes_nothing() -> None:
    text, sae = _text(tokens=40), _sae()
    sae.b_enc[3] = -1e9
    (row,) = causal_impact(sae, text, top=0, latents=(3,)).rows()
    assert row == {"latent": 3, **dict.fromkeys(CAUSAL, 0)}


def test_a_number_that_is_no_latent_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from 0 to 39, the latents of the dictionary, got 40"):
        causal_impact(_sae(), _text(), latents=(40,))


def test_masked_models_are_ablated_too() -> None:
    network = make_network("bert").requires_grad_(False)
    (source,) = resolve_hooks(network, [LAYER])
    batches = make_batches(make_texts(30), causal=False)
    device, mask = torch.device("cpu"), VOCABULARY["[MASK]"]
    text = ModelText(
        *(network, source, None, False),
        lambda: token_columns(batches, mask, 3, 100, device),
    )
    found = causal_impact(_sae(), text, top=3)
    assert all(row["kl_div"] > 0 for row in found.rows())
