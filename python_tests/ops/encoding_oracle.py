"""The required results of encode_* by a float64 product: exact for integers, else to rounding."""

import torch
from op_samples import LOW, Problem, make_problem
from tolerances import close, relative
from torch import Tensor


def integers(n: int, d_in: int, d_sae: int, bound: int = 2, seed: int = 0) -> Problem:
    """Make a problem whose pre-activations are exact in every precision, with many ties."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-bound, bound + 1, shape, generator=generator).float()

    W_enc = draw(d_sae, d_in)
    return Problem(draw(n, d_in), W_enc, draw(d_sae), W_enc, draw(d_in))


def of_two_kinds() -> Problem:
    """Make a problem whose tokens come from two distributions, one after the other.

    The second half's k-th value is far below what the first half lets one guess: its rows are
    screened again, and their candidates overflow a buffer on the way.
    """
    problem = make_problem(1500, 64, 4096)
    generator = torch.Generator().manual_seed(5)
    direction = problem.W_enc[0] / problem.W_enc[0].norm()
    problem.W_enc[:64] = direction + torch.randn(64, 64, generator=generator) / 80
    problem.x[:750] = 5 * direction
    return problem


def pre_activations(problem: Problem, precision: str) -> tuple[Tensor, Tensor]:
    """Return (x − b_dec) W_encᵀ + b_enc in float64 [N, F], and the magnitude of its terms."""
    x, W_enc, b_enc, b_dec = problem.encoder
    centred = x - b_dec  # in float32, from which it is rounded
    if precision in LOW:
        centred, W_enc = centred.to(LOW[precision]), W_enc.to(LOW[precision])
    centred, W_enc, b_enc = centred.double(), W_enc.double(), b_enc.double()
    return centred @ W_enc.t() + b_enc, centred.abs() @ W_enc.t().abs() + b_enc.abs()


def rounding(problem: Problem, magnitude: Tensor) -> Tensor:
    """Return the error allowed in a float32 pre-activation."""
    return relative(torch.float32, problem.x.shape[1]) * magnitude + torch.finfo(torch.float32).tiny


def largest(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sort by the contract's order: NaN first, value descending, index ascending."""
    key = torch.where(pre_acts.isnan(), 0.0, pre_acts)
    by_value = key.sort(dim=1, descending=True, stable=True).indices
    is_nan = pre_acts.isnan().gather(1, by_value).int()
    by_nan = is_nan.sort(dim=1, descending=True, stable=True).indices
    indices = by_value.gather(1, by_nan)[:, :k]
    values = pre_acts.gather(1, indices)
    return torch.where(values <= 0, 0.0, values), indices


def check_largest(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    problem: Problem,
    precision: str,
    candidates: Tensor | None = None,  # [F] bool
) -> None:
    """Assert that a code holds the k largest of the candidates, in order, up to rounding.

    A chosen latent is right if its value reaches the k-th largest minus the error of rounding.
    """
    pre_acts, magnitude = pre_activations(problem, precision)
    slack = rounding(problem, magnitude)
    if candidates is not None:
        pre_acts = pre_acts.masked_fill(~candidates, -torch.inf)
        slack = slack.masked_fill(~candidates, 0.0)
    k = values.shape[1]
    assert values.dtype == torch.float32
    assert indices.dtype == torch.int32
    chosen = indices.long()
    assert all(len(set(row)) == k for row in chosen.tolist())
    kth = pre_acts.sort(dim=1, descending=True).values[:, k - 1 : k]
    reached = pre_acts.gather(1, chosen)
    assert (reached >= kth - 2 * slack.amax(1, keepdim=True)).all()
    close(
        values,
        reached.clamp_min(0),
        terms=problem.x.shape[1],
        magnitude=magnitude.gather(1, chosen),
    )
    check_order(values, indices)


def check_order(values: Tensor, indices: Tensor) -> None:
    """Assert values descending, and equal ones by ascending index (unless ReLU made them equal)."""
    first, second = values[:, :-1], values[:, 1:]
    assert (first >= second).all()
    tied = (first == second) & (first > 0)
    assert (indices[:, :-1][tied] < indices[:, 1:][tied]).all()
