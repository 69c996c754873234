import pytest
import torch
from op_samples import make_problem
from tolerances import close

from sae_fast import ops

# torch's own warning, from inside the compiler.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]


def topk_step(x, W_enc, b_enc, W_dec, b_dec, precision):
    dead = torch.arange(70, device=x.device) % 3 == 0
    code = ops.encode_topk(x, W_enc, b_enc, b_dec, 5, precision=precision, dead_mask=dead, k_aux=4)
    found = ops.reconstruct(code, W_dec, b_dec, x)
    aux = ops.decode(code.aux, W_dec)
    return found.squared_error.mean() + aux.square().mean() + ops.decorrelation(W_dec)


def threshold_step(x, W_enc, b_enc, W_dec, b_dec, precision):
    threshold = torch.full_like(b_enc, 0.5)
    code = ops.encode_threshold(x, W_enc, b_enc, b_dec, threshold, precision=precision)
    found = ops.reconstruct(code, W_dec, b_dec, x)
    x_hat = ops.decode(code, W_dec, b_dec)
    return found.squared_error.sum() + x_hat.sin().sum() + code.values.sum()


def correlation_step(x, W_enc, b_enc, W_dec, b_dec, precision):
    h = torch.relu(x @ W_enc.t() + b_enc)
    found = ops.code_correlation(h, 40)
    pairs = (found.n_active[0] * found.n_active[1]).clamp_min(1)
    return found.within.sqrt() + found.between / pairs + (W_dec * b_dec).sum()


def loss_and_gradients(step, n, precision, device):
    problem = make_problem(n).to(device).requires_grad()
    loss = step(*problem, precision)
    loss.backward()
    return loss, *(tensor.grad for tensor in problem)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "backend", "precision"),
    [
        (topk_step, "aot_eager", "screened"),
        (topk_step, "aot_eager", "bf16"),
        (threshold_step, "aot_eager", "screened"),
        (correlation_step, "aot_eager", "screened"),
        pytest.param(topk_step, "inductor", "screened", marks=pytest.mark.slow),
    ],
)
def test_compiled_training_step_equals_eager_for_every_batch_size(step, backend, precision, device):
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    loss_and_gradients(compiled, 20, precision, device)
    # Compiled, reconstruct gets a gradient of 0 where eager gets none, and rounds its residual.
    rounded_to = {"bf16": torch.bfloat16}.get(precision, torch.float32)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (20, 33, 7):
            found = loss_and_gradients(compiled, n, precision, device)
            expected = loss_and_gradients(step, n, precision, device)
            for a, b in zip(found, expected, strict=True):
                close(a, b.double(), terms=n, magnitude=8 * b.abs().max(), dtype=rounded_to)


def test_code_passes_through_a_compiled_function(device):
    torch.compiler.reset()
    problem = make_problem().to(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def encode(x):
        code = ops.encode_topk(x, *problem.encoder[1:], 5)
        return code, code.fired(), code.l0()

    expected = ops.encode_topk(*problem.encoder, 5)
    code, fired, l0 = encode(problem.x)
    assert torch.equal(fired, expected.fired())
    assert torch.equal(l0, expected.l0())
    assert torch.equal(code.values, expected.values)
    assert torch.equal(code.indices, expected.indices)
    assert torch.equal(code.dense(), expected.dense())
    assert torch.equal(code.latent_major()[1], expected.latent_major()[1])
