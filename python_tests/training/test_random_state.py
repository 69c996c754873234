"""Random states survive a checkpoint exactly."""

import json
import random

import numpy as np
import torch

from sae_fast.training.random_state import (
    random_tensors,
    random_values,
    restore_random,
    seed_everything,
)


def _draw() -> tuple[float, float, float]:
    return random.gauss(0, 1), float(np.random.normal()), float(torch.randn(()))  # noqa: NPY002


def test_draws_go_on_where_the_state_was_taken() -> None:
    seed_everything(3)
    _draw()  # leaves half a pair of normal deviates in both generators
    tensors, values = random_tensors(), json.loads(json.dumps(random_values()))
    expected = [_draw() for _ in range(3)]
    seed_everything(4)
    restore_random(tensors, values)
    assert [_draw() for _ in range(3)] == expected


def test_the_same_seed_gives_the_same_draws() -> None:
    seed_everything(5)
    first = _draw()
    seed_everything(5)
    assert _draw() == first
