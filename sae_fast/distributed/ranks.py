"""`Ranks`: the processes that train one model together, and what they tell each other.

torchrun starts them, torch.distributed connects them; with one process everything here does
nothing. Messages between hosts are gathered over gloo, tensors of GPUs over NCCL where every
process has a GPU of its own. Everything is gathered in the order of the ranks, so that each process
computes from equal numbers in an equal order, and their copies of the model stay equal to the bit.

A process that ends is noticed by the others when they next wait for it. Each notes in the store of
the launcher how it ended, so that the others can say which one it was, and why.
"""

from __future__ import annotations

import atexit
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

import sae_fast
from sae_fast.config import TrainConfig
from sae_fast.config.mesh import parsed_mesh
from sae_fast.distributed.environment import launched
from sae_fast.distributed.meeting import common_name
from sae_fast.distributed.wire import DTYPES, HEADER_BYTES, pack, pack_header, unpack, unpack_header
from sae_fast.json_files import shown

_GRACE = 5.0  # seconds, for another process to note how it ended
_PAUSE = 0.05  # seconds between two looks
_ADDED_WHOLE = 1 << 12  # numbers, up to which a sum is not divided
_SLICE = 1 << 24  # bytes of a matrix that are gathered at a time
_MACHINE = "machine"  # name of the mesh of processes on one machine


class RankError(ValueError):
    """Another process of the training has failed, ended, or differs from this one.

    Attributes:
        is_told: whether another process says so already.
        agreed_by: the processes that all raise it; None: some may not know of it yet.
    """

    is_told = False
    agreed_by: Ranks | None = None


class Wishes(NamedTuple):
    """Requests to a training between two steps, which may reach one process alone.

    Attributes:
        signal: number of the signal that stops the training; 0: none.
        save: whether a checkpoint is due.
        is_over: whether the time of the training is over.
    """

    signal: int = 0
    save: bool = False
    is_over: bool = False


