"""Several processes choose the largest entries of a batch as one does, equal values included."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_fast import SAEConfig, ops
from sae_fast.autoencoder.architecture import Engine, Weights
from sae_fast.distributed.ranks import Ranks
from sae_fast.training.divided_selection import divided_selections
from sae_fast.training.latent_rows import LatentRows

SIZE, ROWS, LATENTS, WIDTH, K = 3, 7, 11, 4, 3


class InThreads(Ranks):
    """A process of several, each of which is a thread that gives its messages to the others."""

    def __init__(self, rank: int, table: list[Any], all_wrote: threading.Barrier) -> None:
        super().__init__(rank, len(table))
        self._table, self._all_wrote = table, all_wrote

    def gather(self, header: Any, tensors: Any = ()) -> list[tuple[Any, list[Tensor]]]:
        """Return what all have given."""
        self._table[self.rank] = (header, list(tensors))
        self._all_wrote.wait(30)
        found = list(self._table)
        self._all_wrote.wait(30)
        return found


def of_each(compute: Callable[[Ranks], Tensor]) -> list[Tensor]:
    """Return what each of the processes computes."""
    table: list[Any] = [None] * SIZE
    found: list[Any] = [None] * SIZE
    barrier = threading.Barrier(SIZE)

    def run(rank: int) -> None:
        found[rank] = compute(InThreads(rank, table, barrier))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def weights_of(rows: slice = slice(None)) -> Weights:
    """Return whole numbers as weights, with which many pre-activations are equal."""
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randint(-1, 2, (LATENTS, WIDTH), generator=generator).float()[rows]
    b_dec = torch.zeros(WIDTH)
    made = [torch.nn.Parameter(tensor) for tensor in (W_enc, torch.zeros(len(W_enc)), W_enc, b_dec)]
    return Weights(*made, {}, made[3])


@pytest.mark.parametrize("scale", [1.0, 0.0])  # 0: no latent is active
def test_batch_topk_of_several_processes_is_the_one_of_one(scale: float) -> None:
    x = torch.randint(-1, 2, (ROWS, WIDTH), generator=torch.Generator().manual_seed(1)).float()
    x = scale * x
    whole = Engine().encode_topk(weights_of(), x, K, selection="batch_topk")
    values = whole.values[whole.values > 0]
    assert scale == 0 or len(values.unique()) < len(values)

    def by_rows(ranks: Ranks) -> ops.SparseCode:
        engine = Engine(selections=divided_selections(ranks))
        return engine.encode_topk(weights_of(), x, K, selection="batch_topk")

    for code in of_each(by_rows):
        for name in ("values", "indices", "offsets"):
            assert torch.equal(getattr(code, name), getattr(whole, name)), name

    def by_latents(ranks: Ranks) -> Tensor:
        rows = LatentRows(ranks, SAEConfig(d_in=WIDTH, d_sae=LATENTS, k=K))
        own = weights_of(slice(rows.first, rows.end))
        with torch.no_grad():
            engine = rows.engine("screened", True)
            return engine.encode_topk(own, x, K, selection="batch_topk").dense()

    assert torch.equal(torch.cat(of_each(by_latents), dim=1), whole.dense())
