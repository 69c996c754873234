"""`sae.to_saebench()`: the function, shapes and names that evaluators need; SAELens itself."""

from types import SimpleNamespace

import pytest
import torch
from every_model import FORMS, make_form, make_raw

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.evaluation.core import core_metrics

ORIGIN = {"model": "some/model", "hook": "residual.3"}
SAES = [form for form, fields in FORMS.items() if not fields.get("transcoder")]


@pytest.mark.parametrize("form", SAES)
def test_it_is_the_function_of_the_autoencoder_on_raw_activations(form: str) -> None:
    sae = make_form(form).eval()
    sae.origin = dict(ORIGIN)
    x = make_raw(sae, 2, 5)
    found = sae.to_saebench()
    assert (found.W_enc.shape, found.W_dec.shape) == ((12, 40), (40, 12))
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


@pytest.mark.filterwarnings("ignore")
def test_the_evaluation_of_saelens_gives_the_numbers_of_this_package() -> None:
    evals = pytest.importorskip("sae_lens.evals")
    scaler = pytest.importorskip("sae_lens.training.activation_scaler").ActivationScaler()
    lens = pytest.importorskip("transformer_lens")
    torch.manual_seed(0)
    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 12, "d_head": 8, "n_heads": 2, "d_vocab": 31}
    model = lens.HookedTransformer(lens.HookedTransformerConfig(**sizes, act_fn="gelu"))
    batches = [torch.randint(0, 31, (4, 12)) for _ in range(3)]
    hook = "blocks.1.hook_resid_pre"
    rows = torch.cat([model.run_with_cache(b)[1][hook].flatten(0, 1) for b in batches])
    sae = SparseAutoencoder(SAEConfig(d_in=16, d_sae=40, k=4)).eval().requires_grad_(False)
    sae.initialize_(torch.Generator().manual_seed(0))
    sae.set_normalization_(rows.mean(0), 1 / float(rows.std()))
    given = iter([])
    store = SimpleNamespace(store_batch_size_prompts=4, context_size=12)
    store.get_batch_tokens = lambda *_: next(given)

    def restart() -> None:
        nonlocal given
        given = iter(batches)

    store.reset_input_dataset = restart
    restart()
    found, latents = evals.run_evals(
        *(sae.to_saebench(hook_name="resid_pre.1"), store, model, scaler),
        evals.get_eval_everything_config(4, 3, 3),
        exclude_special_tokens=False,
    )
    parts = [part.detach() for part in rows.split(48)]
    documents = [torch.arange(n * 4, n * 4 + 4).repeat_interleave(12) for n in range(3)]
    ours = core_metrics(sae, parts, documents=documents)
    for group in ("reconstruction_quality", "shrinkage", "sparsity"):
        for name, value in found[group].items():
            if name == "relative_reconstruction_bias":
                continue  # a mean over batches there
            assert ours.sections[group][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name in ("feature_density", "consistent_activation_heuristic"):
        expected = torch.tensor(latents[name], dtype=torch.float64)
        seen = ~expected.isnan()
        torch.testing.assert_close(ours.latents[name][seen], expected[seen], rtol=1e-5, atol=1e-6)
    losses = {"sae": 0.0, "without": 0.0}
    for batch in batches:  # by the splice of this package
        losses["without"] += float(model(batch, return_type="loss")) / 3
        spliced = model.run_with_hooks(batch, return_type="loss", fwd_hooks=[(hook, sae.hook())])
        losses["sae"] += float(spliced) / 3
    performance = found["model_performance_preservation"]
    for name, value in losses.items():
        ending = "without_sae" if name == "without" else "with_sae"
        assert performance[f"ce_loss_{ending}"] == pytest.approx(value, rel=1e-4)
