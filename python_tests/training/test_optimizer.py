"""Both optimisers against torch's with the steps around them, and against each other."""

import copy

import pytest
import torch
from plain_optimizer import PlainSteps
from plain_sae import PARAMETERS, dense_from_factor, make_batch, make_sae

from sae_fast.config import TrainConfig
from sae_fast.ops.row_factors import merge_row_factors, row_factors
from sae_fast.training.optimizer.row_optimizer import (
    DenseOptimizer,
    RowOptimizer,
    make_optimizer,
)

DEAD = (1, 3, 8, 9, 20, 21, 22, 30)
TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}
# With a larger eps than usual, rounding in an entry near 0 does not become a full step.
SETTINGS = {"eps": 1e-5, "weight_decay": 0.01, "grad_clip": 0.5}
RULES = ("adam", "sgd", "signum", "schedule_free_signum")
TERMS = {"l1_penalty_coeff": 0.1, "decorrelation_coeff": 0.5, "aux_k_coeff": 0.5}


def backward(sae, batches, dense_grad, loss_scale=1.0):
    codes = []
    for x in batches:
        loss = sae.training_loss(x, dense_grad=dense_grad)
        (loss.total * (loss_scale / len(batches))).backward()
        codes.append(loss.code)
    return codes


def assert_same_parameters(first, second):
    for name in PARAMETERS:
        torch.testing.assert_close(
            first.get_parameter(name),
            second.get_parameter(name),
            **TOLERANCE,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grad_clip", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_steps_equal_the_five_separate_steps_of_pytorch(kind, rule, grad_clip, micro_batches):
    settings = {**SETTINGS, "grad_clip": grad_clip}
    sae = make_sae(dead=DEAD, **TERMS)
    other = copy.deepcopy(sae)
    optimizer = kind(sae, rule=rule, **settings)
    plain = PlainSteps(other, rule, **settings)
    for step in range(6):
        batches = [make_batch(sae, 20 + i, seed=10 * step + i) for i in range(micro_batches)]
        optimizer.zero_grad()
        backward(sae, batches, kind.dense_grad)
        lr = 1e-2 / (step + 1)
        norm = optimizer.step(lr)
        torch.testing.assert_close(norm, plain.step(lr, batches), rtol=1e-4, atol=1e-6)
        assert_same_parameters(sae, other)


@pytest.mark.parametrize("rule", RULES)
def test_fused_and_dense_steps_give_the_same_parameters(rule):
    fused = make_sae(dead=DEAD, **TERMS)
    dense = copy.deepcopy(fused)
    settings = {"rule": rule, **SETTINGS}
    optimizers = RowOptimizer(fused, **settings), DenseOptimizer(dense, **settings)
    for step in range(8):
        x = make_batch(fused, 40, seed=step)
        indices = []
        for optimizer in optimizers:
            optimizer.zero_grad()
            codes = backward(optimizer.sae, [x], optimizer.dense_grad)
            indices.append(codes[0].indices)
            optimizer.step(3e-3)
        assert torch.equal(*indices)
    assert_same_parameters(fused, dense)
    for name, tensor in optimizers[0].state_dict().items():
        torch.testing.assert_close(tensor, optimizers[1].state_dict()[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
def test_decoder_rows_keep_unit_norm(kind):
    sae = make_sae()
    optimizer = kind(sae)
    backward(sae, [make_batch(sae)], kind.dense_grad)
    optimizer.step(0.1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1).detach(), torch.ones(40))


@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
@pytest.mark.parametrize("precision", ["screened", "fp32", "bf16", "fp16"])
def test_model_after_a_step_uses_the_new_weights(kind, precision):
    sae = make_sae()
    optimizer = kind(sae, precision=precision)
    x = make_batch(sae, seed=5)
    for _ in range(2):
        optimizer.zero_grad()
        sae.training_loss(x, precision=precision, dense_grad=kind.dense_grad).total.backward()
        optimizer.step(0.1)
    fresh = make_sae(seed=8)
    fresh.load_state_dict(sae.state_dict())
    codes = [one.encode(x, precision=precision) for one in (sae, fresh)]
    assert torch.equal(codes[0].dense(), codes[1].dense())
    assert torch.equal(sae.decode(codes[0]), fresh.decode(codes[1]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_step_is_close_to_the_exact_one(precision):
    exact, rounded = (make_sae(k=40, **TERMS) for _ in range(2))
    norms = []
    for sae, mode in ((exact, "screened"), (rounded, precision)):
        optimizer = RowOptimizer(sae, precision=mode, eps=1e-2)
        sae.training_loss(make_batch(sae), precision=mode, dense_grad=False).total.backward()
        norms.append(optimizer.step(1e-2))
    torch.testing.assert_close(*norms, rtol=2e-2, atol=0)
    for name in PARAMETERS:
        moved = exact.get_parameter(name) - make_sae(k=40, **TERMS).get_parameter(name)
        difference = exact.get_parameter(name) - rounded.get_parameter(name)
        assert difference.norm() < 0.05 * moved.norm()


@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
@pytest.mark.parametrize("rule", RULES)
def test_scaled_loss_gives_the_same_step(kind, rule):
    saes = [make_sae(dead=DEAD, **TERMS) for _ in range(2)]
    norms = []
    for sae, loss_scale in zip(saes, (1.0, 1024.0), strict=True):
        optimizer = kind(sae, rule=rule, **SETTINGS)
        backward(sae, [make_batch(sae)], kind.dense_grad, loss_scale)
        norms.append(optimizer.step(1e-2, loss_scale))
    torch.testing.assert_close(*norms)
    assert_same_parameters(*saes)


@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
def test_gradient_that_is_not_finite_updates_nothing(kind):
    sae = make_sae()
    before = copy.deepcopy(sae.state_dict())
    optimizer = kind(sae)
    loss = sae.training_loss(make_batch(sae), dense_grad=kind.dense_grad)
    (loss.total * torch.inf).backward()
    assert not torch.isfinite(optimizer.step(1e-2))
    assert optimizer.step_count == 0
    for name, tensor in before.items():
        assert torch.equal(tensor, sae.state_dict()[name])


@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
@pytest.mark.parametrize("skip_overflow", [False, True])
def test_steps_after_one_that_was_not_finite_change_nothing_unless_it_was_skipped(
    kind, skip_overflow
):
    sae = make_sae()
    optimizer = kind(sae, skip_overflow=skip_overflow)
    for step in range(4):
        optimizer.zero_grad()
        before = copy.deepcopy(sae.state_dict())
        loss = sae.training_loss(make_batch(sae, seed=step), dense_grad=kind.dense_grad)
        (loss.total * (torch.inf if step == 2 else 1.0)).backward()
        optimizer.step(1e-2)
        moved = any(not torch.equal(before[name], sae.state_dict()[name]) for name in PARAMETERS)
        assert moved == (step < 2 or (step == 3 and skip_overflow))
    assert optimizer.halted == (-1 if skip_overflow else 2)
    assert optimizer.step_count == (3 if skip_overflow else 2)


def test_rate_and_scale_may_be_tensors():
    saes = [make_sae() for _ in range(2)]
    numbers = (1e-2, 4.0), (torch.tensor(1e-2, dtype=torch.float64), torch.tensor(4.0))
    for sae, arguments in zip(saes, numbers, strict=True):
        optimizer = RowOptimizer(sae)
        backward(sae, [make_batch(sae)], dense_grad=False)
        optimizer.step(*arguments)
    for name in PARAMETERS:
        assert torch.equal(saes[0].get_parameter(name), saes[1].get_parameter(name))


@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
def test_zero_grad_drops_gradients_and_factors(kind):
    sae = make_sae(decorrelation_coeff=0.5)
    backward(sae, [make_batch(sae)], kind.dense_grad)
    kind(sae).zero_grad()
    for name in PARAMETERS:
        assert sae.get_parameter(name).grad is None
        assert row_factors(sae.get_parameter(name)) == []


@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
@pytest.mark.parametrize("rule", RULES)
def test_step_without_gradients_moves_by_momentum_alone(kind, rule):
    sae = make_sae()
    optimizer = kind(sae, rule=rule)
    for step in range(2):
        backward(sae, [make_batch(sae, seed=step)], kind.dense_grad)
        optimizer.step(1e-2)
        before = sae.b_enc.detach().clone()
        optimizer.zero_grad()
    optimizer.step(1e-2)
    assert optimizer.step_count == 3
    assert not torch.equal(sae.b_enc, before)


@pytest.mark.parametrize(
    ("saver", "loader"),
    [
        (RowOptimizer, RowOptimizer),
        (DenseOptimizer, DenseOptimizer),
        (RowOptimizer, DenseOptimizer),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_steps_go_on_from_a_saved_state(saver, loader, rule):
    sae = make_sae(dead=DEAD, **TERMS)
    settings = {"rule": rule, **SETTINGS}
    optimizer = saver(sae, **settings)
    for step in range(3):
        optimizer.zero_grad()
        backward(sae, [make_batch(sae, seed=step)], saver.dense_grad)
        optimizer.step(1e-2)
    resumed_sae = copy.deepcopy(sae)
    resumed = loader(resumed_sae, **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, resumed):
        one.zero_grad()
        backward(one.sae, [make_batch(sae, seed=7)], one.dense_grad)
        one.step(1e-2)
    if saver is loader:
        for name in PARAMETERS:
            assert torch.equal(sae.get_parameter(name), resumed_sae.get_parameter(name))
    assert_same_parameters(sae, resumed_sae)


@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
def test_state_of_another_model_is_refused_by_name(kind):
    state = kind(make_sae(d_in=8)).state_dict()
    with pytest.raises(
        ValueError, match=r"W_enc\.exp_avg must have shape \(40, 12\), got \(40, 8\)"
    ):
        kind(make_sae()).load_state_dict(state)
    with pytest.raises(ValueError, match="has no tensor step"):
        kind(make_sae()).load_state_dict({})


def test_merged_factors_are_the_gradient_that_autograd_gives():
    sae = make_sae(dead=DEAD, **TERMS)
    backward(sae, [make_batch(sae, 20, seed=1), make_batch(sae, 9, seed=2)], dense_grad=False)
    merged = merge_row_factors(sae.W_enc, sae.W_dec)
    for W, factors in zip((sae.W_enc, sae.W_dec), merged, strict=True):
        expected = sum(dense_from_factor(factor, 40) for factor in row_factors(W))
        side = factors.dense if factors.shift is None else factors.dense - factors.shift
        latents = torch.arange(40).repeat_interleave(factors.latent_offsets.diff())
        terms = factors.coefficients[:, None] * side[factors.rows.long()]
        found = torch.zeros(40, 12).index_add(0, latents, terms)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_encoder_and_decoder_share_one_latent_major_view():
    sae = make_sae(dead=DEAD)
    backward(sae, [make_batch(sae)], dense_grad=False)
    encoder, decoder = merge_row_factors(sae.W_enc, sae.W_dec)
    assert encoder.latent_offsets is decoder.latent_offsets


def test_aux_k_and_main_code_share_one_copy_of_the_activations():
    sae = make_sae(dead=DEAD)
    backward(sae, [make_batch(sae, 30)], dense_grad=False)
    encoder, decoder = merge_row_factors(sae.W_enc, sae.W_dec)
    assert len(row_factors(sae.W_enc)) == 2
    assert encoder.dense.shape[0] == 30
    assert decoder.dense.shape[0] == 60


def test_b_dec_moved_before_the_step_does_not_disturb_the_encoder_factors():
    sae = make_sae()
    x = make_batch(sae)
    backward(sae, [x], dense_grad=False)
    (factor,) = row_factors(sae.W_enc)
    assert torch.equal(factor.shift, sae.b_dec)


@pytest.mark.parametrize(("fused", "kind"), [(True, RowOptimizer), (False, DenseOptimizer)])
def test_optimizer_is_made_as_configured(fused, kind):
    adam = {"optimizer": "adamw", "betas": (0.8, 0.9), "eps": 1e-6}
    config = TrainConfig(fused=fused, weight_decay=0.1, grad_clip=2.0, amp="bf16", **adam)
    optimizer = make_optimizer(make_sae(), config)
    assert type(optimizer) is kind
    assert optimizer.rule == "adam"
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.8, 0.9), 1e-6, 0.1)
    assert (optimizer.grad_clip, optimizer.precision) == (2.0, "bf16")
