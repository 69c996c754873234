"""Arch slots: every term, gradient and mode against plain PyTorch, labels, accuracies, heads."""

import pytest
import torch
from plain_sae import input_bias, left_gradients, make_batch
from plain_thresholded import PATHS, make_thresholded

from sae_fast import SAEConfig, SparseAutoencoder, ops
from sae_fast.autoencoder.slots import alignment_loss
from sae_fast.ops import native

DTYPE = torch.float32 if native.load() is not None else torch.float64
TOLERANCE = (
    {"rtol": 2e-4, "atol": 2e-5} if torch.float32 == DTYPE else {"rtol": 1e-9, "atol": 1e-11}
)
N_RELATIONS, N_ANSWERS, N_TOKENS = 3, 5, 60
SIZES = {"n_relations": N_RELATIONS, "n_answers": N_ANSWERS, "value_hidden": 7}
FIELDS = {
    **SIZES,
    "l1_penalty_coeff": 0.3,
    "alignment_coeff": 0.8,
    "independence_coeff": 0.6,
    "orthogonality_coeff": 0.9,
    "value_loss_coeff": 0.7,
    "slot_target": 1.5,
}
OF_VALUES = ("n_answers", "value_hidden", "value_loss_coeff")
CASES = {
    "joint": FIELDS,
    "free rows": {**FIELDS, "decoder_norm": "free", "decoder_init_norm": 0.5},
    "sums": {**FIELDS, "correlation_pairs": "sum"},
    "literal": {**FIELDS, "alignment_after_relu": True, "slots_l1_mean": True},
    "separate_activation": {
        **{name: value for name, value in FIELDS.items() if name not in OF_VALUES},
        "slots_mode": "separate_activation",
    },
}
TERMS = ("l1_loss", "alignment_loss", "value_loss", "independence_loss", "orthogonality_loss")
COEFFICIENTS = {
    "l1_loss": "l1_penalty_coeff",
    "alignment_loss": "alignment_coeff",
    "value_loss": "value_loss_coeff",
    "independence_loss": "independence_coeff",
    "orthogonality_loss": "orthogonality_coeff",
}
WAYS = [(path, dense_grad) for path in PATHS for dense_grad in (True, False)]


def make(fields=FIELDS, path="sparse", **others):
    """Make a small model with no value heads at their initial values."""
    return make_thresholded("slots", path, dtype=DTYPE, **{**fields, **others})


def make_labels():
    """Make relations and answers of N_TOKENS tokens, some without a label."""
    generator = torch.Generator().manual_seed(5)
    relations = torch.randint(-1, N_RELATIONS, (N_TOKENS,), generator=generator)
    answers = torch.randint(-1, N_ANSWERS, (N_TOKENS,), generator=generator)
    return {"relations": relations, "answers": answers}


def correlation_sum(first, second, pairs, same, width=1):
    """Return Σ ρ² over pairs of columns, its mean over varying pairs, or a scaled sum."""

    def unit(h):
        centred = h - h.mean(0)
        norms = centred.norm(dim=0)
        varies = norms > 1e-12
        return centred / torch.where(varies, norms, torch.inf), int(varies.sum())

    (a, n_first), (b, n_second) = unit(first), unit(second)
    squares = (a.t() @ b).square()
    total = squares.sum() - (squares.diagonal().sum() if same else 0)
    count = n_first * (n_first - 1) if same else n_first * n_second
    if pairs == "scaled":
        fewer, more = sorted((n_first, n_second))
        return total * width / (max(fewer, 1) * max(more / (len(first) - 1), 1))
    return total if pairs == "sum" else total / max(count, 1)


