import pytest
import torch
from device_ops import ops
from op_samples import make_problem
from tolerances import close

pytestmark = pytest.mark.usefixtures("ops_on_device")

SHAPES = [(1, 5), (2, 1), (9, 33), (40, 8), (300, 24), (1000, 65)]


def over_pairs(W):
    """Return the loss by the definition, over every pair of different rows."""
    unit = W / torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp_min(1e-12)
    cosines = unit @ unit.t()
    return (cosines - cosines.diag().diag()).square().sum()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize(("d_sae", "d_in"), SHAPES)
def test_loss_and_gradient_are_those_of_all_pairs(d_sae, d_in, scale):
    W = scale * make_problem(1, d_in, d_sae).W_enc
    loss, grad = ops.decorrelation(W)
    rows = W.double().requires_grad_()
    expected = over_pairs(rows)
    expected.backward()
    # Both are differences: |S|² − Σ|ŵ|⁴, and each row's gradient less its part along the row.
    pairs = expected.detach() + d_sae
    close(loss, expected.detach(), terms=d_in, magnitude=pairs)
    norms = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    unit = torch.nn.functional.normalize(W.double(), dim=1)
    size = 8 * (unit.abs() @ (unit.abs().t() @ unit.abs())) / norms
    close(
        grad,
        rows.grad,
        terms=d_sae + d_in,
        magnitude=size.amax(1, keepdim=True).expand(d_sae, d_in),
    )


def test_orthogonal_rows_have_no_loss_and_no_gradient():
    loss, grad = ops.decorrelation(3 * torch.eye(16))
    close(loss, torch.tensor(0.0, dtype=torch.float64), terms=16, magnitude=16.0)
    close(grad, torch.zeros(16, 16, dtype=torch.float64), terms=16, magnitude=8.0)


def test_equal_rows_have_the_loss_of_all_pairs():
    loss, grad = ops.decorrelation(torch.ones(10, 4))
    close(loss, torch.tensor(90.0, dtype=torch.float64), terms=10)
    close(grad, torch.zeros(10, 4, dtype=torch.float64), terms=10, magnitude=40.0)


def test_zero_rows_count_nothing_and_get_no_gradient():
    W = make_problem(1, 6, 20).W_enc
    expected = ops.decorrelation(W)
    padded = torch.cat([W, torch.zeros(3, 6)])
    loss, grad = ops.decorrelation(padded)
    close(loss, expected[0].double(), terms=20, magnitude=expected[0].double() + 20)
    close(grad[:20], expected[1].double(), terms=20, magnitude=expected[1].abs().max() + 1)
    assert torch.equal(grad[20:], torch.zeros(3, 6))


def test_input_need_not_be_contiguous():
    W = make_problem(1, 6, 20).W_enc
    for found, expected in zip(
        ops.decorrelation(W.t().contiguous().t()), ops.decorrelation(W), strict=True
    ):
        assert torch.equal(found, expected)
