"""A training step from CUDA graphs equals the eager one; on the CPU replays are emulated."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from planted import D_IN, planted

from sae_fast.activations import Rows
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.architecture import StepSettings
from sae_fast.config import SAEConfig
from sae_fast.evaluation.metrics import evaluate
from sae_fast.ops import native
from sae_fast.ops.working_copies import encoder_copy
from sae_fast.training.cuda_graph import WARMUP_STEPS, GraphedStep, GraphRecorder
from sae_fast.training.optimizer.loss_scaler import LossScaler
from sae_fast.training.optimizer.row_optimizer import RowOptimizer
from sae_fast.training.step import TrainingStep

STEPS = 12
VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batch_topk": {"arch": "batch_topk"},
    "matryoshka": {"arch": "matryoshka"},
    "multi_topk": {"multi_topk": True},
    "abs_topk": {"activation": "abs_topk"},
    "chunked_max": {
        "decorrelation": "chunked_max",
        "decorrelation_coeff": 1.0,
        "decorrelation_chunk": 10,
    },
    "groupmax": {"activation": "groupmax"},
}


class EmulatedRecorder:
    """A recorder whose replay repeats the device's work and undoes changes of Python's state."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        self.captures = 0
        self.replays = 0

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        yield

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            tensors = [*self.sae.parameters(), *self.sae.buffers()]
            versions = [tensor._version for tensor in tensors]
            kept = [(copies, dict(copies)) for copies in self._copies()]
            noted = [(copy, copy.version) for _, old in kept for copy in old.values()]
            work()
            torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))
            for copies, old in kept:
                copies.clear()
                copies.update(old)
            for copy, version in noted:
                copy.version = version

        return replay

    def finish(self) -> None:
        pass

    def _copies(self) -> list[Any]:
        return [getattr(W, "sae_fast_copies", {}) for W in (self.sae.W_enc, self.sae.W_dec)]


class CountingRecorder(GraphRecorder):
    """The real recorder with counts of its calls."""

    captures = replays = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        replay = super().record(work)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted


class Run:
    """A small model with its training step, eager or from graphs."""

    def __init__(
        self,
        device: torch.device,
        *,
        graphed: bool,
        precision: str = "screened",
        states: str = "fp32",
        **fields: Any,
    ):
        sizes = {"d_in": D_IN, "d_sae": 64, "k": 4}
        self.sae = SparseAutoencoder(SAEConfig(**sizes, dead_after_tokens=200, **fields))
        self.sae.initialize_(torch.Generator().manual_seed(0))
        self.sae.to(device)
        self.optimizer = RowOptimizer(self.sae, precision=precision, states=states)
        step = TrainingStep(self.sae, self.optimizer, LossScaler(enabled=False), precision)
        self.step = step
        self.recorder: Any = None
        self.run: Callable[..., None] = step.run
        if graphed:
            cuda = device.type == "cuda"
            self.recorder = CountingRecorder(device) if cuda else EmulatedRecorder(self.sae)
            self.run = GraphedStep(step, self.recorder).run
        self.rows = [Rows(x, {}) for x in planted(640, seed=1).to(device).split(64)]

    def make(
        self, number: int, k_aux: int = 0, batches: int = 1, k: int | None = None
    ) -> list[float]:
        chosen = [self.rows[(number * batches + i) % 10] for i in range(batches)]
        self.run(chosen, StepSettings(1e-3 * (number + 1), k_aux=k_aux, k=k))
        return list(self.step.read({}).metrics.values())

    def parameters(self) -> list[torch.Tensor]:
        state = [*self.sae.state_dict().values(), *self.optimizer.state_dict().values()]
        return [value.cpu().clone() for value in state]


@pytest.fixture(autouse=True)
def _needs_native(device: torch.device) -> None:
    if device.type == "cuda" and native.load() is None:
        pytest.skip("the reference's ops cannot be captured")


def _equal(first: Run, second: Run) -> bool:
    return all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize("precision", ["screened", "bf16"])
@pytest.mark.parametrize("batches", [1, 2])
def test_replayed_steps_equal_eager_ones_to_the_bit(
    device: torch.device, precision: str, batches: int
) -> None:
    eager = Run(device, graphed=False, precision=precision)
    graphed = Run(device, graphed=True, precision=precision)
    for number in range(STEPS):
        assert graphed.make(number, batches=batches) == eager.make(number, batches=batches)
    assert graphed.recorder.captures == 1
    assert graphed.recorder.replays == STEPS - WARMUP_STEPS
    assert _equal(graphed, eager)


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_replayed_steps_draw_what_eager_ones_do(device: torch.device, states: str) -> None:
    eager, graphed = (Run(device, graphed=graphed, states=states) for graphed in (False, True))
    for number in range(STEPS):
        assert graphed.make(number) == eager.make(number)
    assert graphed.recorder.captures == 1
    assert _equal(graphed, eager)


@pytest.mark.parametrize("variant", VARIANTS)
def test_replayed_steps_of_a_variant_equal_eager_ones_to_the_bit(
    device: torch.device, variant: str
) -> None:
    eager = Run(device, graphed=False, **VARIANTS[variant])
    graphed = Run(device, graphed=True, **VARIANTS[variant])
    for number in range(STEPS):
        assert graphed.make(number, k_aux=8) == eager.make(number, k_aux=8)
    assert graphed.recorder.replays == STEPS - WARMUP_STEPS
    assert _equal(graphed, eager)


