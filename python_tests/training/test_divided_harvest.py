"""The choice whether processes divide the forward passes of a model, or make all of them."""

from __future__ import annotations

import pytest
import torch
from small_models import make_network

from sae_fast.activations.capture import HookedModel, resolve_hooks
from sae_fast.distributed.ranks import Ranks
from sae_fast.training.from_model.divided_harvest import Division


def division(layers: list[int], width: int) -> Division:
    """Return a division of a small model's passes, with rows that are said to be so wide."""
    network = make_network("gpt2")
    model = HookedModel(network, resolve_hooks(network, layers, []))
    widths = {hook.name: width for hook in model.hooks}
    return Division(Ranks(0, 2), model, widths, [list(widths)[:1], list(widths)[1:]])


# A block of the model has 3,280 parameters; a row of 16 numbers has 64 bytes.
@pytest.mark.parametrize(
    ("layers", "width", "is_cheaper"),
    [([0, 2], 16, True), ([0, 1, 2], 16, True), ([0, 1, 2], 32, False), ([0], 64, False)],
)
def test_passes_are_divided_where_their_rows_are_few_bytes_for_the_operations(
    layers: list[int], width: int, is_cheaper: bool
) -> None:
    assert division(layers, width).is_cheaper == is_cheaper


def test_a_model_on_several_devices_is_run_by_every_process() -> None:
    found = division([0, 2], 16)
    network = found.model.network
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.detach().to("meta"))
    assert not found.is_cheaper
