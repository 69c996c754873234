"""Forward passes that the processes of a machine divide: each runs some, and all get their rows.

Of R processes each runs the model on every R-th batch, up to the last hook point that any of them
trains on, and gives every other one the rows of its hook points. Rows and their order are the ones
of one process alone, to the bit, because the batches are the same. All processes must ask for the
batches in one order, since each waits for the others.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_fast.activations.capture import Harvest, Harvester, HookedModel, TokenBatch, TokenCursor
from sae_fast.activations.capture.hooks import HookPoint
from sae_fast.activations.capture.images import ImageBatches
from sae_fast.activations.capture.loading import device_of
from sae_fast.activations.capture.sequences import TokenBatches
from sae_fast.distributed.ranks import Ranks
from sae_fast.distributed.wire import DTYPES, pack, packed_bytes, unpack

# Operations of the model for each byte that a process receives, below which exchanging its rows
# takes longer than computing them. A core of a Xeon made 99 GFLOP/s, and a process received 0.92
# GB/s from another by gloo. Of GPUs the numbers are arithmetic: 400 TFLOP/s, with 200 GB/s by NCCL
# or 1 GB/s through the host.
_ON_CPU, _BY_NCCL, _THROUGH_HOST = 110, 2_000, 400_000


class Division(NamedTuple):
    """A division of forward passes among processes.

    Attributes:
        ranks: the processes, on one machine.
        model: with the hook points of all of them.
        widths: of the rows of each hook point.
        hooks: names of the hook points of each process.
    """

    ranks: Ranks
    model: HookedModel
    widths: Mapping[str, int]
    hooks: Sequence[Sequence[str]]

    @property
    def is_cheaper(self) -> bool:
        """Whether exchanging the rows takes less time than computing them in every process.

        With R processes each saves 1 - 1/R of the passes, and receives as large a share of its
        rows, so R is of no importance.
        """
        parameters = list(self.model.network.parameters())
        if len({parameter.device for parameter in parameters}) > 1:
            return False  # rows of several devices are not exchanged
        itemsize = parameters[0].dtype.itemsize
        widest = max(sum(self.widths[name] for name in names) for names in self.hooks)
        flops = 2 * _parameters_up_to(self.model.network, self.model.hooks)
        limit = _ON_CPU
        if parameters[0].device.type != "cpu":
            limit = _THROUGH_HOST if self.ranks.crosses_host else _BY_NCCL
        return flops / (widest * itemsize) > limit


class DividedHarvester(Harvester):
    """The activations of all batches at the hook points of this process.

    Args:
        division: says who runs the model, and who gets which rows.
        batches: what the model reads, equal in all processes.
        max_tokens: rows of each hook point after which it ends; default: all.
    """

    def __init__(
        self,
        division: Division,
        batches: TokenBatches | ImageBatches,
        *,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(division.model, batches, max_tokens=max_tokens)
        self._division = division

    def harvest(self, cursor: TokenCursor | None = None) -> Generator[Harvest, None, None]:
        """Run the model from a cursor on, which all processes give.

        Raises ValueError for a token that the model does not know, and where another process is at
        another batch.
        """
        size = self._division.ranks.size
        with closing(self.kept_batches(cursor)) as batches:
            some = ((batch, kept) for batch, kept in batches if bool(kept.any()))
            while turn := list(islice(some, size)):
                yield from self._harvests(turn)

    def _harvests(
        self,
        turn: list[tuple[TokenBatch, Tensor]],  # the masks [B, T] bool
    ) -> Generator[Harvest, None, None]:
        """Run the batch of this process among one for each; yield all with its hook points."""
        ranks, _, widths, hooks = self._division
        rank = ranks.rank
        own = self.run(*turn[rank]) if rank < len(turn) else {}
        kinds = self._types(turn[0][0].cursor, own)
        counts = [int(kept.sum()) for _, kept in turn]
        specs = [[(kinds[name], [count, widths[name]]) for name in hooks[rank]] for count in counts]
        nothing = torch.empty(0, dtype=torch.uint8, device=device_of(self.model.network))
        parts = [
            nothing if number == rank or not own else pack([own[name] for name in names])
            for number, names in enumerate(hooks)
        ]
        sizes = [
            0 if number == rank or number >= len(turn) else packed_bytes(specs[number])
            for number in range(ranks.size)
        ]
        found = ranks.swap(parts, sizes)
        for number, (batch, kept) in enumerate(turn):
            if number == rank:
                rows = [own[name] for name in hooks[rank]]
            else:
                rows = unpack(found[number], specs[number])
            yield Harvest.of(batch, kept, dict(zip(hooks[rank], rows, strict=True)))

    def _types(self, place: TokenCursor, own: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the type of each hook point's rows, and agree with the others on the batch."""
        kinds = {name: DTYPES.index(rows.dtype) for name, rows in own.items()}
        found: list[Any] = self._division.ranks.values([asdict(place), kinds])
        for number, (other, _) in enumerate(found):
            if other != found[0][0]:
                raise ValueError(
                    f"process {number} of this machine is at another batch of the text"
                )
        first: dict[str, int] = found[0][1]  # it has run a batch in any case
        return first


def _parameters_up_to(network: nn.Module, hooks: Sequence[HookPoint]) -> int:
    """Return how many numbers a pass multiplies a token by, up to the last of the hook points."""
    tables = {id(part.weight) for part in network.modules() if isinstance(part, nn.Embedding)}
    total = reached = 0
    for name, parameter in network.named_parameters():
        total += 0 if id(parameter) in tables else parameter.numel()
        if any(name.startswith(f"{hook.module}.") for hook in hooks):
            reached = total
    return reached
