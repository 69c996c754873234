"""The logits that latents raise and lower, against plain formulas in float64."""

import numpy as np
import pytest
import torch
from small_models import CAUSAL, make_network

from sae_fast.evaluation.logits import final_norm, logit_effects

WIDTH, LATENTS, COUNT = 16, 12, 4


def directions():
    return torch.randn(LATENTS, WIDTH, generator=torch.Generator().manual_seed(2))


def plain_logits(name, network, rows):
    """Return W_U (g ⊙ d') with the norm's weight read from its known place, by its definition."""
    unembedding = network.get_output_embeddings().weight.double()
    rows = rows.double()
    if name == "gpt2":
        norm = network.transformer.ln_f
    elif name == "gpt_neox":
        norm = network.gpt_neox.final_layer_norm
    elif name == "opt":
        norm = network.model.decoder.final_layer_norm
    else:
        norm = network.model.norm
    if name in ("gpt2", "gpt_neox", "opt"):
        rows = rows - rows.mean(1, keepdim=True)
    gain = norm.weight.double() + (1 if name.startswith("gemma") else 0)
    return (rows * gain) @ unembedding.T


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "llama", "gemma2", "qwen3"])
def test_effects_are_those_through_the_final_norm(name):
    assert name in CAUSAL
    network = make_network(name)
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("norm.weight") and "layers" not in parameter_name:
            torch.nn.init.normal_(parameter, 0.5, 0.2, generator=torch.Generator().manual_seed(1))
    effects = logit_effects(directions(), network, COUNT, causal=True)
    logits = plain_logits(name, network, directions()).detach()
    order = logits.sort(dim=1, descending=True, stable=True)
    assert effects.promoted.tolist() == order.indices[:, :COUNT].tolist()
    np.testing.assert_allclose(effects.promoted_logits, order.values[:, :COUNT], 1e-4, 1e-5)
    lowest = logits.sort(dim=1, stable=True)
    assert effects.suppressed.tolist() == lowest.indices[:, :COUNT].tolist()
    np.testing.assert_allclose(effects.suppressed_logits, lowest.values[:, :COUNT], 1e-4, 1e-5)
    np.testing.assert_allclose(effects.smallest_logit, lowest.values[:, 0], 1e-4, 1e-5)
    np.testing.assert_allclose(effects.largest_logit, order.values[:, 0], 1e-4, 1e-5)
    for row, counts in zip(logits.numpy(), effects.logit_histogram, strict=True):
        expected, edges = np.histogram(row, 40)
        assert counts.sum() == len(row)
        # A logit that is an edge in float64 may lie on either side of it in float32.
        assert np.abs(counts - expected).sum() <= 2 * len(edges)


def test_a_masked_model_has_its_embedding_applied_to_the_direction():
    network = make_network("bert")
    effects = logit_effects(directions(), network, COUNT, causal=False)
    logits = directions().double() @ network.get_output_embeddings().weight.double().T
    assert effects.promoted.tolist() == logits.topk(COUNT).indices.tolist()


def test_a_model_without_a_head_or_of_another_width_is_refused():
    network = make_network("gpt2")
    with pytest.raises(ValueError, match="reads vectors of 16 numbers, decoder rows have 8"):
        logit_effects(torch.zeros(2, 8), network, COUNT, causal=True)
    with pytest.raises(ValueError, match="GPT2Model has no language-model head"):
        logit_effects(directions(), network.transformer, COUNT, causal=True)


def test_norms_inside_layers_are_not_the_final_one():
    network = make_network("gpt2")
    assert final_norm(network, WIDTH) is network.transformer.ln_f
    assert final_norm(network.transformer.h[0], 99) is None
