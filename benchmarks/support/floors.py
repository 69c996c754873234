"""A lower bound of a step's time: the work it cannot avoid, at rates measured on this machine.

floor = product + gathers + optimiser
  product    2·N·D·F operations at the rate of the encoder's own micro-kernel
  gathers    N·K rows of W_dec once (decode; the gradient of the values reads the same rows),
             N·K rows of x and of the residual once each (both weight gradients), and in mode
             `screened` N·K rows of W_enc once (fp32 re-scoring of the winners)
  optimiser  weights and both moments read and written (24 bytes a parameter) and the
             low-precision copies written (2 bytes an entry of each copied matrix)
The gather rate is measured on the faster of PyTorch's decode and sae_fast's, which do little else.
Rows are fp32, in bf16 mode 2 bytes an entry. The floor leaves out everything else in a step:
selection, loss, sorting by latent, norms and biases. On a GPU the product is torch.mm in 16 bits
with float32 results (cuda_rates.py); parts that could run beside each other are added up.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.support import cuda_rates
from benchmarks.support.problem import CPU, Size, make_activations, make_weights
from benchmarks.support.timing import best_seconds

FORMULA = "2·N·D·F / product rate + bytes gathered / gather rate + bytes of Adam / stream rate"
LOW_PRECISION = ("bf16", "fp16")


@dataclass(frozen=True)
class Rates:
    """The highest rates measured at one size: operations or bytes a second."""

    product: float
    product_source: str
    gather_latents: float
    gather_tokens: float
    stream: float


@dataclass(frozen=True)
class Floor:
    """The least seconds that each part of a step can take."""

    product: float
    gathers: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of all parts, one after the other."""
        return self.product + self.gathers + self.optimizer

    def as_dict(self) -> dict[str, float]:
        """Return the parts and their total, for JSON."""
        return {**asdict(self), "total": self.total}


def step_floor(size: Size, precision: str, rates: Rates) -> Floor:
    """Return the floor of a step by the formula in this file's docstring."""
    row_bytes = size.d_in * (2 if precision in LOW_PRECISION else 4)
    latents = size.entries * row_bytes
    if precision == "screened":
        latents += size.entries * size.d_in * 4
    tokens = 2 * size.entries * row_bytes
    copies = 2.0 if precision in LOW_PRECISION else 1.0 if precision == "screened" else 0.0
    return Floor(
        product=size.product_flops / rates.product,
        gathers=latents / rates.gather_latents + tokens / rates.gather_tokens,
        optimizer=(24 + copies) * size.parameters / rates.stream,
    )


def measure_rates(size: Size, precision: str, device: torch.device = CPU) -> Rates:
    """Measure every rate that the floor of a size needs; this takes about a second."""
    product, source = product_rate(size, precision, device)
    latents, tokens = gather_rates(size, precision, device)
    rates = Rates(product, source, latents, tokens, stream_rate(size, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rates


def product_rate(size: Size, precision: str, device: torch.device = CPU) -> tuple[float, str]:
    """Measure the dense product; return its operations a second and the code that ran it."""
    seconds, source = bare_product_seconds(size, precision, device)
    return size.product_flops / seconds, source


def bare_product_seconds(
    size: Size, precision: str, device: torch.device = CPU
) -> tuple[float, str]:
    """Time the encoder's product alone, without selecting or storing anything.

    Returns the shortest time in seconds, and the code that reached it.
    """
    if device.type == "cuda":
        return cuda_rates.best_product(size, precision, device)
    if has_native_product():
        x, W_enc = make_activations(size, 1), make_weights(size).W_enc
        packed = torch.ops.sae_fast.pack_encoder(W_enc, precision)
        product = torch.ops.sae_fast_benchmark.encoder_product
        seconds = best_seconds(lambda: product(x, W_enc, precision, *packed))
        return seconds, "sae_fast's own"
    # Blocks that stay in the cache: the rate that PyTorch could reach without storing results.
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    rows, latents = min(size.n_tokens, 512), min(size.d_sae, 4096)
    x_block = torch.randn(rows, size.d_in).to(dtype)
    W_block = torch.randn(latents, size.d_in).to(dtype)
    out = torch.empty(rows, latents, dtype=dtype)
    seconds = best_seconds(lambda: torch.mm(x_block, W_block.T, out=out), repeats=10)
    blocks = size.n_tokens / rows * size.d_sae / latents
    return seconds * blocks, f"torch.mm in {str(dtype).removeprefix('torch.')}"


def has_native_product() -> bool:
    """Return whether the compiled module registers its product for benchmarks."""
    return has_native_ops() and hasattr(torch.ops.sae_fast_benchmark, "encoder_product")


def gather_rates(
    size: Size, precision: str = "fp32", device: torch.device = CPU
) -> tuple[float, float]:
    """Measure gathers of random rows, from the decoder and from a batch, in bytes a second.

    Rows are fp32, on a GPU in a 16-bit mode of that dtype, because these may fit into its L2.
    """
    low = device.type == "cuda" and precision in LOW_PRECISION
    dtype = cuda_rates.product_dtype(precision) if low else torch.float32
    generator = torch.Generator(device).manual_seed(2)
    shape = (size.n_tokens, size.k)
    weights = torch.rand(shape, generator=generator, device=device)
    bytes_gathered = size.entries * size.d_in * dtype.itemsize

    def rate(rows: int) -> float:
        table = torch.randn(rows, size.d_in, device=device).to(dtype)
        chosen = torch.randint(
            len(table), shape, generator=generator, dtype=torch.int32, device=device
        )
        bag_weights = weights.to(dtype)

        def gather() -> Tensor:
            return F.embedding_bag(chosen, table, per_sample_weights=bag_weights, mode="sum")

        def own() -> Tensor:
            decoded: Tensor = torch.ops.sae_fast.decode(weights, chosen, None, table, None)
            return decoded

        calls = [gather, own] if has_native_ops() else [gather]
        return bytes_gathered / min(best_seconds(call, device=device) for call in calls)

    with torch.no_grad():
        return rate(size.d_sae), rate(size.n_tokens)


def stream_rate(size: Size, device: torch.device = CPU) -> float:
    """Measure reading and writing arrays as large as the parameters, in bytes a second."""
    count = size.parameters
    a, b, out = (torch.rand(count, device=device) for _ in range(3))
    seconds = best_seconds(lambda: torch.add(a, b, alpha=2.0, out=out), device=device)
    triad = 12 * count / seconds
    parameter = torch.nn.Parameter(a)
    parameter.grad = b
    adam = torch.optim.Adam([parameter], fused=True)
    return max(triad, 28 * count / best_seconds(lambda: adam.step(), device=device))


def has_native_ops() -> bool:
    """Return whether sae_fast's compiled kernels can be loaded."""
    try:
        from sae_fast import _C  # noqa: F401
    except ImportError:
        return False
    return True