def plain_terms(sae, x, relations, answers):
    """Return all terms in plain dense PyTorch, some of them token by token."""
    config, free = sae.config, sae.config.d_sae - sae.config.n_relations
    pre_acts = (x - input_bias(sae)) @ sae.W_enc.t() + sae.b_enc
    acts = pre_acts.relu()
    error = acts @ sae.W_dec + sae.b_dec - x
    norms = sae.W_dec.norm(dim=1) if config.decoder_norm == "free" else torch.ones_like(sae.b_enc)
    distances, surprises = [], []
    for n, (relation, answer) in enumerate(zip(relations.tolist(), answers.tolist(), strict=True)):
        if relation == -1:
            continue
        wanted = torch.zeros_like(pre_acts[n, free:])
        wanted[relation] = config.slot_target
        slots = acts[n, free:] if config.alignment_after_relu else pre_acts[n, free:]
        distances.append((slots - wanted).square().sum())
        if answer == -1 or not config.has_value_heads:
            continue
        slot = acts[n, free + relation] / config.slot_target
        inner = (sae.W_value_in[relation] * slot + sae.b_value_in[relation]).relu()
        logits = inner @ sae.W_value_out[relation] + sae.b_value_out[relation]
        surprises.append(-logits.log_softmax(0)[answer])
    h, pairs = acts, config.correlation_pairs
    terms = {
        "recon_loss": error.square().sum(1).mean(),
        "l1_loss": config.l1_penalty_coeff
        * (acts * norms)[:, :free].sum(1).mean()
        / (free if config.slots_l1_mean else 1),
        "alignment_loss": config.alignment_coeff * torch.stack(distances).mean(),
        "independence_loss": config.independence_coeff
        * correlation_sum(h[:, :free], h[:, :free], pairs, same=True, width=x.shape[1]),
        "orthogonality_loss": config.orthogonality_coeff
        * correlation_sum(h[:, :free], h[:, free:], pairs, same=False, width=x.shape[1]),
    }
    if surprises:
        terms["value_loss"] = config.value_loss_coeff * torch.stack(surprises).mean()
    return terms


