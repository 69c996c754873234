"""A step over several batches equals the step of one batch with all their rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sae_fast.autoencoder.losses import moments, pooled_variance, total_variance
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.memory_plan import plan_memory
from sae_fast.training.trainer import Trainer

RUN = TrainConfig(batch_size=64, max_steps=16, learning_rate=1e-2, log_every=1, eval_every=0)
SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "topk with fvu": {"k": 3, "loss_fn": "fvu"},
    "dead latents": {"k": 3, "dead_after_tokens": 128},
    "dead latents with multi_topk": {"k": 3, "dead_after_tokens": 128, "multi_topk": True},
    "batch_topk": {"arch": "batch_topk", "k": 3},
    "batch_topk with AuxK": {"arch": "batch_topk", "k": 3, "dead_after_tokens": 128},
    "matryoshka": {"arch": "matryoshka", "k": 3, "matryoshka_prefixes": (16, 64)},
    "relu": {"arch": "relu", "target_l0": 4.0},
    "gated": {"arch": "gated", "target_l0": 4.0},
    "jumprelu": {"arch": "jumprelu", "target_l0": 4.0},
    "jumprelu with pre-acts": {
        **{"arch": "jumprelu", "sparsity_penalty": "l0", "pre_act_loss_coeff": 1e-2},
        **{"dead_after_tokens": 128, "loss_fn": "fvu"},
    },
    "chunked_max": {
        **{"k": 3, "decorrelation": "chunked_max", "decorrelation_coeff": 1.0},
        **{"decorrelation_chunk": 8, "dead_after_tokens": 128},
    },
}
FIGURES = ("loss", "fvu", "l0", "silent_fraction", "sparsity_coeff", "aux_loss")


def _trained(data: torch.Tensor, settings: dict[str, Any], run: TrainConfig) -> Trainer:
    trainer = Trainer(SAEConfig(d_sae=64, **settings), run, data, show_progress=False)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", SETTINGS)
def test_parts_give_the_step_of_the_whole_batch(activations: torch.Tensor, name: str) -> None:
    whole = _trained(activations, SETTINGS[name], RUN)
    run = replace(RUN, batch_size=16, grad_acc_steps=4)
    parts = _trained(activations, SETTINGS[name], run)
    for one, other in zip(whole.history, parts.history, strict=True):
        figures = {figure: one[figure] for figure in FIGURES if one.get(figure) is not None}
        assert {figure: other[figure] for figure in figures} == pytest.approx(figures, rel=1e-3)
    if parts.sae.architecture.has_aux_k:
        assert any(row["aux_loss"] > 0 for row in whole.history)
    state = parts.sae.state_dict()
    for tensor_name, tensor in whole.sae.state_dict().items():
        torch.testing.assert_close(state[tensor_name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", ["batch_topk", "matryoshka"])
def test_a_selection_of_the_whole_step_is_that_of_its_batch_to_the_bit(
    activations: torch.Tensor, arch: Any
) -> None:
    whole = _trained(activations, {"arch": arch, "k": 3}, RUN)
    parts = _trained(
        activations, {"arch": arch, "k": 3}, replace(RUN, batch_size=16, grad_acc_steps=4)
    )
    state = parts.sae.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.sae.state_dict().items())


def test_parts_with_labels_are_joined_with_them(activations: torch.Tensor) -> None:
    columns = {"labels": torch.arange(3000) % 3}
    settings = {"arch": "batch_topk", "k": 3, "probe_loss_coeff": 1.0, "probe_labels": "labels"}
    ends = []
    for run in (RUN, replace(RUN, batch_size=16, grad_acc_steps=4)):
        sae = SAEConfig(d_sae=64, **settings)
        trainer = Trainer(sae, run, activations, columns=columns, show_progress=False)
        trainer.train()
        ends.append(trainer.history[-1]["probe_loss"])
    assert ends[0] == ends[1] > 0


def test_a_pooled_variance_is_that_of_the_joined_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(9, 7, generator=generator).double() + n for n in (5, 9, 1)]
    means, variances = zip(*map(moments, parts), strict=True)
    pooled = pooled_variance(means, variances, n_rows=9)
    torch.testing.assert_close(pooled, total_variance(torch.cat(parts)))


@pytest.mark.parametrize(("arch", "is_joined"), [("topk", False), ("batch_topk", True)])
def test_the_plan_knows_which_parts_are_joined(arch: Any, is_joined: bool) -> None:
    sae = SAEConfig(arch=arch, d_in=64, d_sae=512, k=8)
    sizes = [
        sum(plan_memory(sae, run, native=True, pool_bytes=0).parts.values())
        for run in (replace(RUN, batch_size=4096), replace(RUN, batch_size=1024, grad_acc_steps=4))
    ]
    assert (sizes[0] == sizes[1]) is is_joined