class _Traffic:
    """The exchange of a process in its steps since it was last asked for.

    Attributes:
        is_counted: whether a step is being made; what evaluations and checkpoints exchange is not
            counted.
        bytes_sent: what it has given to be gathered, with padding.
        seconds: the time that it has spent on that, waiting for the others included.
    """

    def __init__(self) -> None:
        self.is_counted = False
        self.bytes_sent, self.seconds = 0, 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time that is spent in this context."""
        begin = time.perf_counter()
        yield
        if self.is_counted:
            self.seconds += time.perf_counter() - begin

    def add(self, tensor: Tensor) -> None:
        """Add the bytes of a tensor that is sent."""
        if self.is_counted:
            self.bytes_sent += tensor.numel() * tensor.element_size()


class PendingGather(NamedTuple):
    """A tensor of every process, on its way.

    Attributes:
        parts: in the order of the ranks. They hold their numbers after `wait`.
        wait: waits for them; to be called once.
    """

    parts: list[Tensor]
    wait: Callable[[], None]


class _Part(NamedTuple):
    """Some of the processes of a training.

    Attributes:
        of: all of them.
        numbers: of the members, in their order.
        mesh: name of the mesh that divides them.
        axis: of the mesh, along which these processes are.
    """

    of: Ranks
    numbers: list[int]
    mesh: str
    axis: str


class Axes(NamedTuple):
    """The processes with which one divides a training, `ALONE` for what is not divided.

    Attributes:
        data: they have the same latents and make other batches.
        latents: they make the same batches and have other latents.
    """

    data: Ranks
    latents: Ranks


class Ranks:
    """The processes of a training, this one among them, or the ones that divide one thing.

    Args:
        rank: of this process.
        size: the number of processes.
        store: of the launcher, in which a process notes how it ended; None: one process alone.
        local_rank: of this process among those on its machine.
        local_size: the number of processes on this machine.
        part: of which processes these are some; None: they are all.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        store: Store | None = None,
        local_rank: int = 0,
        local_size: int = 1,
        part: _Part | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._local_rank, self._local_size = local_rank, local_size
        self._part = part
        self._meshes: dict[str, DeviceMesh] = {}
        self._traffic: _Traffic = _Traffic() if part is None else part.of._traffic
        self._has_nccl: bool = part is not None and part.of._has_nccl
        self._timeout: timedelta | None = None
        # The gathers that `begin_gather` has begun, kept here alone: each refers to a group.
        self._begun: dict[object, Any] = {}
        self._end: RankError | None = None  # with which this process has lost the others
        self._agreed: Exception | None = None  # the last error with which all have left a context
        self._has_failed = False  # whether an error has ended a training that none has agreed on
        self._failures = 0  # so many trainings before have ended so in all processes

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes: files, metrics, progress."""
        return self.rank == 0

    def device_of(self, name: str) -> str:
        """Return the device of this process where `name` is what all were given: its own GPU."""
        if self.size == 1 or name != "cuda" or torch.cuda.device_count() == 0:
            return name
        return f"cuda:{self._local_rank % torch.cuda.device_count()}"

    def take_traffic(self, steps: int, seconds: float) -> dict[str, float]:
        """Return what was exchanged in `counted` since the last call; nothing for one process.

        exchanged_bytes is what this process has given in a step, and communication_fraction the
        share of the time that gathering took, waiting for the others included.

        Args:
            steps: made since then.
            seconds: that they took.
        """
        if self.size == 1:
            return {}
        sent, spent = self._traffic.bytes_sent, self._traffic.seconds
        self.drop_traffic()
        return {"exchanged_bytes": sent / steps, "communication_fraction": spent / seconds}

    def drop_traffic(self) -> None:
        """Forget what was exchanged since `take_traffic`, as after the last step of a training."""
        self._traffic.bytes_sent, self._traffic.seconds = 0, 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is exchanged in this context, which is a part of a step."""
        self._traffic.is_counted = True
        try:
            yield
        finally:
            self._traffic.is_counted = False

    def axes(self, mesh: str | None) -> Axes:
        """Return the processes with which this one divides batches and latents.

        Of `data=A,latents=B` B neighbours hold the latents of one model together, and A of these
        rows of neighbours make batches of their own. All processes call this.
        """
        sizes = parsed_mesh(mesh)
        n_data, n_latents = sizes.get("data", 1), sizes.get("latents", 1)
        if n_data == 1 or n_latents == 1:
            return Axes(self if n_data > 1 else ALONE, self if n_latents > 1 else ALONE)
        both = f"data={n_data},latents={n_latents}"
        if both not in self._meshes:
            self._meshes[both] = _mesh_of(n_data, n_latents, self._timeout)
        known = self._meshes[both]
        members = {
            "data": known.mesh[:, known.get_local_rank("latents")].tolist(),
            "latents": known.mesh[known.get_local_rank("data")].tolist(),
        }
        parts = (
            Ranks(
                *(known.get_local_rank(axis), len(numbers), self._store),
                part=_Part(self, numbers, both, axis),
            )
            for axis, numbers in members.items()
        )
        return Axes(*parts)

    def on_machine(self) -> Ranks:
        """Return the processes on the machine of this one; all processes call this.

        They are the ones that one launcher has started; `ALONE` where it has started no other.
        """
        if self.size == 1:
            return self
        firsts = self.values(self.rank - self._local_rank)
        members = {
            first: [number for number, other in enumerate(firsts) if other == first]
            for first in firsts
        }
        numbers = members[firsts[self.rank]]
        if len(numbers) == self.size:
            return self
        if _MACHINE not in self._meshes:
            group, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
                list(members.values()), timeout=self._timeout
            )
            known = DeviceMesh.from_group(group, "cpu", mesh_dim_names=(_MACHINE,))
            self._meshes[_MACHINE] = known
        if len(numbers) == 1:
            return ALONE
        part = _Part(self, numbers, _MACHINE, _MACHINE)
        return Ranks(numbers.index(self.rank), len(numbers), self._store, part=part)

    @property
    def numbers(self) -> list[int]:
        """The numbers of these processes among all."""
        return list(range(self.size)) if self._part is None else self._part.numbers

    @property
    def crosses_host(self) -> bool:
        """Whether tensors of GPUs are exchanged through the host, which lacks NCCL's links."""
        return not self._has_nccl

    @property
    def _whole(self) -> Ranks:
        """All processes of the training."""
        return self if self._part is None else self._part.of

    def _name(self, number: int) -> str:
        """Return the name of one of these processes, by its number among all."""
        return f"rank {number if self._part is None else self._part.numbers[number]}"

    @property
    def _group(self) -> dist.ProcessGroup | None:
        """The group of these processes; None: all.

        It is kept by torch alone, because its connections are closed with the last reference.
        """
        if self._part is None:
            return None
        return self._part.of._meshes[self._part.mesh].get_group(self._part.axis)

    # ---- gathering ---------------------------------------------------------------------------

    def gather(self, header: Any, tensors: Sequence[Tensor] = ()) -> list[tuple[Any, list[Tensor]]]:
        """Return of every process, in the order of the ranks, a JSON value and its tensors.

        Args:
            header: of this process, of any length.
            tensors: of this process, on one device.

        Raises RankError where a process has ended or does not answer.
        """
        if self.size == 1:
            return [(header, list(tensors))]
        with self._traffic.timed():
            return self._gather(header, tensors)

    def _gather(self, header: Any, tensors: Sequence[Tensor]) -> list[tuple[Any, list[Tensor]]]:
        payload = pack(tensors)
        specs = [(DTYPES.index(t.dtype), list(t.shape)) for t in tensors]
        headers = self._gather_headers([header, specs, payload.numel()])
        most = max(size for _, _, size in headers)
        found = [(header, list(tensors))] * self.size
        if most:
            padded = torch.nn.functional.pad(payload, (0, most - payload.numel()))
            parts = self._gather_bytes(padded)
            for number, (other, other_specs, _) in enumerate(headers):
                if number != self.rank:
                    found[number] = other, unpack(parts[number], other_specs)
        else:
            found = [(other, []) for other, _, _ in headers]
        return found

    def begin_gather(self, own: Tensor) -> PendingGather:
        """Start to gather a tensor of every process.

        The processes may compute and gather other things meanwhile.

        Args:
            own: of this process, in the shape and type that all have. It must stay as it is.
        """
        with self._traffic.timed():
            wire = own.contiguous().view(-1).view(torch.uint8)
            wire = wire if self._has_nccl else wire.cpu()
            found = [torch.empty_like(wire) for _ in range(self.size)]
            self._traffic.add(wire)
            begun, key = self._whole._begun, object()
            begun[key] = self._exchange(partial(dist.all_gather, async_op=True), found, wire)
        received = [part.view(own.dtype).view(own.shape) for part in found]
        parts = received
        if wire.device != own.device:
            parts = [torch.empty_like(own) for _ in received]
        parts = [own if number == self.rank else part for number, part in enumerate(parts)]

        def wait() -> None:
            with self._traffic.timed():
                self._attempt(lambda: begun[key].wait())
                del begun[key]
                if wire.device != own.device:
                    for number, (part, there) in enumerate(zip(parts, received, strict=True)):
                        if number != self.rank:
                            part.copy_(there)

        return PendingGather(parts, wait)

    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Give every process bytes of its own; return the bytes that each has for this one.

        Args:
            parts: for each process in the order of the ranks, [bytes] uint8, on one device.
            sizes: the number of bytes that each process has for this one.
        """
        if self.size == 1:
            return list(parts)
        with self._traffic.timed():
            own = torch.cat(list(parts))
            wire = own if self._has_nccl else own.cpu()
            found = torch.empty(sum(sizes), dtype=torch.uint8, device=wire.device)
            self._traffic.add(wire)
            call = partial(
                dist.all_to_all_single,
                output_split_sizes=list(sizes),
                input_split_sizes=[len(part) for part in parts],
            )
            self._exchange(call, found, wire)
            return list(torch.split(found.to(own.device), list(sizes)))

    def values(self, value: Any) -> list[Any]:
        """Return a JSON value of every process, in the order of the ranks."""
        return [header for header, _ in self.gather(value)]

    def parts(self, own: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Return tensors of the parts of a step, in the order of a process that makes all of them.

        Args:
            own: of each part that this process makes; part g of rank r is number g · size + r.
        """
        if self.size == 1:
            return [list(part) for part in own]
        width = len(own[0])
        flat = [tensor for part in own for tensor in part]
        found = [tensors for _, tensors in self.gather(None, flat)]
        return [tensors[g * width : (g + 1) * width] for g in range(len(own)) for tensors in found]

    def sum_in_order(self, own: Tensor) -> Tensor:
        """Return the sum of a tensor of every process, added up in the order of the ranks.

        Of a large one each process adds up a part and gives it to the others, so that it receives
        twice the bytes of one tensor, however many processes there are.

        Args:
            own: of this process, in the shape that all have.
        """
        if self.size == 1:
            return own.clone()
        if own.numel() < _ADDED_WHOLE:
            return _sum_of([parts[0] for _, parts in self.gather(None, [own])])
        with self._traffic.timed():
            return self._sum_in_parts(own)

    def _sum_in_parts(self, own: Tensor) -> Tensor:
        length = -(-own.numel() // self.size)
        flat = own.contiguous().view(-1)
        flat = torch.nn.functional.pad(flat, (0, length * self.size - own.numel()))
        wire = flat if self._has_nccl else flat.cpu()
        found = torch.empty_like(wire)
        self._traffic.add(wire)
        self._exchange(dist.all_to_all_single, found, wire)
        part = _sum_of(found.view(self.size, length).unbind())
        parts = self._gather_bytes(part.to(own.device).view(torch.uint8))
        return torch.cat(parts).view(own.dtype)[: own.numel()].view(own.shape)

    def add_in_order(
        self,
        total: Tensor | None,  # any shape
        own: Tensor | None,  # in the shape of total
        like: Tensor,
        has: Sequence[bool],
    ) -> Tensor | None:
        """Return `total` plus the tensors of all processes, added up in the order of the ranks.

        Slices are gathered one after the other, so that memory is needed for one tensor only.

        Args:
            total: the sum so far, changed; None: there is none yet.
            own: of this process; None: it has none.
            like: a tensor of this shape, type and device.
            has: which processes have one.
        """
        if not any(has):
            return total
        with self._traffic.timed():
            return self._add_slices(total, own, like, has)

    def _add_slices(
        self, total: Tensor | None, own: Tensor | None, like: Tensor, has: Sequence[bool]
    ) -> Tensor:
        is_new = total is None
        summed = torch.empty_like(like) if total is None else total
        mine = torch.zeros_like(like) if own is None else own.contiguous()
        step = _SLICE // like.element_size()
        for start in range(0, like.numel(), step):
            target = summed.view(-1)[start : start + step]
            part = mine.view(-1)[start : start + step]
            begun = not is_new
            for number, other in enumerate(self._gather_bytes(part.view(torch.uint8))):
                if has[number]:
                    values = other.view(part.dtype)
                    target.add_(values) if begun else target.copy_(values)
                    begun = True
        return summed

    def _gather_headers(self, header: Any) -> list[Any]:
        packed = pack_header(header)
        parts = self._gather_bytes(packed[:HEADER_BYTES], on_host=True)
        lengths = [unpack_header(part) for part in parts]
        if all(isinstance(length, list) for length in lengths):
            return lengths
        longest = max(length for length in lengths if isinstance(length, int))
        padded = torch.nn.functional.pad(packed, (0, max(0, longest - len(packed))))
        return [unpack_header(part) for part in self._gather_bytes(padded, on_host=True)]

    def _gather_bytes(self, own: Tensor, *, on_host: bool = False) -> list[Tensor]:
        """Return the bytes of every process, equally many, on the device of the own ones."""
        device = own.device
        wire = own if self._has_nccl and not on_host else own.cpu()
        found = [torch.empty_like(wire) for _ in range(self.size)]
        self._traffic.add(wire)
        self._exchange(dist.all_gather, found, wire)
        return [part.to(device) for part in found]

    def _exchange(self, call: Callable[..., Any], found: object, wire: Tensor) -> Any:
        """Return what a call of torch.distributed does, which fills `found`."""
        return self._attempt(lambda: call(found, wire, group=self._group))

    def _attempt(self, call: Callable[[], Any]) -> Any:
        """Return what a call does that needs the others; raise RankError where one is lost."""
        if (end := self._whole._end) is not None:
            raise end
        try:
            return call()
        except RuntimeError as error:
            raise self._lost(error) from error

    # ---- agreement ---------------------------------------------------------------------------

    @contextmanager
    def agreement(self, facts: Callable[[], Mapping[str, Any]] = dict) -> Iterator[None]:
        """Let all processes leave this context together, or all with an error.

        Args:
            facts: returns, at the end, JSON values by name that must be equal in all processes
                that have the name.

        Raises RankError, which names it, where another process has failed or has other facts.
        """
        if self.size == 1:
            yield
            return
        failure: Exception | None = None
        own: dict[str, Any] = {}
        try:
            yield
            own = dict(facts())
        except RankError as error:
            if error.agreed_by in (None, self):
                raise
            failure = error
        except Exception as error:
            if error is self._agreed:  # of an agreement within this one
                raise
            failure = error
        is_named = isinstance(failure, RankError)
        found = self.values({"failed": _text(failure), "is_named": is_named, "facts": own})
        for number, other in enumerate(found):
            if other["failed"] is not None:
                if failure is not None and other["failed"] == _text(failure) and not is_named:
                    self._agreed = failure
                    raise failure
                name = "" if other["is_named"] else f"{self._name(number)}: "
                raise self._told(f"{name}{other['failed']}")
        first: dict[str, int] = {}  # which process has a fact first
        for number, other in enumerate(found):
            for name, value in other["facts"].items():
                known = found[first.setdefault(name, number)]["facts"][name]
                if known != value:
                    pair = f"{self._name(number)} differs from {self._name(first[name])}"
                    raise self._told(f"{pair} in {name}{_difference(known, value)}")

    def agreed(self, wishes: Wishes) -> Wishes:
        """Return what any process is asked to do; of several signals the first rank's."""
        if self.size == 1:
            return wishes
        found = [Wishes(*each) for each in self.values(list(wishes))]
        signals = [each.signal for each in found if each.signal]
        return Wishes(
            signals[0] if signals else 0,
            any(each.save for each in found),
            any(each.is_over for each in found),
        )

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        return flag if self.size == 1 else any(self.values(flag))

    # ---- ends --------------------------------------------------------------------------------

    def note_failure(self, error: BaseException) -> None:
        """Tell the other processes why a training ends in this one."""
        if self._store is not None and not isinstance(error, RankError):
            with suppress(RuntimeError):
                self._store.set(f"end/{self.rank}", _text(error) or type(error).__name__)
                if not self._knows_all_fail(error):
                    self._has_failed = True
                    self._store.set(f"failed/{self._failures}/{self.rank}", "")

    def _knows_all_fail(self, error: BaseException) -> bool:
        """Return whether an error follows from one that the processes have told each other."""
        cause: BaseException | None = error
        while cause is not None:
            if cause is self._agreed or isinstance(cause, RankError):
                return True
            cause = cause.__cause__ or cause.__context__
        return False

    def begin_training(self) -> None:
        """Take back what this process has told of a training before, which failed.

        Raises RankError where others are still in that training and wait there for this process:
        what they exchange would be taken for messages of the next one.
        """
        if self._has_failed and self._end is None:
            self._await_failures()
        if self._store is not None:
            self._store.delete_key(f"end/{self.rank}")

    def _await_failures(self) -> None:
        """Wait until the training has failed in all processes; else close the connections."""
        assert self._store is not None
        deadline = time.monotonic() + _GRACE
        missing = [number for number in range(self.size) if number != self.rank]
        while missing and time.monotonic() < deadline:
            time.sleep(_PAUSE)
            with suppress(RuntimeError):
                keys = {number: f"failed/{self._failures}/{number}" for number in missing}
                missing = [number for number in missing if not self._store.check([keys[number]])]
        if missing:
            names = " and ".join(map(self._name, missing))
            self._end = RankError(
                f"the training before has failed here and not in {names}: start all processes again"
            )
            self._close()
            raise self._end
        self._failures, self._has_failed = self._failures + 1, False

    def _lost(self, error: RuntimeError) -> RankError:
        """Return the error of a process that cannot be waited for any longer."""
        if self._part is not None:
            return self._part.of._lost(error)
        assert self._store is not None
        said: dict[int, str] = {}
        with suppress(RuntimeError):
            self._store.set(f"end/{self.rank}", "")
        self._leave(error)
        deadline = time.monotonic() + _GRACE
        for number in range(self.size):
            with suppress(RuntimeError):
                while not (known := self._store.check([f"end/{number}"])):
                    if time.monotonic() > deadline:
                        break
                    time.sleep(_PAUSE)
                if known:
                    said[number] = self._store.get(f"end/{number}").decode()
        reasons = {number: text for number, text in said.items() if text}
        gone = [number for number in range(self.size) if number not in {*said, self.rank}]
        if reasons:
            number, text = min(reasons.items())
            found = RankError(f"rank {number}: {text}")
        elif gone:
            names = " and ".join(f"rank {number}" for number in gone)
            verb = "has" if len(gone) == 1 else "have"
            found = RankError(f"{names} {verb} ended, or did not answer in time")
        else:
            found = RankError(f"the ranks lost each other ({str(error).splitlines()[0][:200]})")
        # The first process that can say it does; one that fails for its own reason says so itself.
        able = [number for number in said if number not in reasons or number == 0]
        found.is_told = self.rank != min(able, default=self.rank)
        self._end = found
        return found

    def _told(self, text: str) -> RankError:
        """Return an error that all processes raise and rank 0 shows."""
        error = RankError(text)
        error.is_told = not self.is_first
        error.agreed_by = self
        return error

    def _leave(self, error: RuntimeError) -> None:
        """Close the connections to processes that wait for this one and for no lost one.

        They notice the end then, and can say so while the others still listen. With NCCL nothing is
        closed, because that may wait for the lost process.
        """
        traceback.clear_frames(error.__traceback__)  # which refer to a group
        self._close()

    def _close(self) -> None:
        if not self._has_nccl:
            self._meshes.clear()
            self._begun.clear()
            _disconnect()


ALONE = Ranks()
_connected: list[Ranks] = []  # one at most


def open_ranks(config: TrainConfig) -> Ranks:
    """Return the processes of a training, connected; `ALONE` without a mesh.

    Raises ValueError where the mesh is not the one that the launcher has started, and RankError
    where the processes do not fit each other.
    """
    sizes = parsed_mesh(config.mesh)
    wanted, place = prod(sizes.values()), launched()
    if not sizes or (wanted == 1 and place.size == 1):
        return ALONE
    if place.size == 1:
        raise ValueError(
            f"mesh = {config.mesh!r} needs {wanted} processes, and this is one: start them with "
            f"torchrun --nproc-per-node {wanted} -m sae_fast.train"
        )
    ranks = connect(timedelta(minutes=config.mesh_timeout), config.device)
    ranks.begin_training()
    with ranks.agreement(lambda: {"its settings": {"mesh": config.mesh}}):
        if wanted != place.size:
            raise ValueError(
                f"mesh = {config.mesh!r} needs {wanted} processes, and the launcher has started "
                f"{place.size} (WORLD_SIZE = {place.size})"
            )
    return ranks


def connect(timeout: timedelta, device: str = "cpu") -> Ranks:
    """Connect the processes that a launcher has started, once in each.

    Args:
        timeout: how long a process is waited for.
        device: what the model is trained on.

    Raises RankError where they cannot be connected, or where one of them has another version of
    sae_fast or torch, or GPUs and no NCCL.
    """
    if _connected:
        return _connected[0]
    place = launched()
    assert place.local_rank is not None
    if dist.is_initialized():
        raise ValueError("mesh: torch.distributed is in use by this program already")
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        own = PrefixStore("sae_fast", store)
        store = PrefixStore(common_name(own, rank, size, timeout), own)
        programs = _programs(store, rank, size, _Program.of_this(device, place.local_size))
        has_nccl = all(program.has_own_gpu and program.has_nccl for program in programs)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError) as error:
        # Each process says so: the first one may be the one that is missing.
        raise RankError(f"mesh: the ranks cannot be connected: {error}") from error
    ranks = Ranks(rank, size, store, place.local_rank, place.local_size)
    ranks._has_nccl, ranks._timeout = has_nccl, timeout
    if (difference := _mismatch(programs)) is not None:
        with suppress(ValueError), ranks.agreement():  # until all have come so far
            raise ValueError(difference)
        _disconnect()
        raise ranks._told(difference)
    atexit.register(_disconnect)
    _connected.append(ranks)
    return ranks


