"""The encoder ops in plain PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_fast.ops.full_precision import matmul
from sae_fast.ops.reference.chunks import chunks

ROUNDED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pack_encoder(W_enc: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the working copies of the encoder, which the reference leaves empty."""
    return W_enc.new_empty(0), W_enc.new_empty(0), W_enc.new_empty(0)


def encode_topk(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    k: int,
    precision: str,
    dead_mask: Tensor | None,  # [F] bool
    k_aux: int,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the k largest pre-activations of a row, and the k_aux largest of dead latents."""
    n_rows = x.size(0)
    values = x.new_empty(n_rows, k)
    indices = x.new_empty(n_rows, k, dtype=torch.int32)
    aux = _AuxCode(x, dead_mask, k_aux)
    for rows, pre_acts in pre_activations(x, W_enc, b_enc, b_dec, precision):
        top, chosen = _largest(pre_acts, k)
        values[rows], indices[rows] = relu(top), chosen.int()
        aux.fill(rows, pre_acts)
    return values, indices, aux.values, aux.indices


def encode_batch_topk(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    k: int,
    precision: str,
    dead_mask: Tensor | None,  # [F] bool
    k_aux: int,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the N k largest positive pre-activations as CSR rows, and aux as encode_topk does."""
    n_rows, d_sae = x.size(0), W_enc.size(0)
    budget = n_rows * k
    values, places = x.new_empty(0), x.new_empty(0, dtype=torch.int64)
    aux = _AuxCode(x, dead_mask, k_aux)
    for rows, pre_acts in pre_activations(x, W_enc, b_enc, b_dec, precision):
        keep = (pre_acts > 0) | pre_acts.isnan()
        values = torch.cat([values, pre_acts[keep]])
        places = torch.cat([places, keep.flatten().nonzero().flatten() + rows.start * d_sae])
        # Stable, so that the first places win among equal values; NaN sorts before everything.
        best = values.sort(descending=True, stable=True).indices[:budget].sort().values
        values, places = values[best], places[best]
        aux.fill(rows, pre_acts)
    counts = torch.bincount(places // d_sae, minlength=n_rows)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    missing = budget - values.numel()
    if missing > 0:
        values = torch.cat([values, values.new_zeros(missing)])
        places = torch.cat([places, places.new_zeros(missing)])
        offsets[-1] = budget
    return values, (places % d_sae).int(), offsets, aux.values, aux.indices


def full_batches(like: Tensor) -> Tensor:
    """Return the number of batches of which every score was computed because of room: none."""
    return torch.zeros((), dtype=torch.int64, device=like.device)


def encode_threshold(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    threshold: Tensor,  # [F]
    precision: str,
    packed: Tensor | None,
    stats: Tensor | None,
    rounded: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pre-activations above threshold and above 0, and every NaN, as CSR rows."""
    values = [x.new_empty(0)]
    indices = [x.new_empty(0, dtype=torch.int32)]
    counts = x.new_zeros(x.size(0), dtype=torch.int64)
    for rows, pre_acts in pre_activations(x, W_enc, b_enc, b_dec, precision):
        keep = ((pre_acts > threshold) & (pre_acts > 0)) | pre_acts.isnan()
        values.append(pre_acts[keep])
        indices.append(keep.nonzero()[:, 1].int())
        counts[rows] = keep.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return torch.cat(values), torch.cat(indices), offsets


def pre_activations(
    x: Tensor,  # [N, D]
    W_enc: Tensor,  # [F, D]
    b_enc: Tensor,  # [F]
    b_dec: Tensor,  # [D]
    precision: str,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of tokens and their pre-activations (x - b_dec) W_encᵀ + b_enc, [., F]."""
    rounded = ROUNDED_DTYPES.get(precision)
    weights = W_enc if rounded is None else W_enc.to(rounded).to(W_enc.dtype)
    for rows in chunks(x.size(0), W_enc.size(0)):
        centred = x[rows] - b_dec
        if rounded is not None:
            centred = centred.to(rounded).to(x.dtype)
        yield rows, matmul(centred, weights.t()).add_(b_enc)


def relu(values: Tensor) -> Tensor:
    """Return ReLU of values of any shape; NaN stays, and no result is -0."""
    return torch.where((values > 0) | values.isnan(), values, torch.zeros_like(values))


class _AuxCode:
    """The k_aux largest among the dead latents of every row; (0, 0) where there are fewer."""

    def __init__(self, x: Tensor, dead_mask: Tensor | None, k_aux: int) -> None:
        self.values = x.new_zeros(x.size(0), k_aux)
        self.indices = x.new_zeros(x.size(0), k_aux, dtype=torch.int32)
        self._dead = None if dead_mask is None else dead_mask.nonzero().flatten()

    def fill(self, rows: slice, pre_acts: Tensor) -> None:
        """Write the entries of these tokens, whose pre-activations are [., F]."""
        k_aux = self.values.size(1)
        if self._dead is None or k_aux == 0:
            return
        width = min(k_aux, self._dead.numel())
        top, chosen = _largest(pre_acts[:, self._dead], width)
        self.values[rows, :width] = relu(top)
        self.indices[rows, :width] = self._dead[chosen].int()


def _largest(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of a row: values descend, NaN first, equal ones by ascending index."""
    pre_acts = pre_acts + 0.0  # -0 becomes +0: a radix sort would tell them apart
    values, indices = pre_acts.topk(k, dim=1)
    if k == 0:
        return values, indices
    # topk breaks ties as it likes. Where exactly k values reach the k-th, the set is right and only
    # its order is open; the other rows go through a stable sort of the whole row.
    indices, by_index = indices.sort(dim=1)
    values, order = values.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    indices = indices.gather(1, order)
    unsure = (~(pre_acts < values[:, -1:])).sum(1) != k  # NaN is not below anything
    if bool(unsure.any()):
        everything, order = pre_acts[unsure].sort(dim=1, descending=True, stable=True)
        values[unsure], indices[unsure] = everything[:, :k], order[:, :k]
    return values, indices