@pytest.mark.parametrize("variant", ["topk", "batch_topk", "matryoshka", "multi_topk"])
def test_each_k_has_its_graph(device: torch.device, variant: str) -> None:
    eager = Run(device, graphed=False, **VARIANTS[variant])
    graphed = Run(device, graphed=True, **VARIANTS[variant])
    ks = [12] * 5 + [7] * 5 + [4] * 5
    losses = [(graphed.make(i, k=k), eager.make(i, k=k)) for i, k in enumerate(ks)]
    assert all(one == other for one, other in losses)
    assert graphed.recorder.captures == 3
    assert _equal(graphed, eager)


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("precision", ["screened", "bf16", "fp16"])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_op_of_a_step_waits_for_the_device(
    device: torch.device,
    precision: str,
    batches: int,
    variant: str,
    states: str,
    no_waiting: Callable[[], AbstractContextManager[None]],
) -> None:
    if device.type == "cpu":
        pytest.skip("the CPU does not wait for itself")
    run = Run(device, graphed=False, precision=precision, states=states, **VARIANTS[variant])
    rate = torch.full((), 1e-3, dtype=torch.float64, device=device)
    settings = StepSettings(rate, k_aux=8)
    run.step.run(run.rows[:batches], settings)
    with no_waiting():
        run.step.run(run.rows[:batches], settings)


def test_after_a_capture_that_failed_the_stream_is_the_one_before(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the CPU has no streams")
    before = torch.cuda.current_stream(device)
    number = torch.ones((), device=device)
    with pytest.raises(RuntimeError, match="no CUDA graph of the step"):
        GraphRecorder(device).record(lambda: print(float(number)))  # which waits for the device
    assert torch.cuda.current_stream(device) == before
    assert float(number + 1) == 2.0


def test_each_room_for_dead_latents_has_its_graph(device: torch.device) -> None:
    eager, graphed = Run(device, graphed=False), Run(device, graphed=True)
    rooms = [0] * 5 + [8] * 5 + [4, 8] * 5 + [0] * 2
    losses = [(graphed.make(i, k), eager.make(i, k)) for i, k in enumerate(rooms)]
    assert all(one == other for one, other in losses)
    assert graphed.recorder.captures == 3
    assert _equal(graphed, eager)


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("precision", ["screened", "bf16"])
def test_an_evaluation_between_replays_sees_their_weights(
    device: torch.device, precision: str, is_kept: bool
) -> None:
    eager = Run(device, graphed=False, precision=precision)
    graphed = Run(device, graphed=True, precision=precision)
    heldout = planted(100, seed=3).split(50)
    for number in range(STEPS):
        assert graphed.make(number) == eager.make(number)
        fresh = SparseAutoencoder(graphed.sae.config).to(device)
        fresh.load_state_dict(graphed.sae.state_dict())
        with graphed.step.kept_copies() if is_kept else nullcontext():
            assert evaluate(graphed.sae, heldout) == evaluate(fresh, heldout)
    assert graphed.recorder.captures == 1
    assert _equal(graphed, eager)


def test_a_replay_is_noticed_by_autograd(device: torch.device) -> None:
    graphed = Run(device, graphed=True)
    for number in range(WARMUP_STEPS + 2):
        graphed.make(number)
    loss = graphed.sae.training_loss(graphed.rows[0].x)
    graphed.make(STEPS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.total.backward()


def test_weights_changed_by_hand_are_trained_on(device: torch.device) -> None:
    eager, graphed = Run(device, graphed=False), Run(device, graphed=True)
    for number in range(3 * STEPS):
        if number in (STEPS, 2 * STEPS):
            for run in (eager, graphed):
                with torch.no_grad():
                    run.sae.W_enc.mul_(1.5)
        if number == 2 * STEPS + 1:
            for run in (eager, graphed):
                run.sae.W_dec.data = run.sae.W_dec.data.clone()
        assert graphed.make(number) == eager.make(number)
    assert _equal(graphed, eager)
    fresh = torch.ops.sae_fast.pack_encoder(graphed.sae.W_enc.detach().clone(), "screened")
    with graphed.step.kept_copies():
        kept = encoder_copy(graphed.sae.W_enc, "screened")
    assert all(torch.equal(*pair) for pair in zip(kept, fresh, strict=True))


def test_a_bad_step_from_a_graph_changes_nothing(device: torch.device) -> None:
    graphed = Run(device, graphed=True)
    for number in range(6):
        graphed.make(number)
    before = [value.clone() for value in graphed.sae.parameters()]
    bad = graphed.rows[0].map(torch.clone)
    bad.x[3, 2] = torch.nan
    graphed.run([bad], StepSettings(1e-3, k_aux=0))
    graphed.make(8)
    reading = graphed.step.read({})
    assert reading.bad_step == 7
    assert math.isnan(reading.variance)
    assert all(map(torch.equal, graphed.sae.parameters(), before))


@pytest.mark.parametrize("batches", [1, 2])
def test_codes_that_are_kept_are_those_of_the_replayed_step(
    device: torch.device, batches: int
) -> None:
    if device.type != "cuda":
        pytest.skip("only a GPU's graph writes its codes to the places of the capture")
    runs = [Run(device, graphed=graphed) for graphed in (False, True)]
    for run in runs:
        run.step.codes = []
    for number in range(STEPS):
        found = []
        for run in runs:
            run.make(number, batches=batches)
            assert run.step.codes is not None
            assert len(run.step.codes) == batches
            found.append([code.dense() for code in run.step.codes])
        assert all(map(torch.equal, *found))
