"""A training step as a CUDA graph: captured once for each shape of its inputs and code, replayed.

A step launches some hundred small kernels, which takes the host longer than they take a GPU. A
graph replays them in one launch, at the addresses seen at capture: its inputs are copied to fixed
places, the learning rate is a tensor, and what it allocates lies in a pool of its own. Accumulated
batches are captured together with their update: their row factors must all live until then.

Nothing of what Python does at capture happens at replay. Of that only the version counters matter,
by which autograd and the working copies notice an update: `_announce` advances them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sae_fast.activations import Rows
from sae_fast.autoencoder.architecture import StepSettings
from sae_fast.ops import Code
from sae_fast.ops.working_copies import copies_to_refresh, mark_updated
from sae_fast.training.step import TrainingStep

# Steps made eagerly before a capture. They are steps of the run like any other; what is set up at
# first use (library handles, kernels loaded lazily, working copies) must not fall into a capture.
WARMUP_STEPS = 3

Key = tuple[tuple[torch.Size, ...], int | None, int | None, bool]


class GraphRecorder:
    """The calls of torch.cuda: a side stream for the first steps, captures, one pool.

    The graphs share the pool. That is safe because nothing in it outlives a replay: every tensor
    that a later step reads was made outside. Codes that are kept are not freed, so that no other
    graph takes their memory.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        self._device = device

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Run work launched inside on the stream of the captures, in order with the current one.

        Autograd and cuBLAS keep a state for each stream, and a capture must find it made.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what replays `work` on the current stream; the work itself is not done here.

        Raises:
            RuntimeError: when it cannot be captured, naming the remedy.
        """
        graph = torch.cuda.CUDAGraph()
        # The reader's thread may pin memory meanwhile, which mode "global" would not let it do.
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        current = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.device(self._device), capture:
                work()
        except RuntimeError as error:
            # A capture that fails leaves its stream the current one.
            torch.cuda.set_stream(current)
            torch.cuda.synchronize(self._device)
            remedy = "--no-cuda-graph (cuda_graph = False) trains without one"
            raise RuntimeError(f"no CUDA graph of the step: {error}; {remedy}") from error
        return graph.replay

    def finish(self) -> None:
        """Wait for the graphs, which are about to be dropped; the next ones get another pool.

        The allocator does not take up again a pool that has lost its last graph.
        """
        torch.cuda.synchronize(self._device)
        self._pool = torch.cuda.graph_pool_handle()


class GraphedStep:
    """Run a TrainingStep from CUDA graphs.

    Args:
        step: the step; all that it does must be possible in a capture.
        recorder: captures it.
    """

    def __init__(self, step: TrainingStep, recorder: GraphRecorder) -> None:
        self._step = step
        self._recorder = recorder
        device = step.sae.W_enc.device
        self._rate = torch.zeros((), dtype=torch.float64, device=device)
        self._sparsity_weight = torch.ones((), dtype=torch.float32, device=device)
        self._inputs: dict[tuple[torch.Size, ...], list[Rows]] = {}
        self._graphs: dict[Key, Callable[[], None]] = {}
        self._codes: dict[Key, list[Code] | None] = {}  # of the pool: a replay writes them again
        self._eager_steps: Counter[Key] = Counter()
        self._addresses: tuple[int, ...] | None = None

    def run(self, batches: Sequence[Rows], settings: StepSettings) -> None:
        """Make one optimiser step, see `TrainingStep.run`; rate and sparsity weight are numbers."""
        with self._step.kept_copies():
            self._run(batches, settings)

    def _run(self, batches: Sequence[Rows], settings: StepSettings) -> None:
        if self._addresses != self._current_addresses():
            self._forget()
        self._rate.fill_(settings.rate)  # a kernel's argument: nothing on the host that must live
        self._sparsity_weight.fill_(settings.sparsity_weight)
        settings = settings._replace(rate=self._rate, sparsity_weight=self._sparsity_weight)
        shapes = tuple(part.shape for part in _tensors(batches))
        key = (shapes, settings.k_aux, settings.k, settings.reconstruction_only)
        if key not in self._graphs and self._eager_steps[key] < WARMUP_STEPS:
            with self._recorder.side_stream():
                self._step.run(batches, settings)
            self._eager_steps[key] += 1
            self._addresses = self._current_addresses()
            return
        inputs = self._fixed_inputs(shapes, batches)
        if key not in self._graphs:
            self._graphs[key] = self._recorder.record(lambda: self._step.run(inputs, settings))
            self._codes[key] = self._step.codes
        self._graphs[key]()
        if (codes := self._codes[key]) is not None:
            self._step.codes = [code.detach() for code in codes]  # their views are made anew
        self._announce()

    def _fixed_inputs(self, shapes: tuple[torch.Size, ...], batches: Sequence[Rows]) -> list[Rows]:
        """Copy the batches to where the graphs of these shapes read them, and return these."""
        if shapes not in self._inputs:
            self._inputs[shapes] = [batch.map(torch.empty_like) for batch in batches]
        for place, part in zip(_tensors(self._inputs[shapes]), _tensors(batches), strict=True):
            place.copy_(part)
        return self._inputs[shapes]

    def _announce(self) -> None:
        """Count the update that a replay has made, and mark its refreshed copies as current."""
        sae = self._step.sae
        for W in (sae.W_enc, sae.W_dec):
            mark_updated(W, *copies_to_refresh(W, self._step.precision))
        others = [p for p in sae.parameters() if p is not sae.W_enc and p is not sae.W_dec]
        torch.autograd.graph.increment_version([*others, *sae.buffers()])

    def _current_addresses(self) -> tuple[int, ...]:
        """Return the addresses that the graphs read and write; a stale copy counts as none."""
        sae, optimizer = self._step.sae, self._step.optimizer
        tensors: list[Tensor | None] = [*sae.parameters(), *sae.buffers()]
        tensors += optimizer.state_dict().values()
        for W in (sae.W_enc, sae.W_dec):
            tensors += copies_to_refresh(W, self._step.precision)
        return tuple(-1 if tensor is None else tensor.data_ptr() for tensor in tensors)

    def _forget(self) -> None:
        """Drop all graphs: weights were changed, or tensors put in the place of others."""
        if self._graphs:
            self._recorder.finish()
        self._graphs.clear()
        self._codes.clear()
        self._eager_steps.clear()


def _tensors(batches: Sequence[Rows]) -> list[Tensor]:
    return [part for x, columns in batches for part in (x, *columns.values())]
