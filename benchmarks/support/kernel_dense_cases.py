"""Cases of `kernels.py`: the products of a step that works on all latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.support.kernel_setting import TOLERANCE, Case, Setting
from sae_fast.ops.native import build_info

LOW_PRECISION_TOLERANCE = 3e-2  # PyTorch rounds the sums themselves to bfloat16


def dense_cases(s: Setting) -> Iterator[Case]:
    """Yield the cases of dense_product: encoder with ReLU, decoder and a weight gradient.

    Half of the latents are active.
    """
    w = s.weights
    code = torch.relu(s.pre_acts(None))
    centred = s.x - w.b_dec
    for precision in ("float32", "bf16"):
        yield _case(s, "encoder", precision, centred, w.W_enc.t(), w.b_enc)
        yield _case(s, "decoder", precision, code, w.W_dec, None)
        yield _case(s, "gradient of W_dec", precision, code.t(), centred, None)


def _case(
    s: Setting,
    name: str,
    precision: str,
    left: Tensor,  # [M, K]
    right: Tensor,  # [K, P]
    bias: Tensor | None,  # [P], with ReLU
) -> Case:
    is_low = precision == "bf16"
    dtype = torch.bfloat16 if is_low else torch.float32
    mode = "bf16" if is_low else "screened"

    def ours() -> Tensor:
        product: Tensor = s.ops.dense_product(left, right, bias, bias is not None, mode)
        return product

    def theirs() -> Tensor:
        product = left.to(dtype) @ right.to(dtype)
        return product if bias is None else torch.relu_(product.add_(bias))

    compare: Callable[[], tuple[Tensor, Tensor]] = lambda: (ours(), theirs())  # noqa: E731
    floor, floor_of = s.products["fp32"], "bare product of the same precision"
    if is_low:
        floor = s.products["bf16"]
    elif build_info().get("instruction_set") == "amx":
        # AMX computes a float32 product as six products of bytes, at twice the rate of bfloat16.
        floor, floor_of = (
            3 * s.products["bf16"],
            "six products of bytes, three times the bf16 product",
        )
    tolerance = LOW_PRECISION_TOLERANCE if is_low else TOLERANCE
    return Case(
        f"dense_product {precision} ({name})", ours, theirs, floor, floor_of, compare, tolerance
    )
