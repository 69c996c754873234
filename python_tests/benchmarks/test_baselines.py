"""The baselines compute the results of sae_fast, so that their times can be compared."""

from contextlib import contextmanager

import pytest
import torch

from benchmarks.baselines import sae_fast_trainer
from benchmarks.baselines.eager import EagerTrainer
from benchmarks.baselines.sae_fast_trainer import CapturedTrainer, FittedTrainer, SaeFastTrainer
from benchmarks.baselines.tuned import GatherTrainer, TunedTrainer
from benchmarks.implementations import choose_implementations, make_local
from benchmarks.support.problem import learning_rate, make_activations, make_weights
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig

BASELINES = [EagerTrainer, TunedTrainer, GatherTrainer]
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


def step_losses(trainer, size, steps=3):
    batches = make_activations(size, steps).split(size.n_tokens)
    return torch.stack([trainer.step(x) for x in batches])


@pytest.mark.parametrize("name", ["eager", "tuned", "gather"])
def test_first_losses_equal_those_of_sae_fast(name, tiny):
    weights, lr = make_weights(tiny), learning_rate(tiny)
    ours = step_losses(make_local("sae_fast", weights, tiny.k, lr), tiny)
    theirs = step_losses(make_local(name, weights, tiny.k, lr), tiny)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["eager_bf16", "tuned_bf16", "gather_bf16", "sae_fast_bf16"])
def test_first_loss_in_bf16_is_near_that_in_fp32(name, tiny):
    weights, lr = make_weights(tiny), learning_rate(tiny)
    exact = step_losses(make_local("eager", weights, tiny.k, lr), tiny, 1)
    rounded = step_losses(make_local(name, weights, tiny.k, lr), tiny, 1)
    torch.testing.assert_close(rounded, exact, rtol=3e-2, atol=0)


@pytest.mark.parametrize("cls", BASELINES)
def test_gradients_with_dead_latents_equal_those_of_sae_fast(cls, tiny):
    weights = make_weights(tiny)
    config = SAEConfig(
        d_in=tiny.d_in, d_sae=tiny.d_sae, k=tiny.k, normalize_activations="none", aux_k_coeff=1 / 32
    )
    sae = SparseAutoencoder(config)
    sae.load_state_dict(vars(weights), strict=False)
    dead = torch.arange(tiny.d_sae) % 2 == 1
    sae.tokens_since_fired[dead] = config.kept_dead_after_tokens
    trainer = cls(weights, tiny.k, 1e-3)
    x = make_activations(tiny, 1)
    ours = sae.training_loss(x)
    theirs = trainer.compute_loss(x, dead)[0]
    ours.total.backward()
    theirs.backward()
    torch.testing.assert_close(ours.total, theirs)
    for name, parameter in zip(PARAMETERS, trainer.parameters, strict=True):
        expected = parameter.grad
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            sae.get_parameter(name).grad, expected, rtol=1e-4, atol=1e-5 * scale
        )


@pytest.mark.parametrize("cls", BASELINES)
def test_a_step_keeps_decoder_rows_at_unit_norm(cls, tiny):
    trainer = cls(make_weights(tiny), tiny.k, 1e-2)
    step_losses(trainer, tiny, 2)
    torch.testing.assert_close(trainer.W_dec.norm(dim=1), torch.ones(tiny.d_sae))


def test_latents_count_their_silent_tokens(tiny):
    trainer = EagerTrainer(make_weights(tiny), tiny.k, 1e-3)
    step_losses(trainer, tiny, 2)
    counts = set(trainer.tokens_since_fired.tolist())
    assert counts <= {0, tiny.n_tokens, 2 * tiny.n_tokens}
    assert 0 in counts


def test_a_run_of_known_length_has_the_defaults_of_sae_fast(tiny):
    run = {"n_tokens": tiny.n_tokens, "steps": 100}
    trainer = FittedTrainer(make_weights(tiny), tiny.k, 0.004, precision="screened", **run)
    assert trainer.sae.config.dead_after_tokens == 100 * tiny.n_tokens // 20
    assert trainer.optimizer.betas == (0.8, 0.95)
    x, rates = make_activations(tiny, 1), []
    for _ in range(100):
        trainer.step(x)
        rates.append(trainer.learning_rate)
    assert max(rates) == rates[5] == rates[58] == 0.004
    assert rates[0] == pytest.approx(0.004 / 6)
    assert rates[-1] == pytest.approx(0.004 / 41)


def test_the_step_in_a_graph_warms_up_on_the_stream_of_its_capture(tiny, monkeypatch):
    made_on = []

    class Recorder:
        """A GraphRecorder without a GPU, whose replay does the work again."""

        stream = "current"

        def __init__(self, device):
            pass

        @contextmanager
        def side_stream(self):
            self.stream = "side"
            yield
            self.stream = "current"

        def record(self, work):
            return lambda: (made_on.append("replay"), work())

    def noted(trainer, x, step=SaeFastTrainer.step):
        made_on.append(captured.recorder.stream)
        return step(trainer, x)

    monkeypatch.setattr(sae_fast_trainer, "GraphRecorder", Recorder)
    weights, lr = make_weights(tiny), learning_rate(tiny)
    expected = step_losses(SaeFastTrainer(weights, tiny.k, lr), tiny)
    captured = CapturedTrainer(SaeFastTrainer(weights, tiny.k, lr))
    monkeypatch.setattr(SaeFastTrainer, "step", noted)
    assert torch.equal(step_losses(captured, tiny), expected)
    assert made_on == ["side", "replay", "current", "replay", "current"]


def test_an_unknown_peer_is_named():
    with pytest.raises(ValueError, match="got 'unknown'"):
        choose_implementations(["unknown"], {})


def test_a_peer_without_an_interpreter_is_missing():
    local, peers, missing = choose_implementations(["eager", "sparsify"], {"sparsify": "python"})
    assert (local, peers, missing) == (["eager"], {"sparsify": "python"}, [])
    assert choose_implementations(["saelens_bf16"], {"saelens": "p"})[1] == {"saelens_bf16": "p"}
