"""Codes, directions and thresholds in named units; folding keeps the function."""

import json

import pytest
import torch
from every_model import MEAN, ONE_UNIT, SCALE, make_form, make_raw

from sae_fast.autoencoder import SparseAutoencoder

WITH_THRESHOLDS = ["batch_topk", "matryoshka", "relu", "jumprelu", "gated", "slots"]


@pytest.mark.parametrize("form", ONE_UNIT)
def test_raw_code_is_the_normalized_one_by_the_scale_and_reconstructs_equally(form):
    sae = make_form(form)
    x = make_raw(sae, 2, 3)
    code, raw = sae.encode(x), sae.encode(x, units="raw")
    assert (code.units, raw.units) == ("normalized", "raw")
    assert torch.equal(raw.dense(), code.dense() / sae.output_scale)
    expected = sae.decode(code, x)
    torch.testing.assert_close(sae.decode(raw, x), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        sae.decode(raw.dense(), x, units="raw"), expected, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("units", ["normalized", "raw"])
@pytest.mark.parametrize("form", ONE_UNIT)
def test_one_unit_of_an_edited_code_adds_the_direction(form, units):
    sae = make_form(form, torch.float64)
    x = make_raw(sae, 2, 3)
    code = sae.encode(x, units=units)
    added = sae.decode(code.set(11, code.latent(11) + 1), x) - sae.decode(code, x)
    direction = sae.direction(11, units=units)
    torch.testing.assert_close(added, direction.expand_as(added), rtol=1e-8, atol=1e-8)


def test_direction_of_raw_units_is_42_times_shorter_than_that_of_normalized_ones():
    sae = make_form("topk")
    assert torch.equal(sae.direction(5, units="raw"), sae.W_dec[5])
    ratio = sae.direction(5).norm() / sae.direction(5, units="raw").norm()
    torch.testing.assert_close(ratio, torch.tensor(1 / SCALE))


def test_raw_codes_are_edited_in_raw_units():
    sae = make_form("topk")
    x = make_raw(sae, 2, 3)
    raw = sae.encode(x, units="raw").set(4, 10.0)
    before = sae.encode(x).set(4, 0)
    added = sae.decode(raw) - sae.decode(before)
    torch.testing.assert_close(added, (10 * sae.W_dec[4]).expand_as(added), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("units", ["normalized", "raw"])
@pytest.mark.parametrize("form", WITH_THRESHOLDS)
def test_active_values_exceed_the_threshold_and_the_least_of_many_is_near_it(form, units):
    sae = make_form(form)
    dense = sae.encode(make_raw(sae, 4000), units=units).dense()
    thresholds = sae.threshold_of(slice(None), units=units)
    assert thresholds.shape == (40,)
    assert torch.equal(sae.threshold_of(3, units=units), thresholds[3])
    active = dense > 0
    slack = 1e-5 * dense.max()
    assert (torch.where(active, dense - thresholds, 1.0) > -slack).all()
    least = torch.where(active, dense, torch.inf).amin(0)
    seen = active.sum(0) > 300
    assert seen.any()
    assert ((least - thresholds)[seen] < 0.05 * dense.max()).all()


@pytest.mark.parametrize("form", ["topk", "abs_topk", "groupmax", "relu, signed"])
def test_threshold_of_a_model_without_thresholds_is_refused(form):
    sae = make_form(form)
    with pytest.raises(ValueError, match=f"arch {sae.config.arch} has no thresholds"):
        sae.threshold_of(3)


def test_batch_topk_has_no_threshold_before_any_training():
    sae = make_form("batch_topk")
    sae.threshold_updates.zero_()
    with pytest.raises(ValueError, match="arch batch_topk has no thresholds"):
        sae.threshold_of(3)


@pytest.mark.parametrize(
    "call",
    [
        lambda sae, x: sae.encode(x, units="model"),
        lambda sae, x: sae.direction(3, units="model"),
        lambda sae, x: sae.threshold_of(3, units="model"),
        lambda sae, x: sae.decode(sae.encode(x).dense(), units="model"),
    ],
)
def test_unknown_units_are_refused(call):
    sae = make_form("relu")
    with pytest.raises(ValueError, match="units must be one of 'normalized', 'raw', got 'model'"):
        call(sae, make_raw(sae, 2))


def test_other_units_than_those_of_the_code_are_refused():
    sae = make_form("relu")
    code = sae.encode(make_raw(sae, 2))
    with pytest.raises(ValueError, match="the code is in units 'normalized', but units is"):
        sae.decode(code, units="raw")


@pytest.mark.parametrize("form", ONE_UNIT)
def test_folding_the_normalization_keeps_the_function_in_float64(form):
    sae = make_form(form, torch.float64)
    x = make_raw(sae, 5, 4)
    folded = sae.fold_normalization()
    assert folded.dtype == torch.float64
    assert folded.config.normalize_activations == "none"
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-10, atol=1e-10)
    raw = sae.encode(x, units="raw").dense()
    torch.testing.assert_close(folded.encode(x).dense(), raw, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(folded.direction(7), sae.direction(7, units="raw"))
    if form in WITH_THRESHOLDS:
        torch.testing.assert_close(folded.threshold_of(7), sae.threshold_of(7, units="raw"))
    if sae.config.has_probe:
        torch.testing.assert_close(folded.probe(folded.encode(x)), sae.probe(sae.encode(x)))


@pytest.mark.parametrize(
    "form", ["relu", "relu, signed", "jumprelu", "gated", "slots", "jumprelu transcoder"]
)
def test_folding_decoder_norms_keeps_the_function_in_float64(form):
    fields = {} if form in ("relu", "relu, signed", "slots") else {"decoder_norm": "free"}
    sae = make_form(form, torch.float64, **fields)
    norms = 0.5 + torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sae.W_dec.mul_(norms[:, None])
    x = make_raw(sae, 5, 4)
    before, code = sae(x), sae.encode(x).dense()
    directions = sae.direction(slice(None))
    lengths = directions.norm(dim=1)
    sae.fold_decoder_norms()
    torch.testing.assert_close(sae(x), before, rtol=1e-10, atol=1e-10)
    kept = slice(0, sae.config.group_split if form == "slots" else 40)
    torch.testing.assert_close(sae.W_dec[kept].norm(dim=1), torch.ones_like(lengths[kept]))
    factor = lengths * sae.output_scale
    expected = code * factor
    torch.testing.assert_close(
        sae.encode(x).dense()[..., kept], expected[..., kept], rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("form", ["topk", "batch_topk", "matryoshka", "groupmax"])
def test_decoder_norms_of_models_that_compare_latents_fold_only_where_they_are_one(form):
    sae = make_form(form)
    before = sae.W_dec.clone()
    sae.fold_decoder_norms()
    assert torch.equal(sae.W_dec, before)
    sae.W_dec[3].mul_(2)
    with pytest.raises(ValueError, match="decoder rows must have norm 1"):
        sae.fold_decoder_norms()


def test_folded_model_is_as_trainable_as_the_one_that_was_folded(tmp_path):
    sae = make_form("jumprelu")
    sae.save(tmp_path)
    for trainable in (False, True):
        folded = SparseAutoencoder.from_pretrained(
            tmp_path, trainable=trainable
        ).fold_normalization()
        assert folded.training is trainable
        assert {p.requires_grad for p in folded.parameters()} == {trainable}


class TestFiles:
    def test_saved_model_says_its_units(self, tmp_path):
        sae = make_form("topk")
        sae.save(tmp_path / "own")
        sae.fold_normalization().save(tmp_path / "folded")
        for name, units in (("own", "normalized"), ("folded", "raw")):
            assert json.loads((tmp_path / name / "config.json").read_text())["units"] == units
            loaded = SparseAutoencoder.from_pretrained(tmp_path / name)
            x = make_raw(sae, 3)
            torch.testing.assert_close(loaded(x), sae(x), rtol=1e-4, atol=1e-3)

    def test_units_that_contradict_the_configuration_are_refused(self, tmp_path):
        make_form("topk").save(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace('"units": "normalized"', '"units": "raw"'))
        message = "config.json: units must be 'normalized' with normalize_activations 'mean_scale'"
        with pytest.raises(ValueError, match=message):
            SparseAutoencoder.from_pretrained(tmp_path)

    def test_older_file_without_units_still_loads(self, tmp_path):
        sae = make_form("topk")
        sae.save(tmp_path)
        content = json.loads((tmp_path / "config.json").read_text())
        del content["units"]
        (tmp_path / "config.json").write_text(json.dumps(content))
        loaded = SparseAutoencoder.from_pretrained(tmp_path)
        assert torch.equal(loaded.activation_mean, MEAN)
