"""Losses through the downstream model: their gradients, masks and effects."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CAUSAL, VOCABULARY, make_network
from small_texts import make_batches, make_texts
from torch import Tensor
from torch.nn import functional

from sae_fast.activations.capture import HookedModel, resolve_hooks
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.evaluation.language_model import KEPT, LABELS, MASK, TOKENS
from sae_fast.training.downstream import DownstreamModel
from sae_fast.training.from_model.sequence_stream import SequenceStream
from sae_fast.training.optimizer.row_optimizer import make_optimizer
from sae_fast.training.trainer import Trainer

MASK_TOKEN = VOCABULARY["[MASK]"]
LAYER = 1


def make_stream(name: str, **changes: Any) -> tuple[Any, Any, SequenceStream]:
    """Make a network, one of its hook points, and batches."""
    network = make_network(name).requires_grad_(False)
    (hook,) = resolve_hooks(network, [LAYER])
    causal = name in CAUSAL
    chosen = {"max_tokens": 1000, "identity": {}, "seed": 3, **changes}
    exclude = bool(chosen.pop("exclude", False))
    batches = make_batches(make_texts(30), causal=causal, exclude=exclude)
    stream = SequenceStream(
        HookedModel(network, [hook]),
        batches,
        masked_token=None if causal else MASK_TOKEN,
        **chosen,
    )
    return network, hook, stream


def plain_loss(network: Any, x_hat: Tensor, columns: dict[str, Tensor], kind: str) -> Tensor:
    """Return the loss computed with transformers' own hidden states and loss functions."""
    blocks = (
        network.transformer.h if hasattr(network, "transformer") else network.bert.encoder.layer
    )

    def replace(_module: Any, _inputs: Any, output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        changed = own.clone()
        changed[columns[KEPT]] = x_hat
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    mask = columns[MASK].long()
    labels = columns[TOKENS].masked_fill(mask == 0, -100)
    if hasattr(network, "bert"):
        labels = columns[LABELS]
    own = network(input_ids=columns[TOKENS], attention_mask=mask).logits.detach()
    handle = blocks[LAYER].register_forward_hook(replace)
    out = network(input_ids=columns[TOKENS], attention_mask=mask, labels=labels)
    handle.remove()
    if kind == "ce":
        return out.loss
    p, q = own[mask.bool()].softmax(-1), out.logits[mask.bool()].log_softmax(-1)
    return (p * (p.log() - q)).sum(-1).mean()


@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize("exclude", [False, True])
def test_loss_and_its_gradient_are_those_of_the_model(name: str, kind: str, exclude: bool) -> None:
    network, hook, stream = make_stream(name, exclude=exclude)
    batches = (stream.next_rows()[hook.name] for _ in range(20))
    rows = next(rows for rows in batches if name in CAUSAL or (rows.columns[LABELS] >= 0).any())
    noisy = rows.x + 0.3 * torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(1))
    found, expected = noisy.clone().requires_grad_(), noisy.clone().requires_grad_()
    loss = DownstreamModel(network, hook, kind, causal=name in CAUSAL).loss(found, rows.columns)
    plain = plain_loss(network, expected, rows.columns, kind)
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-6)
    loss.backward()
    plain.backward()
    assert expected.grad is not None
    assert expected.grad.abs().max() > 1e-6
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-7)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"k": 4, "aux_k_coeff": 0.0},
    "batch_topk": {"k": 4, "aux_k_coeff": 0.0},
    "relu": {"l1_penalty_coeff": 0.0},
    "abs_topk": {"arch": "topk", "activation": "abs_topk", "k": 4, "aux_k_coeff": 0.0},
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize("dense_grad", [True, False])
def test_gradient_of_every_parameter_is_that_of_autograd(
    arch: str, kind: str, dense_grad: bool
) -> None:
    network, hook, stream = make_stream("gpt2")
    rows = stream.next_rows()[hook.name]
    settings = {"arch": arch, "d_in": 16, "d_sae": 48, "loss_fn": kind, **ARCHITECTURES[arch]}
    sae = SparseAutoencoder(SAEConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        sae.set_normalization_(torch.randn(16, generator=generator) * 0.1, torch.tensor(2.0))
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    rest = DownstreamModel(network, hook, kind, causal=True)
    x = sae.normalize(rows.x)
    loss = sae.training_loss(
        x,
        dense_grad=dense_grad,
        downstream=lambda x_hat: rest.loss(sae.denormalize(x_hat), rows.columns),
    )
    code = loss.code.dense()  # type: ignore[union-attr]
    plain = {
        name: getattr(sae, name).detach().clone().requires_grad_()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    }
    values = (x - plain["b_dec"]) @ plain["W_enc"].T + plain["b_enc"]
    x_hat = (values * (code != 0)) @ plain["W_dec"] + plain["b_dec"]
    expected = plain_loss(network, x_hat / 2.0 + sae.activation_mean, rows.columns, kind)
    torch.testing.assert_close(
        loss.components["recon_loss"], expected.detach(), rtol=1e-4, atol=1e-6
    )
    expected.backward()
    if not dense_grad:  # a step of plain descent moves the encoder by the factors' gradient
        before = {name: getattr(sae, name).detach().clone() for name in ("W_enc", "b_enc")}
        optimizer = make_optimizer(sae, TrainConfig(optimizer="sgd", momentum=0.0, grad_clip=0.0))
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step(1.0)
        for name, start in before.items():
            moved = start - getattr(sae, name).detach()
            torch.testing.assert_close(moved, plain[name].grad, rtol=2e-3, atol=1e-6)
        return
    loss.total.backward()  # type: ignore[no-untyped-call]
    for name, parameter in plain.items():
        own = getattr(sae, name).grad
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-6
        torch.testing.assert_close(own, parameter.grad, rtol=2e-3, atol=1e-6)


def test_a_batch_in_which_nothing_is_masked_has_no_loss_and_no_gradient() -> None:
    network, hook, stream = make_stream("bert")
    rows = stream.next_rows()[hook.name]
    columns = {**rows.columns, LABELS: torch.full_like(rows.columns[LABELS], -100)}
    x_hat = rows.x.clone().requires_grad_()
    loss = DownstreamModel(network, hook, "ce", causal=False).loss(x_hat, columns)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert x_hat.grad is not None
    assert not x_hat.grad.any()


def test_the_downstream_loss_is_given_where_the_loss_needs_it() -> None:
    x = torch.randn(8, 16)
    squared, through = (
        SparseAutoencoder(SAEConfig(d_in=16, d_sae=32, k=4, loss_fn=kind)) for kind in ("mse", "ce")
    )
    with pytest.raises(ValueError, match="downstream must be given with loss_fn ce"):
        through.training_loss(x)
    with pytest.raises(ValueError, match="downstream must not be given with loss_fn mse"):
        squared.training_loss(x, downstream=lambda x_hat: x_hat.sum())


# ---- the batches -------------------------------------------------------------------------------


def test_a_share_of_the_text_is_masked_and_only_that_is_to_be_found() -> None:
    _, hook, stream = make_stream("bert", max_tokens=10_000)
    masked = text = 0
    for _ in range(40):
        columns = stream.next_rows()[hook.name].columns
        wanted = columns[LABELS] != -100
        assert (columns[TOKENS][wanted] == MASK_TOKEN).all()
        assert (columns[TOKENS] == MASK_TOKEN).equal(wanted)
        words = columns[LABELS][wanted]
        assert (words >= VOCABULARY["the"]).all()  # the tokenizer has no special token
        masked += int(wanted.sum())
        text += int(wanted.sum()) + int((columns[TOKENS] >= VOCABULARY["the"]).sum())
    assert masked / text == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_position_goes_on_with_the_same_bits(name: str) -> None:
    _, hook, stream = make_stream(name)
    for _ in range(5):
        stream.next_rows()
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [stream.next_rows()[hook.name] for _ in range(12)]  # beyond the end of the documents
    _, _, again = make_stream(name)
    again.load_state_dict(state)
    for rows in expected:
        found = again.next_rows()[hook.name]
        assert torch.equal(found.x, rows.x)
        for column, values in rows.columns.items():
            assert torch.equal(found.columns[column], values)
    assert again.state_dict() == stream.state_dict()
    assert again.tokens_served > 16 * 4 * 5 / 2


def test_a_position_of_another_stream_is_refused() -> None:
    _, _, stream = make_stream("gpt2")
    for changes, message in (
        ({"seed": 4}, "seed is 4, but the checkpoint was made with 3"),
        (
            {"identity": {"model": "other"}},
            "differ from the ones that the checkpoint was made with: model changed",
        ),
    ):
        _, _, other = make_stream("gpt2", **changes)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(stream.state_dict())
    _, _, same = make_stream("gpt2")
    with pytest.raises(ValueError, match="data position has version 0, expected 1"):
        same.load_state_dict({**stream.state_dict(), "version": 0})


def test_documents_without_a_token_are_refused() -> None:
    network = make_network("gpt2")
    (hook,) = resolve_hooks(network, [0])
    model = HookedModel(network, [hook])
    stream = SequenceStream(model, make_batches(["", None]), max_tokens=9, identity={}, seed=0)
    with pytest.raises(ValueError, match="no document has a token"):
        stream.next_rows()


# ---- configurations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"arch": "matryoshka"},
        {"multi_topk": True},
        {"arch": "slots"},
        {"transcoder": True},
    ],
)
def test_models_of_several_reconstructions_have_no_such_loss(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="loss_fn kl"):
        SAEConfig(loss_fn="kl", **changes)


def test_activations_alone_are_not_enough(shard_dir: Path) -> None:
    config = RunConfig(
        sae=SAEConfig(d_sae=32, k=2, loss_fn="ce"), train=TrainConfig(shard_dir=str(shard_dir))
    )
    with pytest.raises(ValueError, match="loss_fn ce needs the model itself"):
        Trainer(config.sae, config.train, show_progress=False)


def test_cross_entropy_is_the_mean_over_tokens_that_come_next() -> None:
    network, hook, stream = make_stream("gpt2")
    rows = stream.next_rows()[hook.name]
    rest = DownstreamModel(network, hook, "ce", causal=True)
    loss = rest.loss(rows.x, rows.columns)
    logits = network(input_ids=rows.columns[TOKENS]).logits
    expected = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), rows.columns[TOKENS][:, 1:].flatten()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
