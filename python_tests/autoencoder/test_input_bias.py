"""Models that encode x itself, not x − b_dec: against plain PyTorch, folded, saved."""

import pytest
import torch
from plain_sae import left_gradients, make_batch, make_sae
from plain_sae import plain_gradients as plain_topk_gradients
from plain_sae import plain_terms as plain_topk_terms
from plain_thresholded import make_thresholded
from plain_thresholded import plain_gradients as plain_thresholded_gradients
from plain_thresholded import plain_terms as plain_thresholded_terms

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.ops import native
from sae_fast.training.trainer import Trainer

# The compiled kernels are float32; the reference takes float64, which shows a wrong formula.
DTYPE = torch.float32 if native.load() is not None else torch.float64
TOLERANCE = (
    {"rtol": 1e-4, "atol": 2e-5} if torch.float32 == DTYPE else {"rtol": 1e-9, "atol": 1e-11}
)
DEAD = (1, 3, 8, 9, 20, 21)
ALL_TERMS = {"l1_penalty_coeff": 0.3, "decorrelation_coeff": 2.0}
WITH_K = {
    "topk": dict(ALL_TERMS),
    "multi_topk": {**ALL_TERMS, "multi_topk": True},
    "abs_topk": {**ALL_TERMS, "activation": "abs_topk"},
    "groupmax": {**ALL_TERMS, "activation": "groupmax"},
    "batch_topk": {**ALL_TERMS, "arch": "batch_topk"},
    "matryoshka": {**ALL_TERMS, "arch": "matryoshka"},
}
THRESHOLDED = {
    "relu": {"arch": "relu"},
    "jumprelu": {"arch": "jumprelu", "target_l0": 6.0, "pre_act_loss_coeff": 0.3},
    "gated": {"arch": "gated"},
}
SLOTS = {"arch": "slots", "n_relations": 4, "n_answers": 3, "value_hidden": 5}
CASES = [*WITH_K, *THRESHOLDED, "slots"]


def make(case, dtype=torch.float32, **more):
    if case in WITH_K:
        return make_sae(dtype=dtype, dead=DEAD, **{"subtract_b_dec": False, **WITH_K[case], **more})
    fields = {"subtract_b_dec": False, **(THRESHOLDED | {"slots": SLOTS})[case], **more}
    return make_thresholded(dtype=dtype, dead=DEAD, **fields)


@pytest.mark.parametrize("dense_grad", [True, False])
@pytest.mark.parametrize("case", [*WITH_K, *THRESHOLDED])
def test_terms_and_gradients_equal_plain_pytorch(case, dense_grad):
    plain_terms, plain_gradients = plain_topk_terms, plain_topk_gradients
    if case in THRESHOLDED:
        plain_terms, plain_gradients = plain_thresholded_terms, plain_thresholded_gradients
    sae = make(case, DTYPE)
    x = make_batch(sae)
    loss = sae.training_loss(x, dense_grad=dense_grad)
    for name, term in plain_terms(sae, x).items():
        torch.testing.assert_close(loss.components[name], term.detach(), **TOLERANCE)
    loss.total.backward()
    found, expected = left_gradients(sae), plain_gradients(sae, x)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_loss_is_that_of_a_transcoder_whose_targets_are_its_input(case):
    sae = make(case, normalize_activations="none")
    alike = make(case, subtract_b_dec=True, transcoder=True, d_out=12, normalize_activations="none")
    alike.load_state_dict({**alike.state_dict(), **sae.state_dict()})
    x = make_batch(sae)
    labels = {}
    if case == "slots":
        labels = {"relations": torch.arange(30) % 4, "answers": torch.arange(30) % 3}
    losses = [
        model.training_loss(x, targets, **labels) for model, targets in ((sae, None), (alike, x))
    ]
    for loss in losses:
        loss.total.backward()
    assert losses[0].components == losses[1].components
    assert all(
        torch.equal(p.grad, other.grad)
        for p, other in zip(sae.parameters(), alike.parameters(), strict=True)
    )
    assert torch.equal(sae(x), alike(x))


@pytest.mark.parametrize("case", CASES)
def test_folded_model_is_the_same_function_of_raw_activations(case):
    sae = make(case).requires_grad_(False)
    sae.set_normalization_(torch.linspace(-2, 3, 12), 0.25)
    x = 4 * make_batch(sae) + torch.linspace(-2, 3, 12)
    if case in ("batch_topk", "matryoshka"):
        sae.after_step_(sae.training_loss(sae.normalize(x)).code)  # sets the threshold
        sae.threshold.mul_(0.99)  # off the batch's least value, which rounding lets pass or not
    folded = sae.fold_normalization()
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-4, atol=1e-4)
    assert not folded.config.subtract_b_dec
    assert not folded.activation_mean.any()


def test_relu_code_is_that_of_the_encoder_alone():
    """f = ReLU(W_enc x + b_enc), arXiv:2503.18878."""
    sae = make("relu").requires_grad_(False)
    x = make_batch(sae)
    expected = (x @ sae.W_enc.t() + sae.b_enc).relu()
    torch.testing.assert_close(sae.encode(x).dense(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), expected @ sae.W_dec + sae.b_dec, rtol=1e-5, atol=1e-5)


def test_model_is_trained_saved_and_read_back(tmp_path):
    x = torch.randn(2000, 12, generator=torch.Generator().manual_seed(2)) + 3
    config = SAEConfig(d_sae=40, k=8, subtract_b_dec=False)
    run = TrainConfig(batch_size=100, max_steps=60, lr=1e-2, log_every=10)
    trainer = Trainer(config, run, x[200:], heldout=x[:200], show_progress=False)
    sae = trainer.train()
    assert trainer.summary["final_heldout_fvu"] < 0.3
    sae.save(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert not loaded.config.subtract_b_dec
    assert torch.equal(loaded(x), sae(x))


@pytest.mark.parametrize(
    ("name", "fields"), [("subtract_b_dec", {}), ("use_relu", {"arch": "relu"})]
)
def test_training_does_not_start_from_a_model_that_encodes_in_another_way(name, fields, tmp_path):
    config = {"d_in": 12, "d_sae": 40, **fields}
    SparseAutoencoder(SAEConfig(**config)).save(tmp_path)
    run = TrainConfig(batch_size=100, max_steps=1, lr=1e-2, start_from=str(tmp_path))
    with pytest.raises(ValueError, match=f"is of a model with {name} = True, this one has False"):
        Trainer(SAEConfig(**config, **{name: False}), run, torch.randn(200, 12))
