"""Other choices of a token's latents, made of existing ops: abs_topk, groupmax, and given ones."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_fast.ops.data_checks import check_usable
from sae_fast.ops.dense_product import dense_product
from sae_fast.ops.encode import encode_given, encode_selected
from sae_fast.ops.reference_encoder import chunks, relu
from sae_fast.ops.sparse_code import SparseCode


def encode_abs_topk(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    k: int,
    *,
    precision: str = "screened",
    dead_mask: Tensor | None = None,  # [F] bool
    k_aux: int | None = None,
    dense_grad: bool = True,
) -> SparseCode:
    """The k entries of (x − b_dec) W_encᵀ + b_enc largest in magnitude in every row, signed.

    No ReLU: a latent fires where its value is not 0. Rows are ordered by magnitude, descending;
    of equal magnitudes the positive ones come first, then the lower index. Likewise `aux`.

    They are among the k largest and the k largest of the negated row, so this is `encode_topk`
    twice: exact, at twice its cost. Arguments, gradients and errors as for `encode_topk`.
    """
    check_usable("encode_abs_topk", x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    tensors, options = (x, W_enc, b_enc, b_dec), (precision, dead_mask, k_aux, dense_grad)
    return encode_selected("encode_abs_topk", _abs_topk, tensors, k, *options, signed=True)


def _abs_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    precision: str,
    dead_mask: Tensor | None,
    k_aux: int,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, indices, aux_values, aux_indices."""
    options = (k, precision, dead_mask, k_aux, packed, stats, rounded)
    op = torch.ops.sae_fast.encode_topk.default
    upper = op(x, W_enc, b_enc, b_dec, *options)
    lower = op(-x, W_enc, -b_enc, -b_dec, *options)
    return *_larger(upper[:2], lower[:2], k), *_larger(upper[2:], lower[2:], k_aux)


def _larger(
    upper: tuple[Tensor, Tensor],  # values and indices, [N, k] each
    lower: tuple[Tensor, Tensor],  # of the negated pre-activations
    k: int,
) -> tuple[Tensor, Tensor]:
    """The k largest of both in magnitude, [N, k]."""
    values = torch.cat([upper[0], 0.0 - lower[0]], dim=1)  # 0 − 0 is not −0
    indices = torch.cat([upper[1], lower[1]], dim=1)
    order = values.abs().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, order), indices.gather(1, order)


def encode_groupmax(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    k: int,
    *,
    precision: str = "screened",
    dead_mask: Tensor | None = None,  # [F] bool
    k_aux: int | None = None,
    dense_grad: bool = True,
) -> SparseCode:
    """The largest of each of k groups of F / k consecutive latents in every row, then ReLU.

    Rows are ordered by index; of equal values the lower index is taken, and NaN before everything.
    An index stays listed where ReLU made its value 0. `aux`, arguments, gradients and errors as for
    `encode_topk`.

    Not fused: the pre-activations of some tokens at a time, 16 MiB of float32, come from
    `dense_product`. AuxK costs a second product where there are dead latents.
    """
    check_usable("encode_groupmax", x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    if k < 1 or len(W_enc) % k != 0:
        raise RuntimeError(f"encode_groupmax: k must divide d_sae = {len(W_enc)}, got {k}")
    tensors, options = (x, W_enc, b_enc, b_dec), (precision, dead_mask, k_aux, dense_grad)
    return encode_selected("encode_groupmax", _groupmax, tensors, k, *options)


def _groupmax(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    precision: str,
    dead_mask: Tensor | None,
    k_aux: int,
    *copies: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, indices, aux_values, aux_indices."""
    # Of the fused encoder only the dead latents' part is of use; its checks are for both.
    width, n_fused = len(W_enc) // k, x.size(0) if k_aux > 0 else 0
    arguments = (x[:n_fused], W_enc, b_enc, b_dec, 1, precision, dead_mask, k_aux, *copies)
    _, _, aux_values, aux_indices = torch.ops.sae_fast.encode_topk.default(*arguments)
    aux_shape = (x.size(0), k_aux)
    values, indices = x.new_empty(x.size(0), k), x.new_empty(x.size(0), k, dtype=torch.int32)
    starts = torch.arange(0, len(W_enc), width, dtype=torch.int32, device=x.device)
    for rows, pre_acts in _pre_activations(x, W_enc, b_enc, b_dec, precision):
        largest, place = pre_acts.view(-1, k, width).max(dim=2)
        values[rows], indices[rows] = relu(largest), starts + place.int()
    return values, indices, aux_values.view(aux_shape), aux_indices.view(aux_shape)


def encode_last(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    count: int,
    *,
    precision: str = "screened",
    dense_grad: bool = True,
) -> Tensor:
    """The pre-activations [N, count] of the last latents, with their sign: no ReLU.

    Made by `dense_product`. Gradients as for `encode_topk`; none comes from an entry that is
    exactly 0.

    Raises:
        RuntimeError: where `count` is not in [0, F].
    """
    check_usable("encode_last", x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec)
    if not 0 <= count <= len(W_enc):
        raise RuntimeError(f"encode_last: count must be 0 to d_sae = {len(W_enc)}, got {count}")
    options = (count, precision)
    return encode_given("encode_last", _last, (x, W_enc, b_enc, b_dec), options, dense_grad)


def _last(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, count: int, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, indices, and of an empty aux the same."""
    d_sae, n_tokens = len(W_enc), len(x)
    first = d_sae - count
    values = x.new_empty(n_tokens, count)
    for rows, pre_acts in _pre_activations(x, W_enc[first:], b_enc[first:], b_dec, precision):
        values[rows] = pre_acts
    latents = torch.arange(first, d_sae, dtype=torch.int32, device=x.device)
    indices = latents.expand(n_tokens, count).contiguous()
    return values, indices, x.new_empty(n_tokens, 0), indices.new_empty(n_tokens, 0)


def _pre_activations(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, precision: str
) -> Iterator[tuple[slice, Tensor]]:
    """(x − b_dec) W_encᵀ + b_enc, some rows at a time."""
    for rows in chunks(x.size(0), W_enc.size(0)):
        yield rows, dense_product(x[rows] - b_dec, W_enc.t(), precision, bias=b_enc)
