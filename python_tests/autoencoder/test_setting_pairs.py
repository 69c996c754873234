"""Any two settings of a model together: refused by name, or with the loss of plain PyTorch.

Each pair is tried with one value and one architecture, in turn from the architectures that accept
each of the two settings alone.
"""

import copy
import itertools

import pytest
import torch
from plain_sae import input_bias, left_gradients, make_batch, make_targets, plain_decorrelation
from plain_sae import plain_acts as plain_topk_code
from plain_sae import plain_terms as plain_topk_terms
from plain_thresholded import go
from plain_thresholded import plain_code as plain_thresholded_code
from plain_thresholded import plain_terms as plain_thresholded_terms
from setting_values import (
    ARCHITECTURES,
    BASES,
    N_TOKENS,
    columns_of,
    make_model,
    over_base,
    values_of,
    with_all,
)
from slow_cases import slow_after
from test_slots import correlation_sum
from test_slots import plain_terms as plain_slots_terms
from torch.nn import functional

from sae_fast.config import SAEConfig
from sae_fast.config.fields import field_names

# Sizes, the architecture itself, and settings that act in a training but not in a single loss.
APART = {"arch", "d_in", "d_sae", "dead_after_tokens", "normalize_activations", "b_dec_init"}
NAMES = [name for name in field_names(SAEConfig) if name not in APART]
VALUES = [settings for name in NAMES for settings in values_of(SAEConfig, name)]
DEAD = (1, 3, 8, 9, 20, 21)
K_ARCHITECTURES = ("topk", "batch_topk", "matryoshka")
TOLERANCE = {"rtol": 2e-4, "atol": 5e-5}


def refusal(arch, settings):
    """Return the error of a configuration, or None if it is accepted."""
    try:
        SAEConfig(**over_base(arch, settings))
    except ValueError as error:
        return str(error)
    return None


TAKEN = [[arch for arch in ARCHITECTURES if not refusal(arch, one)] for one in VALUES]


def pairs():
    """Yield pairs of settings with an architecture."""
    turn = itertools.count()
    for (first, arches), (second, others) in itertools.combinations(
        zip(VALUES, TAKEN, strict=True), 2
    ):
        settings = with_all(first, second)
        if settings is None:
            continue
        both = [arch for arch in arches if arch in others] or [*arches, *others, "topk"][:1]
        yield both[next(turn) % len(both)], settings


def plain_code(sae, x):
    if sae.config.arch in K_ARCHITECTURES:
        return plain_topk_code(sae, x)
    if sae.config.arch == "slots":
        return ((x - input_bias(sae)) @ sae.W_enc.t() + sae.b_enc).relu()
    return plain_thresholded_code(sae, x)


def plain_terms(sae, x, targets, columns):
    """Return the loss terms of a model in plain PyTorch, or None without a plain form."""
    config = sae.config
    if config.arch in K_ARCHITECTURES:
        terms = plain_topk_terms(sae, x, targets)
    else:
        if config.arch == "slots":
            is_written = config.loss_fn == "mse" and not config.transcoder
            if not is_written or config.slots_mode == "separate_value":
                return None
            terms = plain_slots_terms(sae, x, columns["relations"], columns["answers"])
            terms["recon_loss"] = config.reconstruction_coeff * terms["recon_loss"]
        else:
            terms = plain_thresholded_terms(sae, x, targets)
        terms["decorr_loss"] = config.decorrelation_coeff * plain_decorrelation(sae)
    return terms | guided_terms(sae, plain_code(sae, x), columns)


