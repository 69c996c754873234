"""Trainings with loss terms of one's own: they act, are logged, and are remembered."""

import re

import pytest
import torch

from sae_fast import LossTerm, SAEConfig, TrainConfig, Trainer


def mean_square(sae, batch, code, x_hat):
    return code.values.square().sum() / code.n_rows


def make(activations, coefficient, *, fused=True, directory=None, sae=None, **settings):
    terms = () if coefficient is None else [LossTerm("square_loss", mean_square, coefficient)]
    defaults = {"batch_size": 64, "max_steps": 6, "log_every": 1, "lr": 1e-2}
    train = TrainConfig(
        **{**defaults, **settings}, fused=fused, checkpoint_dir=directory and str(directory)
    )
    config = SAEConfig(**{"d_sae": 32, "k": 4, **(sae or {})})
    return Trainer(config, train, activations, loss_terms=terms, show_progress=False)


@pytest.mark.parametrize("arch", ["topk", "relu", "jumprelu"])
def test_the_factored_step_equals_the_dense_one(arch, activations):
    sae = {"arch": arch, "k": 4 if arch == "topk" else None}
    fused, dense = (make(activations, 0.5, fused=fused, sae=sae) for fused in (True, False))
    one, other = fused.train(), dense.train()
    torch.testing.assert_close(one.W_enc, other.W_enc, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.W_dec, other.W_dec, rtol=1e-3, atol=1e-4)


def test_a_term_is_logged_with_its_coefficient_and_acts(activations):
    weak, strong = make(activations, 1e-3), make(activations, 10.0)
    weak.train()
    strong.train()
    row = strong.history[-1]
    names = ("recon_loss", "l1_loss", "decorr_loss", "aux_loss", "square_loss")
    assert sum(row[name] for name in names) == pytest.approx(row["loss"], rel=1e-5)
    assert strong.summary["final_square_loss"] == row["square_loss"]
    assert row["square_loss"] / 10 < weak.history[-1]["square_loss"] / 1e-3


def test_accumulated_parts_give_the_step_of_the_whole_batch(activations):
    whole = make(activations, 0.5, batch_size=128, max_steps=1)
    parts = make(activations, 0.5, grad_acc_steps=2, max_steps=1)
    torch.testing.assert_close(whole.train().W_enc, parts.train().W_enc, rtol=1e-3, atol=1e-4)
    one, other = whole.history[-1], parts.history[-1]
    assert one["square_loss"] == pytest.approx(other["square_loss"], rel=1e-5)


def test_a_resumed_run_equals_the_straight_one_and_warns_of_other_terms(
    activations, tmp_path, caplog
):
    straight = make(activations, 0.5, directory=tmp_path / "a", checkpoint_every=3)
    straight.train()
    at = str(tmp_path / "a/checkpoints/step-00000003")
    resumed = make(activations, 0.5, directory=tmp_path / "b", resume_from=at)
    resumed.train()
    assert "loss_terms" not in caplog.text
    assert torch.equal(resumed.model().W_enc, straight.model().W_enc)
    make(activations, 0.25, directory=tmp_path / "c", resume_from=at).close()
    assert "resumed with other loss_terms than before: {'square_loss': 0.5}" in caplog.text


def test_an_object_that_is_no_term_is_refused(activations):
    config = SAEConfig(k=4), TrainConfig(batch_size=64, max_steps=1)
    with pytest.raises(ValueError, match=r"must be a list of sae_fast.LossTerm, got function"):
        Trainer(*config, activations, loss_terms=[mean_square])


WRONG = {
    "loss term a: function must take (sae, batch, code, x_hat), got int": ("a", 3),
    "loss term a: function must take (sae, batch, code, x_hat), got one that takes (sae)": (
        *("a", lambda sae: 1),
    ),
    "loss term: name must be a word such as my_loss, got 3": (3, mean_square),
    "loss term a: coefficient must be a finite number, got 'x'": ("a", mean_square, "x"),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_term_that_cannot_be_called_is_refused_in_one_line(words):
    with pytest.raises(ValueError, match=re.escape(words)):
        LossTerm(*WRONG[words])


def fail(sae, batch, code, x_hat):
    return code.values.sum() / {}["rate"]


def change_batch(sae, batch, code, x_hat):
    batch.x.zero_()
    return code.values.sum()


AT_WORK = {
    "loss term a failed with KeyError: 'rate' (test_own_loss_terms.py, line": fail,
    "backward through loss term a failed with RuntimeError: one of the variables": change_batch,
    "loss term a: the function must return a tensor, got float": lambda *given: 1.0,
    "loss term a: the function must return a 0-d tensor of floats, got torch.float32 of shape": (
        lambda sae, batch, code, x_hat: code.values.sum(1)
    ),
    "; of the terms of the loss only a is not finite": (
        lambda sae, batch, code, x_hat: code.values.sum() * torch.nan
    ),
}


@pytest.mark.parametrize("words", AT_WORK)
def test_a_term_that_fails_is_named_in_one_line(words, activations):
    config = SAEConfig(d_sae=32, k=4), TrainConfig(batch_size=64, max_steps=1, lr=1e-2)
    terms = [LossTerm("a", AT_WORK[words])]
    trainer = Trainer(*config, activations, loss_terms=terms, show_progress=False)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [LossTerm("a", mean_square), None, "a"])
def test_terms_that_are_no_list_are_refused(given, activations):
    config = SAEConfig(k=4), TrainConfig(batch_size=64, max_steps=1)
    with pytest.raises(ValueError, match=r"loss_terms must be a list of sae_fast.LossTerm, got"):
        Trainer(*config, activations, loss_terms=given)