def assert_gradients(sae, loss):
    names, parameters = zip(*sae.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    left = left_gradients(sae)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(
            left[name], gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("path", "dense_grad"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_terms_and_gradients_equal_plain_pytorch(case, path, dense_grad, device):
    sae = make(CASES[case], path).to(device)
    x = make_batch(sae, N_TOKENS).to(device)
    labels = {name: column.to(device) for name, column in make_labels().items()}
    loss = sae.training_loss(x, dense_grad=dense_grad, **labels)
    assert isinstance(loss.code, ops.SparseCode if path == "sparse" else ops.DenseCode)
    expected = plain_terms(sae, x, **labels)
    for name, term in expected.items():
        torch.testing.assert_close(loss.components[name], term.detach(), **TOLERANCE)
    total = sum(expected.values())
    torch.testing.assert_close(loss.total.detach(), total.detach(), **TOLERANCE)
    loss.total.backward()
    assert_gradients(sae, total)


@pytest.mark.parametrize(("path", "dense_grad"), WAYS)
@pytest.mark.parametrize("term", TERMS)
def test_gradient_of_one_term_equals_autograd(term, path, dense_grad):
    alone = {name: 0.0 for other, name in COEFFICIENTS.items() if other != term}
    sae = make({**FIELDS, **alone, "reconstruction_coeff": 0.0}, path)
    x, labels = make_batch(sae, N_TOKENS), make_labels()
    loss = sae.training_loss(x, dense_grad=dense_grad, **labels)
    assert {name for name in sae.term_names if float(loss.components[name]) != 0} == {term}
    loss.total.backward()
    assert_gradients(sae, plain_terms(sae, x, **labels)[term])


@pytest.mark.parametrize(("loss_fn", "error"), [("mse", 8.0), ("fvu", 1.0)])
def test_literal_forms_have_the_weights_of_the_paper_for_a_mean_error(loss_fn, error):
    literal = {"slots_l1_mean": True, "alignment_after_relu": True}
    config = SAEConfig(arch="slots", d_in=8, n_relations=2, loss_fn=loss_fn, **literal)
    assert config.slot_target == 1.0
    coefficients = (
        config.reconstruction_coeff,
        config.l1_penalty_coeff,
        config.alignment_coeff,
        config.independence_coeff,
        config.orthogonality_coeff,
        config.value_loss_coeff,
    )
    assert coefficients == (1.0, 1e-3 * error, error, 1e-2, 1e-2, 0.1 * error)
    assert config.correlation_pairs == "scaled"  # which is in units of that error
    assert (config.slots_mode, config.decoder_norm) == ("joint", "unit")


@pytest.mark.parametrize("d_in", [16, 64])
@pytest.mark.parametrize("loss_fn", ["mse", "fvu"])
def test_default_weights_of_l1_and_alignment_are_in_units_of_the_typical_norm(loss_fn, d_in):
    config = SAEConfig(arch="slots", d_in=d_in, n_relations=2, loss_fn=loss_fn)
    error, norm = (d_in if loss_fn == "mse" else 1), d_in**0.5
    assert config.l1_penalty_coeff == pytest.approx(0.1 * error / norm)
    assert config.slot_target == pytest.approx(norm / 2)
    assert config.alignment_coeff == pytest.approx(error / (norm / 2) ** 2)
    given = SAEConfig(arch="slots", d_in=d_in, n_relations=2, loss_fn=loss_fn, slot_target=2.0)
    assert given.alignment_coeff == pytest.approx(error / 4)


def test_separate_value_leaves_gradients_on_the_heads_alone():
    sae = make({**SIZES, "slots_mode": "separate_value"}, "dense")
    x, labels = make_batch(sae, N_TOKENS), make_labels()
    loss = sae.training_loss(x, **labels)
    assert {name for name in sae.term_names if float(loss.components[name]) != 0} == {"value_loss"}
    assert float(loss.components["fvu"]) > 0
    loss.total.backward()
    with_gradient = {name for name, tensor in sae.named_parameters() if tensor.grad is not None}
    assert with_gradient == set(sae.architecture.trained())
    assert with_gradient == {"W_value_in", "b_value_in", "W_value_out", "b_value_out"}


@pytest.mark.parametrize("path", PATHS)
def test_reconstruction_only_leaves_the_other_terms_out(path):
    sae = make(path=path, decorrelation_coeff=0.5)
    x = make_batch(sae, N_TOKENS)
    loss = sae.training_loss(x, reconstruction_only=True, dense_grad=False)  # without labels
    assert {name for name in sae.term_names if float(loss.components[name]) != 0} == {"recon_loss"}
    assert set(loss.components) == {*sae.term_names, *sae.metric_names}
    loss.total.backward()
    zeros = torch.zeros(N_TOKENS, dtype=torch.int64)
    error = plain_terms(sae, x, zeros, zeros)["recon_loss"]
    assert_gradients(sae, error)


def test_accuracies_count_labelled_tokens_only():
    sae = make()
    x = make_batch(sae, N_TOKENS)
    labels = make_labels()
    components = sae.training_loss(x, **labels).components
    free = sae.config.d_sae - N_RELATIONS
    scores = ((x - input_bias(sae)) @ sae.W_enc.t() + sae.b_enc)[:, free:]
    kept = labels["relations"] != -1
    expected = (scores.argmax(1) == labels["relations"])[kept].double().mean()
    assert float(components["slot_accuracy"]) == pytest.approx(float(expected))
    binding = sae.architecture.measure(sae.weights, x, **labels)
    both = kept & (labels["answers"] != -1)
    assert (int(binding.n_relations), int(binding.n_answers)) == (int(kept.sum()), int(both.sum()))
    answered = float(components["value_accuracy"]) * int(both.sum())
    assert float(binding.answers_right) == pytest.approx(answered, abs=1e-3)


def test_tokens_without_labels_give_zero_terms_and_no_accuracy():
    sae = make()
    none = torch.full((N_TOKENS,), -1)
    loss = sae.training_loss(make_batch(sae, N_TOKENS), relations=none, answers=none)
    assert float(loss.components["alignment_loss"]) == 0
    assert float(loss.components["value_loss"]) == 0
    assert torch.isnan(loss.components["slot_accuracy"])
    loss.total.backward()
    assert all(torch.isfinite(gradient).all() for gradient in left_gradients(sae).values())


def test_alignment_moves_slots_that_are_off():
    scores = torch.full((4, 3), -2.0, requires_grad=True)
    alignment_loss(scores, torch.tensor([0, 1, 2, -1])).backward()
    assert (scores.grad[:3].diagonal() < 0).all()
    assert torch.equal(scores.grad[3], torch.zeros(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relations": None}, "relations must be given with arch slots"),
        ({"answers": None}, "answers must be given with arch slots"),
        ({"relations": torch.zeros(3, dtype=torch.int64)}, r"relations must have shape \(60,\)"),
        ({"relations": torch.full((60,), 3)}, "relations must be 0 to 2, or -1 .*, got 3"),
        ({"answers": torch.full((60,), -2)}, "answers must be 0 to 4, or -1 .*, got -2"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, message):
    sae = make()
    with pytest.raises(ValueError, match=message):
        sae.training_loss(make_batch(sae, N_TOKENS), **{**make_labels(), **change})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_sae": 6, "n_relations": 6}, "n_relations must be below d_sae = 6"),
        ({"n_relations": 0}, "n_relations must be at least 1, got 0"),
        ({"slot_target": 0.0}, "slot_target must be greater than 0, got 0.0"),
        ({"alignment_coeff": -1.0}, "alignment_coeff must be at least 0"),
        ({"k": 4}, "k belongs to arch .* and must be left out with arch slots, got 4"),
        ({"aux_k_coeff": 0.1}, "aux_k_coeff belongs to arch"),
        ({"correlation_split": 3}, "correlation_split must be left out with arch slots, got 3"),
        (
            {"slots_mode": "separate_activation", "value_loss_coeff": 0.5},
            "value_loss_coeff must be left out with slots_mode separate_activation, got 0.5",
        ),
        (
            {"slots_mode": "separate_value", "alignment_coeff": 0.5},
            "alignment_coeff must be left out with slots_mode separate_value, got 0.5",
        ),
        ({"arch": "relu", "n_relations": 2}, "n_relations belongs to arch slots"),
        ({"arch": "topk", "slots_mode": "joint"}, "slots_mode belongs to arch slots"),
    ],
)
def test_settings_that_contradict_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig(**{"arch": "slots", "d_in": 8, **fields})


@pytest.mark.parametrize("missing", ["n_relations", "n_answers"])
def test_a_model_needs_its_counts(missing):
    fields = {name: value for name, value in SIZES.items() if name != missing}
    with pytest.raises(ValueError, match=f"{missing} must be given"):
        SparseAutoencoder(SAEConfig(arch="slots", d_in=8, **fields))


@pytest.mark.slow
def test_heads_tell_apart_answers_by_the_strength_of_one_slot():
    """From their initial values heads learn to tell ten answers apart with a small rate."""
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(SAEConfig(arch="slots", d_in=8, n_relations=2, n_answers=10))
    relations, answers = (torch.randint(n, (400,), generator=generator) for n in (2, 10))
    slots = torch.zeros(400, 2)
    strengths = 0.7 + 0.06 * answers + 0.005 * torch.randn(400, generator=generator)
    slots[torch.arange(400), relations] = strengths
    adam = torch.optim.Adam([sae.W_value_in, sae.b_value_in, sae.W_value_out, sae.b_value_out])
    for _ in range(1500):
        logits = sae.architecture.answer_logits(sae.weights, slots, relations)
        torch.nn.functional.cross_entropy(logits, answers).backward()
        adam.step()
        adam.zero_grad()
    assert float((logits.argmax(1) == answers).double().mean()) > 0.95


def test_folding_the_normalisation_keeps_slots_and_answers(tmp_path):
    sae = make(normalize_activations="mean_scale").float()
    sae.set_normalization_(torch.linspace(-1, 1, sae.config.d_in), 0.7)
    x = make_batch(sae.float(), N_TOKENS)
    folded = sae.fold_normalization()
    assert torch.allclose(folded(x), sae(x), atol=1e-4)
    labels = make_labels()
    before = sae.architecture.measure(sae.weights, sae.normalize(x), **labels)
    after = folded.architecture.measure(folded.weights, x, **labels)
    assert list(map(int, before)) == list(map(int, after))
    sae.save(tmp_path)
    read = SparseAutoencoder.from_pretrained(tmp_path)
    assert all(torch.equal(read.state_dict()[name], t) for name, t in sae.state_dict().items())


def test_slots_are_read_where_linspace_escapes_a_device_context(tmp_path, monkeypatch):
    """The first from_pretrained of transformers takes torch.linspace out of device contexts."""
    sae = make()
    sae.save(tmp_path)
    linspace = torch.linspace
    on_cpu = {"device": "cpu"}
    monkeypatch.setattr(torch, "linspace", lambda *ends, **how: linspace(*ends, **(on_cpu | how)))
    read = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(read.state_dict()["b_value_in"], sae.state_dict()["b_value_in"])


CORRELATED = {"d_in": 12, "d_sae": 40, "independence_coeff": 0.4, "orthogonality_coeff": 0.7}


@pytest.mark.parametrize("arch", ["topk", "batch_topk", "relu"])
@pytest.mark.parametrize("pairs", ["mean", "sum"])
def test_any_architecture_can_have_the_correlation_terms(arch, pairs):
    fields = {"arch": arch, "correlation_split": 25, "correlation_pairs": pairs, **CORRELATED}
    if arch != "relu":
        fields |= {"k": 8, "aux_k_coeff": 0.0}
    sae = SparseAutoencoder(SAEConfig(**fields, reconstruction_coeff=0.0, l1_penalty_coeff=0.0))
    sae.initialize_(torch.Generator().manual_seed(0))
    x = make_batch(sae, N_TOKENS)
    loss = sae.training_loss(x, dense_grad=False)
    h = loss.code.dense()
    independence = correlation_sum(h[:, :25], h[:, :25], pairs, same=True)
    orthogonality = correlation_sum(h[:, :25], h[:, 25:], pairs, same=False)
    found = loss.components["independence_loss"], loss.components["orthogonality_loss"]
    expected = 0.4 * independence.detach(), 0.7 * orthogonality.detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    loss.total.backward()
    pre_acts = (x - input_bias(sae)) @ sae.W_enc.t() + sae.b_enc
    h = torch.where(h > 0, pre_acts, 0.0)
    plain = 0.4 * correlation_sum(h[:, :25], h[:, :25], pairs, same=True)
    plain = plain + 0.7 * correlation_sum(h[:, :25], h[:, 25:], pairs, same=False)
    expected = torch.autograd.grad(plain, [sae.W_enc, sae.b_enc])
    left = left_gradients(sae)
    torch.testing.assert_close(left["W_enc"], expected[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(left["b_enc"], expected[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"orthogonality_coeff": 0.1}, "orthogonality_coeff = 0.1 needs correlation_split"),
        ({"correlation_split": 3}, "correlation_split = 3 needs an independence_coeff"),
        ({"correlation_split": 0, "independence_coeff": 1.0}, "correlation_split must be at least"),
        ({"correlation_split": 64, "independence_coeff": 1.0}, "below d_sae = 64, got 64"),
        ({"independence_coeff": -1.0}, "independence_coeff must be at least 0"),
    ],
)
def test_correlation_settings_that_contradict_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig(**{"d_in": 8, **fields})
