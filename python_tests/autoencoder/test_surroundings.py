"""Models made under torch's global settings: a default dtype, inference mode, no gradients."""

import contextlib

import pytest
import torch

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig

SIZES = {"d_in": 12, "d_sae": 40}
PROBE = {"probe_loss_coeff": 1.0, "probe_labels": "labels/rule", "probe_classes": 3}
CASES = {
    "topk": {"k": 5},
    "batch_topk": {"arch": "batch_topk", "k": 5},
    "matryoshka": {"arch": "matryoshka", "k": 5},
    "relu": {"arch": "relu", "target_l0": 4.0},
    "relu, signed": {"arch": "relu", "use_relu": False},
    "jumprelu": {"arch": "jumprelu", "target_l0": 4.0, "pre_act_loss_coeff": 0.1},
    "gated": {"arch": "gated", "target_l0": 4.0},
    "slots": {"arch": "slots", "n_relations": 4, "n_answers": 3},
    "skip transcoder": {"k": 5, "transcoder": True, "d_out": 7, "skip_connection": True},
    "probe": {"k": 5, **PROBE},
    "temporal, correlations": {
        "k": 5,
        "temporal_smoothness_coeff": 0.3,
        "independence_coeff": 0.2,
        "decorrelation_coeff": 0.2,
    },
    "fvu, chunks": {
        **{"k": 5, "loss_fn": "fvu", "decorrelation": "chunked_max"},
        **{"decorrelation_coeff": 0.2, "decorrelation_chunk": 8},
    },
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make(case):
    sae = SparseAutoencoder(SAEConfig(**SIZES, **CASES[case]))
    sae.initialize_(torch.Generator().manual_seed(0))
    return sae


def use(case):
    """Return all results of a model in one step of training and one inference."""
    sae = make(case)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 12, generator=generator, dtype=torch.float32)
    y = torch.randn(30, 7, generator=generator, dtype=torch.float32)
    labels = {}
    if sae.config.arch == "slots":
        labels = {"relations": torch.arange(30) % 4, "answers": torch.arange(30) % 3}
    loss = sae.training_loss(
        *(x, y if sae.config.transcoder else None),
        **{"labels": torch.arange(30) % 3, "starts": torch.arange(30) % 10 == 0, **labels},
    )
    loss.total.backward()
    sae.update_fired_(loss.code, 30)
    sae.after_step_(loss.code)
    x_hat, code = sae.forward_with_code(x)
    gradients = [p.grad for p in sae.parameters() if p.grad is not None]
    tensors = [*sae.state_dict().values(), *gradients, *loss.components.values()]
    return [*tensors, x_hat, code.values, sae.decode(code.dense(), x)], sae.get_activation_stats(
        code
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_default_dtype_changes_no_bit(case, dtype):
    expected, expected_stats = use(case)
    with default_dtype(dtype):
        found, stats = use(case)
    assert stats == expected_stats
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_is_read_under_another_default_dtype(tmp_path, dtype):
    sae = make("skip transcoder")
    sae.save(tmp_path)
    with default_dtype(dtype):
        loaded = SparseAutoencoder.from_pretrained(tmp_path)
    own = [*sae.parameters(), *sae.buffers()]
    for tensor, other in zip(own, [*loaded.parameters(), *loaded.buffers()], strict=True):
        assert torch.equal(tensor, other)
        assert tensor.dtype == other.dtype


@pytest.mark.parametrize("trainable", [False, True])
def test_only_a_trainable_model_records_gradients_once_read(tmp_path, trainable):
    sae = make("gated")
    sae.save(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path, trainable=trainable)
    assert loaded.training is trainable
    assert all(p.requires_grad is trainable for p in loaded.parameters())
    x = torch.randn(30, 12)
    assert loaded(x).requires_grad is trainable
    if trainable:
        loaded.training_loss(x).total.backward()
        assert loaded.W_enc.grad.any()


def test_codes_of_a_model_that_was_read_keep_their_own_memory_alone(tmp_path):
    make("topk").save(tmp_path)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    kept = [sae.encode(torch.randn(100, 12)) for _ in range(3)]
    parts = [part for code in kept for part in (code.values, code.indices)]
    assert sum(part.untyped_storage().nbytes() for part in parts) == 3 * 100 * 5 * 8
    assert all(part.grad_fn is None for part in parts)


def made_inside(case, path):
    return make(case)


def read_inside(case, path):
    make(case).save(path)
    return SparseAutoencoder.from_pretrained(path, trainable=True)


def folded_inside(case, path):
    return make(case).fold_normalization()


@pytest.mark.parametrize("source", [made_inside, read_inside, folded_inside])
@pytest.mark.parametrize("case", ["topk", "jumprelu", "skip transcoder"])
def test_model_made_in_inference_mode_is_trained_outside_of_it(case, source, tmp_path):
    with torch.inference_mode():
        sae = source(case, tmp_path)
        x = torch.randn(30, 12)
        assert sae(x).isfinite().all()
    assert not any(tensor.is_inference() for tensor in (*sae.parameters(), *sae.buffers()))
    targets = torch.randn(30, 7) if sae.config.transcoder else None
    sae.training_loss(torch.randn(30, 12), targets).total.backward()
    assert sae.W_enc.grad.any()