def guided_terms(sae, acts, columns):
    """Return the terms of labels, neighbours and pairs of latents."""
    config, terms = sae.config, {}
    if config.has_probe:
        predicted = acts @ sae.W_probe + sae.b_probe
        if config.probe_task == "regression":
            loss = (predicted[:, 0] - columns["labels"]).square().mean()
        else:
            loss = functional.cross_entropy(predicted, columns["labels"], ignore_index=-1)
        terms["probe_loss"] = config.probe_loss_coeff * loss
    if config.temporal_smoothness_coeff > 0:
        goes_on = ~columns["starts"][1:]
        changes = (acts[1:] - acts[:-1]).square().sum(1)[goes_on]
        terms["temporal_loss"] = config.temporal_smoothness_coeff * changes.mean()
    split, how = config.group_split, config.correlation_pairs
    low, high = acts[:, :split], acts[:, split:]
    width = config.target_width if config.loss_fn == "mse" else 1
    if config.independence_coeff:
        loss = correlation_sum(low, low, how, same=True, width=width)
        terms["independence_loss"] = config.independence_coeff * loss
    if config.orthogonality_coeff:
        loss = correlation_sum(low, high, how, same=False, width=width)
        terms["orthogonality_loss"] = config.orthogonality_coeff * loss
    return terms


def try_together(arch, settings):
    """Try settings together; return the fault in a line, or None."""
    fields = over_base(arch, settings)
    error = refusal(arch, settings)
    if error is not None:
        words = [str(word) for pair in settings.items() for word in pair]
        return None if any(word in error for word in words) else f"names none: {error}"
    sae = make_model(fields, DEAD)
    if arch not in K_ARCHITECTURES:
        go(sae, "sparse")
    x, targets, columns = make_batch(sae, N_TOKENS), make_targets(sae), columns_of(sae)
    behind = (lambda x_hat: (x_hat - 1).square().mean()) if sae.config.is_end_to_end else None
    exact = copy.deepcopy(sae).double()
    loss = sae.training_loss(x, targets, dense_grad=False, downstream=behind, **columns)
    loss.total.backward()
    left = left_gradients(sae)
    if not all(value.isfinite().all() for value in [loss.total, *left.values()]):
        return f"not finite: {loss.components}"
    if sae.config.is_end_to_end:
        return None
    columns = {
        name: value.double() if value.is_floating_point() else value
        for name, value in columns.items()
    }
    terms = plain_terms(exact, x.double(), None if targets is None else targets.double(), columns)
    return None if terms is None else difference(loss, left, exact, terms)


def difference(loss, left, exact, terms):
    """Return the differences of a loss and its gradients from plain terms."""
    names, parameters = zip(*exact.named_parameters(), strict=True)
    gradients = torch.autograd.grad(
        sum(terms.values()), parameters, allow_unused=True, materialize_grads=True
    )
    given = {**{f"gradient of {name}": left[name] for name in names}, **loss.components}
    wanted = {f"gradient of {name}": value for name, value in zip(names, gradients, strict=True)}
    for name, value in {**wanted, **terms}.items():
        try:
            torch.testing.assert_close(given[name].double(), value.detach(), **TOLERANCE)
        except AssertionError as error:
            return f"{name}: {' '.join(str(error).split())[:200]}"
    return None


def wrong(tried):
    """Return the faults of some settings, in lines."""
    found = ((arch, settings, try_together(arch, settings)) for arch, settings in tried)
    return "\n".join(f"{arch} {settings}: {said}" for arch, settings, said in found if said)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_setting_is_refused_by_name_or_trained_as_in_plain_pytorch(arch):
    assert wrong((arch, settings) for settings in [{}, *VALUES]) == ""


@pytest.mark.slow
@pytest.mark.parametrize("part", slow_after(1, range(8)))
def test_each_two_settings_are_refused_by_name_or_trained_as_in_plain_pytorch(part):
    tried = list(pairs())[part::8]
    assert len(tried) > 100
    assert wrong(tried) == ""


def test_settings_of_other_architectures_are_refused():
    for settings, arches in zip(VALUES, TAKEN, strict=True):
        for arch in set(ARCHITECTURES) - set(arches):
            error = refusal(arch, settings)
            assert any(name in error for name in settings), (arch, settings, error)
    assert {arch for arches in TAKEN for arch in arches} == set(BASES)
