"""The table of tolerances: the allowed distance of a float32 result from the float64 oracle.

A sum of n products is off by at most n·ε times the sum of their magnitudes, and in practice by
about √n·ε; the table allows the factors below. Tests compare with `close`, and never loosen it.
"""

import math

import torch
from torch import Tensor

# Unit roundoff of the data's dtype: float32 sums, or a result rounded at the end.
EPSILON = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-9,
    torch.float16: 2.0**-12,
}
# Factors of a sum's rounding error, √n ε for n terms, and of the few operations around it.
SUM_FACTOR = 4.0
ELEMENTWISE_FACTOR = 8.0


def relative(dtype: torch.dtype, terms: int = 1) -> float:
    """Return the tolerance of a sum of `terms` terms, relative to the magnitude of the terms."""
    sums = SUM_FACTOR * math.sqrt(max(terms, 1)) * EPSILON[torch.float32]
    return sums + ELEMENTWISE_FACTOR * EPSILON[dtype]


def close(
    actual: Tensor,
    expected: Tensor,  # float64
    *,
    terms: int = 1,
    magnitude: Tensor | float | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Assert that a result equals the oracle within the table's tolerance.

    magnitude: of the terms that were added up, by default of the result; broadcast to it.
    dtype: what the result was rounded to, by default its own.
    """
    assert actual.shape == expected.shape
    scale = expected.double().abs() if magnitude is None else torch.as_tensor(magnitude).double()
    allowed = relative(dtype or actual.dtype, terms) * scale + torch.finfo(torch.float32).tiny
    difference = (actual.double() - expected.double()).abs()
    same = (actual.double() == expected.double()) | (actual.isnan() & expected.isnan())
    wrong = ~(same | (difference <= allowed))
    worst = (difference / allowed)[wrong]
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} off, worst {worst.max():.3g}x"
