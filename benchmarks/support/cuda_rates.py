"""The highest rates of a CUDA device: products in chunks, gathers, copies, sorts and overlap.

The products are torch.mm with 16-bit operands and float32 results. Each call multiplies all of x
with a chunk of latents, into one buffer that every chunk reuses, so that W_enc is read once and the
results stay in the L2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.problem import Size
from benchmarks.support.tables import markdown_table
from benchmarks.support.timing import best_seconds, measure_cold

CHUNKS = (512, 1024, 2048, 4096, 8192)
LARGEST_BUFFER = 4 * 2**30
MEBI = 2**20
TABLES = {"16 MiB table": 16 * MEBI, "1 GiB table": 1024 * MEBI}
ROW_BYTES = (1536, 8192, 16384)
GATHERED_BYTES = 256 * MEBI
GATHERS_A_ROW = 32


def chunked_product(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D], of the same dtype
    columns: int,
) -> Callable[[], None]:
    """Return a call that multiplies x with all of W_enc, `columns` latents at a time."""
    n_tokens, columns = len(x), min(columns, len(W_enc))
    space = torch.empty(n_tokens * columns, device=x.device)
    pieces = [(part.t(), space[: n_tokens * len(part)]) for part in W_enc.split(columns)]  # type: ignore[no-untyped-call]

    def product() -> None:
        for part, out in pieces:
            torch.ops.aten.mm.dtype_out(x, part, torch.float32, out=out.view(n_tokens, -1))

    return product


def product_dtype(precision: str) -> torch.dtype:
    """Return the dtype of the operands in an encoder mode's product on a GPU."""
    return torch.float16 if precision == "fp16" else torch.bfloat16


def product_operands(size: Size, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return random x [N, D] and W_enc [F, D]; a GPU would multiply zeros faster."""
    shapes = [(size.n_tokens, size.d_in), (size.d_sae, size.d_in)]
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def product_seconds(size: Size, dtype: torch.dtype, device: torch.device) -> dict[int, float]:
    """Time the whole product [N, F]; return its seconds by the number of columns in a chunk."""
    x, W_enc = product_operands(size, dtype, device)
    fitting = [c for c in CHUNKS if c <= size.d_sae and 4 * c * size.n_tokens <= LARGEST_BUFFER]
    return {
        columns: best_seconds(chunked_product(x, W_enc, columns), device=device)
        for columns in fitting or [size.d_sae]
    }


def best_product(size: Size, precision: str, device: torch.device) -> tuple[float, str]:
    """Return the shortest time of the product at this size in seconds, and how it was reached."""
    dtype = product_dtype(precision)
    seconds = product_seconds(size, dtype, device)
    columns = min(seconds, key=lambda chunk: seconds[chunk])
    name = str(dtype).removeprefix("torch.")
    return seconds[columns], f"torch.mm, {name} to float32, {columns} columns a chunk"


def measure_device(size: Size, device: torch.device) -> dict[str, Any]:
    """Measure the rates that decide between designs of kernels at a size, for JSON.

    Rates are operations, bytes or elements a second.
    """
    flops = size.product_flops
    products = product_seconds(size, torch.bfloat16, device)
    return {
        "products": {str(columns): flops / seconds for columns, seconds in products.items()},
        "gathers": gather_rates(device),
        "copy": copy_rate(device),
        "topk": top_k_rates(size, device),
        "latent_major_seconds": sort_seconds(size, device),
        "overlap": overlap(size, device),
    }


def copy_rate(device: torch.device) -> float:
    """Measure a copy far larger than the L2, in bytes read and written a second."""
    source = torch.rand(512 * MEBI, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device=device)


def gather_rates(device: torch.device) -> dict[str, float]:
    """Measure sae_fast's decode on random rows, in bytes a second by row and table size."""
    rates = {}
    for place, table_bytes in TABLES.items():
        for row_bytes in ROW_BYTES:
            d_in = row_bytes // 2
            table = torch.randn(table_bytes // row_bytes, d_in, device=device, dtype=torch.bfloat16)
            shape = (GATHERED_BYTES // row_bytes // GATHERS_A_ROW, GATHERS_A_ROW)
            indices = torch.randint(len(table), shape, device=device, dtype=torch.int32)
            values = torch.rand(shape, device=device)
            decode = partial(torch.ops.sae_fast.decode, values, indices, None, table, None)
            seconds = best_seconds(decode, device=device)
            rates[f"{row_bytes} B rows, {place}"] = indices.numel() * row_bytes / seconds
    return rates


def top_k_rates(size: Size, device: torch.device) -> dict[str, float]:
    """Measure torch.topk on rows of d_sae elements, in elements a second by dtype."""
    rows = min(size.n_tokens, 2**28 // size.d_sae)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        pre_acts = torch.randn(rows, size.d_sae, device=device, dtype=dtype)
        seconds = best_seconds(partial(pre_acts.topk, size.k, sorted=False), device=device)
        rates[str(dtype).removeprefix("torch.")] = pre_acts.numel() / seconds
    return rates


def sort_seconds(size: Size, device: torch.device) -> float:
    """Time sae_fast's latent_major on one batch's code with a cold cache; return seconds."""
    shape = (size.n_tokens, size.k)
    indices = torch.randint(size.d_sae, shape, device=device, dtype=torch.int32)
    values = torch.rand(shape, device=device) + 0.1

    def sort() -> object:
        return torch.ops.sae_fast.latent_major(values, indices, None, size.d_sae)

    sort()
    return min(measure_cold(sort, device, 5).seconds for _ in range(3))


def overlap(size: Size, device: torch.device) -> dict[str, float]:
    """Time a bf16 product, a pass of Adam over W_dec, and both on two streams, in seconds."""
    x, W_enc = product_operands(size, torch.bfloat16, device)
    product = chunked_product(x, W_enc, min(2048, size.d_sae))
    parameter = torch.nn.Parameter(torch.rand(size.d_sae, size.d_in, device=device))
    parameter.grad = torch.rand_like(parameter)
    adam = torch.optim.Adam([parameter], fused=True)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            adam.step()
        product()
        torch.cuda.current_stream().wait_stream(side)

    calls: dict[str, Callable[[], object]] = {"product": product, "Adam": adam.step, "both": both}
    return {name: best_seconds(call, device=device) for name, call in calls.items()}


def device_section(name: str, rates: Mapping[str, Any]) -> list[str]:
    """Return the heading and the table of one size."""
    rows = [
        *(
            [f"bf16 product, {columns} columns a chunk", f"{rate / 1e12:.0f} TFLOP/s"]
            for columns, rate in rates["products"].items()
        ),
        *(
            [f"gather, {kind}", f"{rate / 1e12:.2f} TB/s"]
            for kind, rate in rates["gathers"].items()
        ),
        ["copy, read and written", f"{rates['copy'] / 1e12:.2f} TB/s"],
        *(
            [f"torch.topk, {dtype}", f"{rate / 1e9:.0f} G elements/s"]
            for dtype, rate in rates["topk"].items()
        ),
        ["latent_major", f"{rates['latent_major_seconds'] * 1e6:.0f} µs"],
        *(
            [f"beside each other: {what}", f"{seconds * 1e3:.3f} ms"]
            for what, seconds in rates["overlap"].items()
        ),
    ]
    return [f"## The device at {name}", markdown_table(["what", "measured"], rows)]