class _Program(NamedTuple):
    """The versions and devices of a process, which must fit the ones of the others.

    Attributes:
        sae_fast: the version of sae_fast.
        torch: the version of torch.
        has_own_gpu: whether it trains on a GPU which no other process on its machine uses.
        has_nccl: whether its torch has NCCL.
    """

    sae_fast: str
    torch: str
    has_own_gpu: bool
    has_nccl: bool

    @classmethod
    def of_this(cls, device: str, local_size: int) -> _Program:
        """Return what this process computes with, one of `local_size` on its machine."""
        has_own_gpu = device.startswith("cuda") and torch.cuda.device_count() >= local_size
        versions = sae_fast.__version__, torch.__version__
        return cls(*versions, has_own_gpu, dist.is_nccl_available())


def _programs(store: Store, rank: int, size: int, own: _Program) -> list[_Program]:
    """Return what every process computes with, told through the store."""
    store.set(f"program/{rank}", json.dumps(own))
    return [_Program(*json.loads(store.get(f"program/{number}"))) for number in range(size)]


def _mismatch(programs: Sequence[_Program]) -> str | None:
    """Return in words why processes cannot train together, the first reason; None: they can."""
    first = programs[0]
    for number, other in enumerate(programs):
        for name in ("sae_fast", "torch"):
            value, known = getattr(other, name), getattr(first, name)
            if value != known:
                difference = _difference(known, value)
                return f"rank {number} differs from rank 0 in the version of {name}{difference}"
        if other.has_own_gpu and not other.has_nccl:
            return f"rank {number}: mesh: its torch ({other.torch}) is without NCCL"
    return None


