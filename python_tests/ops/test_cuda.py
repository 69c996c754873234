"""Features of CUDA only: streams, several devices, graphs, no synchronisation, large indices."""

import re

import pytest
import torch
from device_ops import public, written_arguments
from encoding_oracle import check_largest
from op_samples import EXACT, kept_rows, make_problem, samples, samples_on
from tolerances import close
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.ops.registry import NATIVE
from sae_fast.training.optimizer.row_optimizer import RowOptimizer

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("ops_on_device")]

SAMPLES = [pytest.param(name, case, id=f"{name}-{case}") for name, case, _ in samples()]
# The number of entries it returns depends on the data, so the host waits for it.
WAITS = ("encode_threshold",)
CAPTURED = [parameter for parameter in SAMPLES if parameter.values[0] not in WAITS]
SLEEP_CYCLES = 50_000_000  # tens of milliseconds
PRECISIONS = ("screened", "bf16")


@pytest.fixture
def device(cuda_device):
    return cuda_device


def clones(arguments):
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)


def run(name, arguments):
    """Call an op; return its results and the arguments it writes, without unwritten memory."""
    outputs = getattr(torch.ops.sae_fast, name).default(*arguments)
    found = list(outputs) if isinstance(outputs, tuple) else [outputs]
    written = [arguments[place] for place in written_arguments(name)]
    return [tensor for tensor in (*found, *written) if isinstance(tensor, Tensor)]


def comparable(name, tensors):
    if name == "row_gradient_norm":
        return [*tensors[:2], kept_rows(*tensors[2:4]), tensors[3]]
    return tensors


def same_bits(name, first, second):
    pairs = zip(comparable(name, first), comparable(name, second), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


@pytest.mark.parametrize(("name", "case"), SAMPLES)
def test_op_runs_on_the_current_stream(name, case, device):
    arguments = samples_on(device)[name, case]
    expected = run(name, clones(arguments))
    late = tuple(torch.zeros_like(a) if isinstance(a, Tensor) else a for a in arguments)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)  # on another stream the op would read zeros
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                late[place].copy_(argument)
        found = run(name, late)
    stream.synchronize()
    assert same_bits(name, found, expected)


