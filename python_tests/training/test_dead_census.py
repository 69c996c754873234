"""AuxK gets enough entries until the next census, and no more than the next power of two."""

import pytest
import torch
from plain_sae import make_sae

from sae_fast.training.launcher import DeadCensus


@pytest.mark.parametrize(
    ("dead", "k_aux"),
    [
        ((), 0),
        ((1,), 1),
        (range(2), 2),
        (range(3), 4),
        (range(4), 4),
        (range(5), 6),
        (range(40), 6),
    ],
)
def test_room_is_the_count_rounded_up_but_not_beyond_aux_k(dead: range, k_aux: int) -> None:
    census = DeadCensus(make_sae(dead=dead), tokens_per_step=10)  # d_in // 2 = 6
    census.take(float(census.count(steps=1)))
    assert census.k_aux == k_aux


def test_latents_that_can_die_before_the_next_reading_are_counted() -> None:
    sae = make_sae()  # dead after 100 tokens
    sae.tokens_since_fired[:3] = torch.tensor([50, 79, 80])
    census = DeadCensus(sae, tokens_per_step=10)
    assert [int(census.count(steps)) for steps in (1, 2, 3, 5, 10)] == [0, 1, 2, 3, 40]


def test_there_is_always_room_for_the_dead() -> None:
    chance = torch.Generator().manual_seed(0)
    sae = make_sae(aux_k=12)
    census = DeadCensus(sae, tokens_per_step=30)
    for step in range(200):
        if step % 4 == 0:
            census.take(float(census.count(steps=4)))
        dead = int(sae.dead_mask().sum())
        assert census.k_aux >= min(dead, 12)
        fired = torch.rand(40, generator=chance) < 0.2
        sae.tokens_since_fired.add_(30).masked_fill_(fired, 0)


def test_without_aux_k_nobody_needs_room() -> None:
    census = DeadCensus(make_sae(dead=range(9), aux_k_coeff=0.0), tokens_per_step=10)
    census.take(float(census.count(steps=1)))
    assert census.k_aux == 0
