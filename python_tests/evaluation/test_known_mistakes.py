"""Known mistakes of evaluations: each has a test here or elsewhere, as docs name it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make_network
from small_texts import make_batches, make_texts
from torch import Tensor

from sae_fast.activations.capture import resolve_hooks
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.evaluation.core import CoreMetrics, core_metrics
from sae_fast.evaluation.definitions import DEFINITIONS
from sae_fast.evaluation.dictionary import dictionary_metrics
from sae_fast.evaluation.language_model import (
    KEPT,
    MASK,
    TOKENS,
    ModelText,
    language_model_metrics,
    token_columns,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "development" / "testing.md"


def _rows(count: int = 400, width: int = 8) -> Tensor:
    """Return rows whose dimensions have very different means."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, width, generator=generator) + 5 * torch.arange(float(width))


def _sae(**fields: Any) -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(**{"d_in": 8, "d_sae": 24, "k": 3, **fields}))
    sae.initialize_(torch.Generator().manual_seed(0))
    return sae.eval().requires_grad_(False)


def _quality(found: CoreMetrics) -> dict[str, float]:
    return found.sections["reconstruction_quality"]


def _mean_predictor(mean: Tensor) -> SparseAutoencoder:
    sae = _sae(normalize_activations="none")
    sae.W_dec.zero_()
    sae.b_dec.copy_(mean)
    return sae


def test_means_of_dimensions_are_no_variance() -> None:
    """Of one variance of all numbers, predicting the means of dimensions explains nearly all."""
    rows = _rows()
    found = _quality(core_metrics(_mean_predictor(rows.mean(0)), [rows]))
    assert found["explained_variance"] == pytest.approx(0, abs=1e-5)
    assert found["explained_variance_overall"] > 0.9


def test_a_variance_about_zero_is_not_taken() -> None:
    """Predicting a mean that is far from zero explains nothing, though it is near in norm."""
    rows = _rows() + 100
    found = _quality(core_metrics(_mean_predictor(rows.mean(0)), [rows]))
    assert 1 - found["relative_error"] ** 2 > 0.99
    assert found["explained_variance"] == pytest.approx(0, abs=1e-4)


def test_sums_over_all_rows_are_divided_and_not_ratios_of_rows_averaged() -> None:
    """A row near the mean with a large ratio decides an average of ratios, not the metric."""
    sae, rows = _sae(), _rows()
    rows[0] = rows[1:].mean(0) + 1e-3
    found = _quality(core_metrics(sae, [rows]))
    x, x_hat = rows.double(), sae(rows).double()
    apart = (x - x.mean(0)).square()
    expected = 1 - (x - x_hat).square().sum() / apart.sum()
    assert found["explained_variance"] == pytest.approx(float(expected), rel=1e-4)
    assert found["explained_variance_legacy"] < found["explained_variance"] - 10


@pytest.mark.parametrize("arch", ["topk", "jumprelu"])
def test_normalised_codes_are_compared_with_the_rows_as_they_are(arch: str) -> None:
    """Metrics are in the units of the activations, with normalisation and folded into weights."""
    sae = _sae(arch=arch, **({} if arch == "topk" else {"k": None}))
    if arch == "jumprelu":
        sae.get_parameter("threshold").fill_(0.6)
    rows = _rows()
    sae.set_normalization_(rows.mean(0), 0.25)
    whole, folded = (core_metrics(model, [rows]) for model in (sae, sae.fold_normalization()))
    for group, metrics in whole.sections.items():
        assert folded.sections[group] == pytest.approx(metrics, rel=1e-4, abs=1e-6), group
    torch.testing.assert_close(folded.latents["mean_activation"], whole.latents["mean_activation"])


def test_latents_that_are_listed_with_value_0_are_not_active() -> None:
    """TopK lists k latents for each row, also where fewer are above 0."""
    sae = _sae(normalize_activations="none", k=5)
    sae.b_enc.fill_(-1e9)
    sae.b_enc[:2] = 1.0
    found = core_metrics(sae, [_rows() * 1e-6])
    assert found.sections["sparsity"]["l0"] == 2
    assert found.latents["feature_density"].tolist() == [1.0, 1.0, *[0.0] * 22]
    assert found.sections["misc_metrics"]["frac_alive"] == pytest.approx(2 / 24)


def test_the_rows_behind_a_share_of_live_latents_are_stated() -> None:
    sae, rows = _sae(), _rows()
    few, many = (core_metrics(sae, [rows[:count]]) for count in (3, 400))
    assert few.sections["misc_metrics"]["frac_alive"] < many.sections["misc_metrics"]["frac_alive"]
    counts = [
        found.sections["token_stats"]["total_tokens_eval_sparsity_variance"]
        for found in (few, many)
    ]
    assert counts == [3, 400]


def test_redundancy_of_the_decoder_is_not_called_absorption() -> None:
    section, _ = dictionary_metrics(_sae())
    names = [*section, *(name for group in DEFINITIONS.values() for name in group)]
    assert not [name for name in names if "absorption" in name]
    assert section["decoder_redundancy"] == section["average_max_decoder_cosine_sim"]


def test_padding_is_neither_encoded_nor_predicted() -> None:
    """The losses of documents in padded sequences are the losses of the documents alone."""
    network = make_network("gpt2").requires_grad_(False)
    (hook,) = resolve_hooks(network, [1])
    batches = make_batches(make_texts(12), pack=False)
    device = torch.device("cpu")
    columns = list(token_columns(batches, None, 0, 10_000, device))
    assert not all(bool(batch[MASK].all()) for batch in columns)

    def alone() -> Any:
        for batch in columns:
            for n, length in enumerate(batch[MASK].sum(1).tolist()):
                yield {name: numbers[n : n + 1, :length] for name, numbers in batch.items()}

    sae = _sae(d_in=16)
    padded, single = (
        language_model_metrics(sae, ModelText(network, hook, None, True, given))
        for given in (lambda: iter(columns), alone)
    )
    assert padded["token_stats"] == single["token_stats"]
    rows = sum(int(batch[KEPT].sum()) for batch in columns)
    assert padded["token_stats"]["total_tokens_eval_reconstruction"] == rows
    assert columns[0][TOKENS].numel() > int(columns[0][KEPT].sum())
    for group in ("model_performance_preservation", "model_behavior_preservation"):
        assert padded[group] == pytest.approx(single[group], rel=1e-3, abs=1e-5)


def test_every_test_that_the_page_names_is_there() -> None:
    if not PAGE.exists():
        pytest.skip("no checkout: the documentation is not installed")
    named = re.findall(r"`(python_tests/\S+\.py)::(test_\w+)`", PAGE.read_text("utf-8"))
    assert len(named) >= 12
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), (file, name)
