"""Core metrics of dictionaries against plain dense PyTorch in float64, and by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.evaluation.core import LOG_DENSITIES, CoreMetrics, core_metrics
from sae_fast.evaluation.definitions import DEFINITIONS, LATENTS
from sae_fast.evaluation.dictionary import dictionary_metrics, largest_cosines

ROWS, D_IN, D_SAE = 300, 8, 24


def _sae(arch: str = "topk", **settings: Any) -> SparseAutoencoder:
    sizes = {"k": 3} if arch in ("topk", "batch_topk") else {}
    sae = SparseAutoencoder(SAEConfig(arch=arch, d_in=D_IN, d_sae=D_SAE, **sizes, **settings))
    sae.set_normalization_(torch.arange(float(D_IN)), 0.7)
    return sae.eval()


def _rows(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, D_IN, generator=generator) * 3 + torch.arange(float(D_IN))


def _plain(sae: SparseAutoencoder, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, reconstruction and dense code, float64, the code in the units of the rows."""
    wide, scale = rows.double(), sae.activation_scale.double()
    x = (wide - sae.activation_mean.double()) * scale
    pre = (x - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    if sae.config.arch == "topk":
        kept = torch.zeros_like(pre).scatter_(1, pre.topk(3, dim=1).indices, 1.0)
        pre = pre * kept
    f = pre.relu()
    x_hat = f @ sae.W_dec.double() + sae.b_dec.double()
    return wide, x_hat / scale + sae.activation_mean.double(), f / scale


@pytest.mark.parametrize("arch", ["topk", "relu"])
@torch.no_grad()
def test_every_metric_of_rows_is_that_of_plain_pytorch(arch: str) -> None:
    sae, rows = _sae(arch), _rows()
    documents = torch.arange(ROWS) // 7
    found = core_metrics(sae, rows.split(64), documents=documents.split(64), dead_rate=0.1)
    y, y_hat, f = _plain(sae, rows)
    e, active = y_hat - y, f > 0
    squared, variance = e.square().sum(), (y - y.mean(0)).square().sum()
    assert found.sections["reconstruction_quality"] == pytest.approx(
        {
            "explained_variance": float(1 - squared / variance),
            "fvu": float(squared / variance),
            "explained_variance_overall": float(1 - e.square().mean() / y.var()),
            "explained_variance_batch_averaged": _of_batches(y, e, legacy=False),
            "explained_variance_legacy": _of_batches(y, e, legacy=True),
            "mse": float(e.square().sum(1).mean()),
            "mse_per_number": float(e.square().mean()),
            "relative_error": float(e.norm() / y.norm()),
            "relative_error_mean": float((e.norm(dim=1) / y.norm(dim=1)).mean()),
            "cossim": float(torch.cosine_similarity(y, y_hat, dim=1).mean()),
        },
        rel=1e-4,
    )
    assert found.sections["shrinkage"] == pytest.approx(
        {
            "l2_norm_in": float(y.norm(dim=1).mean()),
            "l2_norm_out": float(y_hat.norm(dim=1).mean()),
            "l2_ratio": float((y_hat.norm(dim=1) / y.norm(dim=1)).mean()),
            "relative_reconstruction_bias": float(y_hat.square().sum() / (y * y_hat).sum()),
        },
        rel=1e-4,
    )
    assert found.sections["sparsity"] == pytest.approx(
        {
            "l0": float(active.sum(1).double().mean()),
            "l0_training_rule": float(active.sum(1).double().mean()),
            "l1": float(f.sum(1).mean()),
        },
        rel=1e-4,
    )
    density = active.double().mean(0)
    silent = [(~part.any(0)).double().mean() for part in active.split(64)]
    misc = found.sections["misc_metrics"]
    assert misc == pytest.approx(
        {
            "freq_over_1_percent": float((density > 0.01).double().mean()),
            "freq_over_10_percent": float((density > 0.1).double().mean()),
            "normalized_freq_over_1_percent": float(density[density > 0.01].sum() / density.sum()),
            "normalized_freq_over_10_percent": float(density[density > 0.1].sum() / density.sum()),
            "frac_alive": float((density > 0).double().mean()),
            "never_active_fraction": float((density == 0).double().mean()),
            "dead_fraction": float(((density == 0) | (density < 0.1)).double().mean()),
            "dead_rate": 0.1,
            "silent_in_batch_fraction": float(torch.stack(silent).mean()),
        },
        rel=1e-6,
    )
    in_document = torch.stack([active[documents == n].any(0) for n in documents.unique()])
    expected = {
        "feature_density": density,
        "mean_activation": f.sum(0) / active.sum(0).clamp_min(1),
        "max_activation": f.amax(0),
        "consistent_activation_heuristic": (
            active.sum(0).double() / in_document.sum(0).clamp_min(1)
        ),
    }
    assert found.latents.keys() == expected.keys()
    for name, numbers in expected.items():
        torch.testing.assert_close(found.latents[name], numbers.double(), rtol=1e-5, atol=1e-6)
    _check_definitions(found)


def _of_batches(y: Tensor, e: Tensor, *, legacy: bool) -> float:
    shares = []
    for part, error in zip(y.split(64), e.split(64), strict=True):
        apart = (part - part.mean(0)).square().sum(1)
        ratio = error.square().sum(1) / apart
        whole = error.square().sum() / apart.sum()
        shares.append(1 - ratio if legacy else (1 - whole).expand(len(part)))
    return float(torch.cat(shares).mean())


def _check_definitions(found: CoreMetrics) -> None:
    for group, metrics in found.sections.items():
        assert metrics.keys() <= DEFINITIONS[group].keys()
    assert found.latents.keys() <= LATENTS.keys()


def test_predicting_the_mean_explains_nothing() -> None:
    sae, rows = _sae(), _rows()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_((rows.mean(0) - sae.activation_mean) * sae.activation_scale)
    found = core_metrics(sae, rows.split(100)).sections["reconstruction_quality"]
    assert found["explained_variance"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [1, 7, 300, 1000])
def test_no_figure_depends_on_the_batches_but_the_ones_that_say_so(size: int) -> None:
    sae, rows = _sae(), _rows()
    documents = torch.arange(ROWS) // 11

    def measured(size: int) -> CoreMetrics:
        parts = documents.split(size)
        return core_metrics(sae, rows.split(size), documents=parts, extreme_rows=9)

    found, whole = measured(size), measured(64)
    for group, metrics in whole.sections.items():
        for name, value in metrics.items():
            if "depends on batch_tokens" not in DEFINITIONS[group][name]:
                assert found.sections[group][name] == pytest.approx(value, rel=1e-5), name
    for name, numbers in whole.latents.items():
        torch.testing.assert_close(found.latents[name], numbers)


def test_the_largest_rows_are_left_out_beside_all() -> None:
    sae, rows = _sae(), _rows()
    rows[[3, 150, 299]] *= 300.0
    found = core_metrics(sae, rows.split(64), extreme_rows=3).sections
    others = rows[[n for n in range(ROWS) if n not in (3, 150, 299)]]
    expected = core_metrics(sae, [others]).sections["reconstruction_quality"]
    left = found["without_largest_norms"]
    assert left.pop("rows_left_out") == 3
    assert left == pytest.approx({name: expected[name] for name in left}, rel=1e-6)
    assert found["reconstruction_quality"]["fvu"] != pytest.approx(expected["fvu"], rel=0.1)


def test_batch_topk_has_the_l0_of_both_rules() -> None:
    sae, rows = _sae("batch_topk"), _rows()
    sae.get_buffer("threshold").fill_(1.5)
    sae.get_buffer("threshold_updates").fill_(1)
    found = core_metrics(sae, rows.split(100)).sections["sparsity"]
    assert found["l0_training_rule"] == pytest.approx(3)
    assert found["l0"] == pytest.approx(float(sae.encode(rows).l0().double().mean()))
    assert found["l0"] != pytest.approx(3, abs=0.1)


def test_densities_are_counted_by_their_logarithm() -> None:
    config = SAEConfig(d_in=4, d_sae=4, k=1, normalize_activations="none", aux_k_coeff=0.0)
    sae = SparseAutoencoder(config).eval()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
    # Latent 0 on 1 of 1,000 rows, latent 1 on 99, latent 2 on 900, latent 3 on none.
    rows = torch.eye(4)[torch.cat([torch.zeros(1), torch.ones(99), torch.full((900,), 2.0)]).long()]
    found = core_metrics(sae, [rows])
    places = {LOG_DENSITIES[n]: count for n, count in enumerate(found.density_histogram) if count}
    assert places == {-3.0: 1, -1.25: 1, -0.25: 1}


def test_a_transcoder_is_measured_on_its_targets() -> None:
    config = SAEConfig(d_in=D_IN, d_out=5, d_sae=D_SAE, k=3, transcoder=True)
    sae, rows = SparseAutoencoder(config).eval(), _rows()
    targets = _rows(2)[:, :5]
    found = core_metrics(sae, rows.split(64), targets.split(64)).sections
    plain = sae.get_reconstruction_error(targets, sae(rows))
    assert found["reconstruction_quality"]["fvu"] == pytest.approx(plain["fvu"])


def test_equal_rows_have_no_variance_whatever_their_numbers() -> None:
    one = _rows()[:1]
    for rows in (one, one.repeat(50, 1)):
        found = core_metrics(_sae(), rows.split(8)).sections["reconstruction_quality"]
        assert found["fvu"] == math.inf
        assert found["explained_variance_batch_averaged"] == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(0, D_IN), "there are no rows"),
        (torch.full((3, D_IN), torch.nan), "rows must be finite"),
    ],
)
def test_rows_that_cannot_be_measured_are_refused(rows: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        core_metrics(_sae(), [rows])


def test_metrics_of_the_weights_are_that_of_all_pairs() -> None:
    sae = _sae("relu")
    section, latents = dictionary_metrics(sae)

    def cosines(W: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(W.detach().double(), dim=1)
        return unit @ unit.T - 3 * torch.eye(len(W))

    decoder, encoder = (cosines(W).amax(1) for W in (sae.W_dec, sae.W_enc))
    both = torch.cosine_similarity(sae.W_enc.detach(), sae.W_dec.detach(), dim=1).double()
    apart = cosines(sae.W_dec)[~torch.eye(D_SAE, dtype=torch.bool)]
    assert section == pytest.approx(
        {
            "average_max_encoder_cosine_sim": float(encoder.mean()),
            "average_max_decoder_cosine_sim": float(decoder.mean()),
            "decoder_redundancy": float(decoder.mean()),
            "max_decoder_cosine_sim_p99_9": float(decoder.quantile(0.999)),
            "mean_squared_decoder_cosine": float(apart.square().mean()),
            "average_encoder_decoder_cosine_sim": float(both.mean()),
        },
        rel=1e-4,
    )
    folded = sae.fold_normalization()
    torch.testing.assert_close(latents["max_decoder_cosine_sim"], decoder, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(latents["encoder_bias"], folded.b_enc.detach().double())
    assert latents.keys() <= LATENTS.keys()
    assert section.keys() <= DEFINITIONS["misc_metrics"].keys()


def test_cosines_of_chosen_rows_are_with_all_rows() -> None:
    W = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([3, 39, 0])
    torch.testing.assert_close(largest_cosines(W, chosen), largest_cosines(W)[chosen])


def test_no_largest_cosine_is_above_1() -> None:
    W = torch.randn(500, 48, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    norms = W.norm(dim=1)
    assert (W @ W.T / norms[:, None] / norms)[:500, 500:].max() > 1  # by rounding
    found = largest_cosines(W)
    assert found.max() == 1
    assert found.min() > 1 - 1e-6
