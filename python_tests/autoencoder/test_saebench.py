"""`sae.to_saebench()`: the function, shapes and names that evaluators need; SAELens itself."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from every_model import FORMS, make_form, make_raw

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.evaluation.core import CoreMetrics, core_metrics
from sae_fast.evaluation.dictionary import dictionary_metrics

ORIGIN = {"model": "some/model", "hook": "residual.3"}
SAES = [form for form, fields in FORMS.items() if not fields.get("transcoder")]


@pytest.mark.parametrize("form", SAES)
def test_it_is_the_function_of_the_autoencoder_on_raw_activations(form: str) -> None:
    sae = make_form(form).eval()
    sae.origin = dict(ORIGIN)
    x = make_raw(sae, 2, 5)
    found = sae.to_saebench()
    assert (found.W_enc.shape, found.W_dec.shape) == ((12, 40), (40, 12))
    assert hasattr(found, "b_mag") == (sae.config.arch == "gated")  # which SAEBench reads then
    code = found.encode(x)
    assert code.shape == (2, 5, 40)
    torch.testing.assert_close(found(x), sae(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found(x), found.decode(found.encode(x)))
    flat = x.flatten(0, 1)  # a test of SAEBench itself
    torch.testing.assert_close(found(flat), found.decode(code).flatten(0, 1), rtol=1e-5, atol=1e-4)
    free = 40 - sae.config.n_relations if sae.config.arch == "slots" else 40
    torch.testing.assert_close(found.W_dec.norm(dim=1)[:free], torch.ones(free))
    counts = sae.encode(x).l0()
    torch.testing.assert_close((code != 0).sum(-1).to(counts.dtype), counts.reshape(2, 5))


def test_weights_of_a_linear_form_are_those_that_make_the_code() -> None:
    sae = make_form("relu").eval()
    x = make_raw(sae, 7)
    found = sae.to_saebench(hook_name="z.2", model_name="m")
    pre_acts = (x - found.b_dec) @ found.W_enc + found.b_enc
    torch.testing.assert_close(found.encode(x), pre_acts.relu(), rtol=1e-4, atol=1e-4)
    assert found.cfg.hook_name == "blocks.2.attn.hook_z"


def test_the_configuration_has_the_names_of_both_evaluators() -> None:
    sae = make_form("topk").eval()
    sae.origin = dict(ORIGIN)
    found = sae.to_saebench()
    for config in (found.cfg, found.cfg.metadata):
        assert (config.model_name, config.hook_name) == ("some/model", "blocks.3.hook_resid_post")
        assert (config.hook_layer, config.d_in, config.d_sae) == (3, 12, 40)
        assert (config.dtype, config.device) == ("float32", "cpu")
    moved = found.to(torch.float64)
    assert moved is found
    assert (found.dtype, found.cfg.dtype) == (torch.float64, "float64")
    assert found(torch.zeros(1, 12)).dtype == torch.float64
    assert sae.to_saebench(dtype="bfloat16").cfg.to_dict()["dtype"] == "bfloat16"
    assert sae.dtype == torch.float32
    assert found.cfg.to_dict()["architecture"] == "topk"


def test_what_evaluators_do_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="this is a transcoder"):
        make_form("transcoder").to_saebench(hook_name="residual.1")
    sae = make_form("topk")
    sae.origin = {}
    with pytest.raises(ValueError, match="hook_name must be given"):
        sae.to_saebench()


class _Small(NamedTuple):
    """A model of TransformerLens, its tokens and activations, and an autoencoder for these."""

    model: Any
    batches: list[torch.Tensor]
    rows: torch.Tensor
    sae: SparseAutoencoder
    store: SimpleNamespace


HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture
def small() -> _Small:
    lens = pytest.importorskip("transformer_lens")
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 12, "d_head": 8, "n_heads": 2, "d_vocab": 31}
    model = lens.HookedTransformer(lens.HookedTransformerConfig(**sizes, act_fn="gelu"))
    batches = [torch.randint(0, 31, (4, 12)) for _ in range(3)]
    rows = torch.cat([model.run_with_cache(b)[1][HOOK].flatten(0, 1) for b in batches]).detach()
    sae = SparseAutoencoder(SAEConfig(d_in=16, d_sae=40, k=4)).eval().requires_grad_(False)
    sae.initialize_(torch.Generator().manual_seed(0))
    sae.set_normalization_(rows.mean(0), 1 / float(rows.std()))
    sae.origin = {"model": "some/model", "hook": "resid_pre.1"}
    given = iter(batches)
    store = SimpleNamespace(store_batch_size_prompts=4, context_size=12)
    store.get_batch_tokens = lambda *_: next(given)

    def restart() -> None:
        nonlocal given
        given = iter(batches)

    store.reset_input_dataset = restart
    return _Small(model, batches, rows, sae, store)


def _core(small: _Small) -> CoreMetrics:
    documents = [torch.arange(n * 4, n * 4 + 4).repeat_interleave(12) for n in range(3)]
    return core_metrics(small.sae, small.rows.split(48), documents=documents)


def _check_latents(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, list[float]]) -> None:
    """Compare numbers of latents; a latent that is never active has no number there."""
    for name, column in theirs.items():
        expected = torch.tensor(column, dtype=torch.float64)
        seen = ~expected.isnan()
        torch.testing.assert_close(ours[name][seen], expected[seen], rtol=1e-4, atol=1e-5)


def _check_losses(small: _Small, theirs: Mapping[str, float]) -> None:
    """Compare cross-entropies with the ones by the splice of this package."""
    losses = {"sae": 0.0, "without": 0.0}
    for batch in small.batches:
        losses["without"] += float(small.model(batch, return_type="loss")) / 3
        hooks = [(HOOK, small.sae.hook())]
        spliced = small.model.run_with_hooks(batch, return_type="loss", fwd_hooks=hooks)
        losses["sae"] += float(spliced) / 3
    for name, value in losses.items():
        ending = "without_sae" if name == "without" else "with_sae"
        assert theirs[f"ce_loss_{ending}"] == pytest.approx(value, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_evaluation_of_saelens_gives_the_numbers_of_this_package(small: _Small) -> None:
    evals = pytest.importorskip("sae_lens.evals")
    scaler = pytest.importorskip("sae_lens.training.activation_scaler").ActivationScaler()
    found, latents = evals.run_evals(
        *(small.sae.to_saebench(), small.store, small.model, scaler),
        evals.get_eval_everything_config(4, 3, 3),
        exclude_special_tokens=False,
    )
    ours = _core(small)
    for group in ("reconstruction_quality", "shrinkage", "sparsity"):
        for name, value in found[group].items():
            if name == "relative_reconstruction_bias":
                continue  # a mean over batches there
            assert ours.sections[group][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    names = ("feature_density", "consistent_activation_heuristic")
    _check_latents(ours.latents, {name: latents[name] for name in names})
    _check_losses(small, found["model_performance_preservation"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", ["in memory", "exported"])
def test_the_core_evaluation_of_saebench_gives_the_numbers_of_this_package(
    small: _Small, given: str, tmp_path: Path
) -> None:
    saebench = pytest.importorskip("sae_bench.evals.core.main")
    names = [item.name for item in fields(saebench.CoreEvalConfig)]
    config = saebench.CoreEvalConfig(
        **{name: True for name in names if name.startswith("compute_")},
        batch_size_prompts=4,
        n_eval_reconstruction_batches=3,
        n_eval_sparsity_variance_batches=3,
    )
    theirs = small.sae.to_saebench()
    if given == "exported":
        small.sae.export(tmp_path / "files", "saelens")
        theirs = pytest.importorskip("sae_lens").SAE.load_from_disk(str(tmp_path / "files"))
    # As SAEBench itself does with each dictionary first: it sets names in its configuration.
    saebench.general_utils.load_and_format_sae("mine", theirs, "cpu")
    found, latents = saebench.run_evals(theirs, small.store, small.model, config)
    ours = _core(small)
    section, of_weights = dictionary_metrics(small.sae)
    # Otherwise there: a mean over batches; divided by the rows of a batch; the squares of mean
    # squares where the squares of means should be.
    others = {"relative_reconstruction_bias", "mse", "explained_variance"}
    for group in ("reconstruction_quality", "shrinkage", "sparsity"):
        for name, value in found[group].items():
            if name not in others:
                assert ours.sections[group][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    mse = ours.sections["reconstruction_quality"]["mse"]
    assert mse == pytest.approx(48 * found["reconstruction_quality"]["mse"], rel=1e-4)
    _check_latents({**ours.latents, **of_weights}, latents)
    misc = ours.sections["misc_metrics"] | section
    for name, value in saebench.calculate_misc_metrics(latents).items():
        assert misc[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    _check_losses(small, found["model_performance_preservation"])
