"""Cases of `kernels.py`: each op beside equivalent PyTorch code, with the floor of its work.

N tokens, D = d_in, F = d_sae, K = k. The two results are compared before they are timed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.support.kernel_correlation_cases import correlation_cases
from benchmarks.support.kernel_dense_cases import dense_cases
from benchmarks.support.kernel_setting import TOLERANCE, Case, Setting
from benchmarks.support.kernel_update_cases import gradient_cases, weight_cases

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOW_PRECISION_TOLERANCE = 3e-2  # PyTorch rounds the pre-activations themselves to 16 bits
POOL_BATCHES = 16  # far more than the caches hold
PRODUCT = "bare product of the same precision"


def all_cases(setting: Setting) -> Iterator[Case]:
    """Yield every case of a size, built one at a time so that memory is freed between them."""
    yield from encode_cases(setting)
    yield from decode_cases(setting)
    yield from dense_cases(setting)
    yield from gradient_cases(setting)
    yield from weight_cases(setting)
    yield from correlation_cases(setting)
    yield from batch_cases(setting)


def encode_cases(s: Setting) -> Iterator[Case]:
    """Yield the cases of selection: in every precision, with AuxK's list, and by threshold."""
    for precision in ("screened", "fp32", "bf16", "fp16"):
        yield top_k_case(s, precision)
    yield dead_mask_case(s)
    yield threshold_case(s)


def top_k_case(s: Setting, precision: str) -> Case:
    """Return the case of encode_topk, against linear, ReLU and topk in PyTorch."""
    dtype = DTYPES.get(precision)

    def select() -> Tensor:
        return torch.relu(s.pre_acts(dtype)).topk(s.size.k, dim=-1, sorted=False).values

    def sorted_select() -> Tensor:
        return select().sort(descending=True).values

    return Case(
        f"encode_topk {precision}",
        lambda: s.encode(precision),
        select,
        s.products[precision],
        PRODUCT,
        lambda: (s.encode(precision)[0], sorted_select()),
        TOLERANCE if dtype is None else LOW_PRECISION_TOLERANCE,
        s.bare_product(precision),
    )


def dead_mask_case(s: Setting) -> Case:
    """Return the case of two selections from one product, as AuxK needs them."""
    dead = torch.arange(s.size.d_sae) % 2 == 1
    k_aux = max(1, min(s.size.d_in // 2, s.size.d_sae // 2))

    def select() -> Tensor:
        pre_acts = s.pre_acts(None)
        pre_acts.topk(s.size.k, dim=-1, sorted=False)
        return torch.relu(pre_acts.masked_fill(~dead, -torch.inf).topk(k_aux, dim=-1).values)

    return Case(
        f"encode_topk screened, half dead, k_aux={k_aux}",
        lambda: s.encode("screened", dead, k_aux),
        select,
        s.products["screened"],
        PRODUCT,
        lambda: (s.encode("screened", dead, k_aux)[2], select()),
        floor_call=s.bare_product("screened"),
    )


def threshold_case(s: Setting) -> Case:
    """Return the case of selecting all entries above a threshold, about k in a row."""
    w = s.weights
    threshold = s.code[0][:, -1].median().expand(s.size.d_sae).contiguous()

    def select() -> Tensor:
        pre_acts = s.pre_acts(None)
        rows, latents = ((pre_acts > threshold) & (pre_acts > 0)).nonzero(as_tuple=True)
        return pre_acts[rows, latents]

    def ours() -> Tensor:
        values: Tensor = s.ops.encode_threshold(
            s.x, w.W_enc, w.b_enc, w.b_dec, threshold, "screened", *s.packed("screened")
        )[0]
        return values

    return Case(
        "encode_threshold screened, about k a row",
        ours,
        select,
        s.products["screened"],
        PRODUCT,
        lambda: (ours().sort().values[-100:], select().sort().values[-100:]),
        floor_call=s.bare_product("screened"),
    )


def decode_cases(s: Setting) -> Iterator[Case]:
    """Yield the cases of decode, its backward, and both in one pass."""
    w, (values, indices), size = s.weights, s.code, s.size
    grad = s.x.flip(0).contiguous()
    leaf = values.clone().requires_grad_()
    bag = F.embedding_bag(indices, w.W_dec, per_sample_weights=leaf, mode="sum")
    decode, backward = s.ops.decode, s.ops.decode_backward

    def torch_decode() -> Tensor:
        decoded = F.embedding_bag(indices, w.W_dec, per_sample_weights=values, mode="sum")
        return decoded + w.b_dec

    def torch_backward() -> Tensor:
        return torch.autograd.grad(bag, leaf, grad, retain_graph=True)[0]

    yield Case(
        "decode",
        lambda: decode(values, indices, None, w.W_dec, w.b_dec),
        torch_decode,
        s.gather_floor(1, size.n_tokens * size.d_in),
        "N·K rows gathered, N·D written",
        lambda: (decode(values, indices, None, w.W_dec, w.b_dec), torch_decode()),
    )
    yield Case(
        "decode_backward",
        lambda: backward(grad, indices, None, w.W_dec),
        torch_backward,
        s.gather_floor(1),
        "N·K rows gathered",
        lambda: (backward(grad, indices, None, w.W_dec), torch_backward()),
    )
    yield reconstruct_case(s)


def reconstruct_case(s: Setting) -> Case:
    """Return the case of a squared error and its gradient from one pass over the rows."""
    w, (values, indices), size = s.weights, s.code, s.size

    def torch_reconstruct() -> Tensor:
        weights = values.detach().requires_grad_()
        decoded = F.embedding_bag(indices, w.W_dec, per_sample_weights=weights, mode="sum")
        residual = decoded.detach() + w.b_dec - s.x
        residual.square().sum(-1)
        return torch.autograd.grad(decoded, weights, residual)[0]

    def reconstruct() -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = s.ops.reconstruct(
            values, indices, None, w.W_dec, w.b_dec, s.x
        )
        return result

    return Case(
        "reconstruct (decode, loss, gradient of values)",
        reconstruct,
        torch_reconstruct,
        s.gather_floor(1, 2 * size.n_tokens * size.d_in),
        "N·K rows gathered once, x read, residual written",
        lambda: (reconstruct()[2], torch_reconstruct()),
    )


def batch_cases(s: Setting) -> Iterator[Case]:
    """Yield the case of gathering a batch from a shuffle pool of float16 rows."""
    n_tokens, d_in = s.x.shape
    pool = s.x.half().repeat(POOL_BATCHES, 1)
    generator = torch.Generator().manual_seed(4)
    order = torch.randperm(len(pool), generator=generator)[:n_tokens].to(s.device)
    mean, scale = s.weights.b_dec, 1.3
    batch, theirs = torch.empty_like(s.x), torch.empty_like(s.x)

    def gather() -> Tensor:
        s.ops.gather_rows_(batch, None, pool, order, mean, scale)
        return batch

    def torch_gather() -> Tensor:
        theirs.copy_(torch.index_select(pool, 0, order))
        return theirs.sub_(mean).mul_(scale)

    moved = pool.element_size() * n_tokens * d_in / s.rates.gather_tokens
    yield Case(
        "gather_rows_ (a batch, standardised)",
        gather,
        torch_gather,
        moved + 4 * n_tokens * d_in / s.rates.stream,
        "N rows gathered, N·D written",
        lambda: (gather(), torch_gather()),
    )