def _mesh_of(n_data: int, n_latents: int, timeout: timedelta | None) -> DeviceMesh:
    """Return the processes as a table of `n_data` rows, with a group of each row and column."""
    table = torch.arange(n_data * n_latents).view(n_data, n_latents)
    groups = [
        dist.new_subgroups_by_enumeration(numbers.tolist(), timeout=timeout)[0]  # type: ignore[no-untyped-call]
        for numbers in (table.t(), table)
    ]
    return DeviceMesh.from_group(groups, "cpu", table, mesh_dim_names=("data", "latents"))


def note_failure(error: BaseException) -> None:
    """Tell the other processes, where they are connected, why this one ends."""
    for ranks in _connected:
        ranks.note_failure(error)


def _disconnect() -> None:
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _sum_of(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _text(error: BaseException | None) -> str | None:
    return None if error is None else " ".join(str(error).split()) or type(error).__name__


def _difference(first: Any, other: Any) -> str:
    """Return the difference of two values in words, where it is short enough to be read."""
    if isinstance(first, dict) and isinstance(other, dict):
        for name, value in first.items():
            if other.get(name) != value:
                return f" ({name}){_difference(value, other.get(name))}"
    if isinstance(first, list | dict) or isinstance(other, list | dict):
        return ""
    return f": {shown(other)} and not {shown(first)}"