@pytest.mark.parametrize(("name", "case"), SAMPLES)
def test_op_runs_on_the_device_of_its_arguments(name, case, device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    arguments = samples_on(device)[name, case]
    expected = run(name, clones(arguments))
    second = torch.device("cuda:1")
    moved = tuple(a.to(second) if isinstance(a, Tensor) else a for a in arguments)
    assert torch.cuda.current_device() == 0
    found = run(name, moved)
    assert all(tensor.device == second for tensor in found)
    assert same_bits(name, [tensor.to(device) for tensor in found], expected)


@pytest.mark.parametrize(("name", "case"), CAPTURED)
def test_op_captured_in_a_graph_computes_from_new_inputs(name, case, device):
    arguments = samples_on(device)[name, case]
    # Halves are exact in every dtype, and valid for every argument.
    halves = tuple(
        a / 2 if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )
    expected = run(name, clones(halves))
    static = clones(arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name, static)
    for tensor in captured:
        tensor.fill_(-7 if not tensor.is_floating_point() else torch.nan)
    for place, half in enumerate(halves):
        if isinstance(half, Tensor):
            static[place].copy_(half)
    graph.replay()
    assert same_bits(name, captured, expected)


def one_tensor_elsewhere():
    """Yield (op, case, place of an argument) for the first sample of every op."""
    seen = set()
    for name, case, arguments in samples():
        if name not in seen and sum(isinstance(a, Tensor) for a in arguments) > 1:
            seen.add(name)
            names = [a.name for a in getattr(torch.ops.sae_fast, name).default._schema.arguments]
            for place, argument in enumerate(arguments):
                if isinstance(argument, Tensor):
                    yield pytest.param(name, case, place, id=f"{name}-{names[place]}")


@pytest.mark.skipif(not NATIVE, reason="the reference looks at what it uses only")
@pytest.mark.parametrize(("name", "case", "place"), [*one_tensor_elsewhere()])
def test_argument_on_another_device_is_named(name, case, place, device):
    arguments = list(samples_on(device)[name, case])
    arguments[place] = arguments[place].cpu()
    message = rf"{re.escape(name)}: \w+ must be on .*, got (cpu|cuda:\d+)"
    with pytest.raises(RuntimeError, match=message):
        run(name, arguments)


def make_training(device, precision, n=64, d_in=48, d_sae=512, k=8):
    """Make a model with its optimiser, and a batch."""
    torch.manual_seed(0)
    config = SAEConfig(d_in=d_in, d_sae=d_sae, k=k, normalize_activations="none")
    sae = SparseAutoencoder(config).to(device)
    x = torch.randn(n, d_in).to(device)
    return sae, RowOptimizer(sae, grad_clip=1.0, precision=precision), x


def step(sae, optimizer, x, lr, precision):
    # No latent is dead yet, which the trainer knows without a synchronisation.
    loss = sae.training_loss(x, precision=precision, dense_grad=False, k_aux=0)
    loss.total.backward()
    optimizer.step(lr)
    optimizer.zero_grad()
    sae.update_fired_(loss.code, len(x))
    return loss.total.detach()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_step_never_waits_for_the_device(precision, device, no_waiting):
    sae, optimizer, x = make_training(device, precision)
    for _ in range(2):
        step(sae, optimizer, x, 1e-3, precision)
    torch.cuda.synchronize()
    with no_waiting():
        step(sae, optimizer, x, 1e-3, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_captured_training_step_equals_eager_steps(precision, device):
    batches = torch.randn(6, 64, 48, generator=torch.Generator().manual_seed(1)).to(device)
    rates = [1e-3 / (number + 1) for number in range(6)]
    results = []
    for captured in (False, True):
        sae, optimizer, x = make_training(device, precision)
        lr = torch.zeros((), dtype=torch.float64, device=device)

        def take(arguments=(sae, optimizer, x, lr, precision)):
            return step(*arguments)

        losses = []
        graph = torch.cuda.CUDAGraph()
        for number, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
            x.copy_(batch)
            lr.fill_(rate)
            if not captured or number < 3:
                losses.append(take().clone())
                continue
            if number == 3:
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    loss = take()
            graph.replay()
            losses.append(loss.clone())
        results.append([torch.stack(losses), *(p.detach() for p in sae.parameters())])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


def needs_memory(gigabytes):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of device memory")


@pytest.mark.slow
@pytest.mark.parametrize("precision", EXACT)
def test_selection_reaches_past_2_to_the_31_pre_activations(precision, device):
    needs_memory(8)
    n, d_in, d_sae, k = 4100, 8, 524_309, 8
    assert n * d_sae > 2**31
    problem = make_problem(n, d_in, d_sae)
    code = public.encode_topk(*problem.encoder, k, precision=precision)
    x, W_enc, b_enc, b_dec = (tensor.to(device) for tensor in problem.encoder)
    for first in range(0, n, 256):
        pre_acts = (x[first : first + 256] - b_dec) @ W_enc.t() + b_enc
        expected = pre_acts.topk(k).values.double().cpu()
        size = 8 * expected.abs().max()
        close(code.values[first : first + 256], expected, terms=d_in, magnitude=size)
    some = torch.tensor([0, 1, n // 2, n - 1])
    check_largest(
        code.values[some], code.indices[some], problem._replace(x=problem.x[some]), precision
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_reaches_past_2_to_the_31_parameters(precision, device):
    """If only the last latents of a huge dictionary are active, they train as in a small one."""
    needs_memory(90)
    n, d_in, d_sae, active, k = 1024, 2051, 2**20 + 3, 64, 8
    assert d_in * (d_sae - active) > 2**31
    results = []
    for size in (active, d_sae):
        config = SAEConfig(d_in=d_in, d_sae=size, k=k, normalize_activations="none")
        with torch.device(device):
            sae = SparseAutoencoder(config)
        small = make_problem(n, d_in, active)
        with torch.no_grad():
            sae.b_enc.fill_(-1e4)
            sae.b_enc[-active:] = 0.0
            for W in (sae.W_enc, sae.W_dec):
                W[-active:] = small.W_dec.to(device)
        optimizer = RowOptimizer(sae, grad_clip=0.0, precision=precision)
        losses = [step(sae, optimizer, small.x.to(device), 1e-3, precision) for _ in range(2)]
        rows = (W.detach()[-active:].clone() for W in (sae.W_enc, sae.W_dec))
        results.append([torch.stack(losses), *rows])
        del sae, optimizer, losses
    for in_small, in_large in zip(*results, strict=True):
        torch.testing.assert_close(in_large, in_small, rtol=1e-3, atol=1e-4)


def test_a_batch_that_is_computed_in_full_is_counted(device):
    # Every score of the batch is the same, and there are more than the list of candidates holds.
    W, ones = torch.zeros(600, 1, device=device), torch.ones(600, device=device)
    x, b_dec = torch.randn(9, 1, device=device), torch.zeros(1, device=device)
    before = int(ops.full_batches(W))
    code = ops.encode_batch_topk(x, W, ones, b_dec, 3)
    assert int(ops.full_batches(W)) == before + 1
    assert torch.equal(code.values, torch.ones_like(code.values))
    ops.encode_batch_topk(x[:2], W, ones, b_dec, 3)
    assert int(ops.full_batches(W)) == before + 1
