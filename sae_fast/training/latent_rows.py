"""`--mesh latents=R`: each of R processes holds and updates a block of the latents.

A process has the rows of W_enc, b_enc and W_dec that belong to its latents, with their moments and
counters, and all of b_dec. All of them read the same rows of activations. A code is selected from
the candidates of all: the k largest of each process, gathered in the order of the latents, so that
the choice is the one of a process alone, equal values included. Each then has the entries of its
own latents, and adds their part of the reconstruction; the parts are summed in the order of the
processes. What is gathered for N tokens, N · (8 k + 4 d_in) bytes a process, does not depend on
d_sae.

Gradients of own latents are complete where they are made, because every process computes the same
loss from the same reconstruction. Only the gradient of b_dec through the encoder, and the norm of
all gradients, are summed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sae_fast import ops
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.architecture import SELECTIONS, Engine, Weights
from sae_fast.autoencoder.architectures import make_architecture
from sae_fast.autoencoder.loss_terms import LossTerm
from sae_fast.autoencoder.thresholded import TOKENS
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.distributed.ranks import Ranks
from sae_fast.ops.dense_product import linear
from sae_fast.ops.encode import encode_selected
from sae_fast.ops.full_precision import matmul
from sae_fast.training.divided_selection import largest_of_all
from sae_fast.training.labels import label_columns, needs_sequences

_ARCHITECTURES = ("topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated")
_OF_LATENTS = ("W_enc", "b_enc", "W_dec", "tokens_since_fired")
_TYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def check_divisible(sae: SAEConfig, train: TrainConfig, loss_terms: Sequence[LossTerm]) -> None:
    """Raise ValueError, in one line, for a training whose latents cannot be divided."""
    given = {
        f"arch {sae.arch}": sae.arch not in _ARCHITECTURES,
        f"activation {sae.activation}": sae.activation != "topk",
        "a skip connection": sae.skip_connection,
        "decorrelation_coeff": sae.decorrelation_coeff > 0,
        "labels": bool(label_columns(sae)),
        "temporal_smoothness_coeff": needs_sequences(sae),
        "sparsity_norm_p other than 1": sae.sparsity_norm_p != 1,
        "loss_terms": bool(loss_terms),
        "average_decay": train.average_decay > 0,
        f"optimizer {train.optimizer}": train.optimizer == "schedule_free_signum",
        "--no-fused": not train.fused,
        f"amp {train.amp}": train.amp != "off",
    }
    for name, is_given in given.items():
        if is_given:
            raise ValueError(f"mesh = {train.mesh!r} does not divide a training with {name}")


class LatentRows:
    """The latents that a process holds: a block of them, or all where one process has the model.

    Args:
        ranks: the processes that hold the latents of one model together; ALONE: this one has all,
            and nothing here does anything.
        config: of the whole model.

    Attributes:
        first: number of the first latent of this process.
        end: number after its last latent.
        has_all: whether it has all latents.
    """

    def __init__(self, ranks: Ranks, config: SAEConfig) -> None:
        self.ranks = ranks
        self.config = config
        self.d_sae = config.d_sae
        bounds = [self.d_sae * number // ranks.size for number in range(ranks.size + 1)]
        self.first, self.end = bounds[ranks.rank], bounds[ranks.rank + 1]
        self.has_all = ranks.size == 1
        self._names = set() if self.has_all else {*_OF_LATENTS, *_own_names(config)}

    def engine(
        self,
        precision: str,
        dense_grad: bool,
        selections: Mapping[str, Callable[..., ops.SparseCode]] = SELECTIONS,
    ) -> Engine:
        """Return the encoders and decoders of this process; `selections` where it has all."""
        if self.has_all:
            return Engine(precision, dense_grad, selections)
        return LatentEngine.of(self, precision, dense_grad)

    def is_divided(self, name: str, tensor: Tensor) -> bool:
        """Return whether this process has some rows only of a tensor of a model or a state."""
        return tensor.dim() > 0 and any(part in self._names for part in name.split("."))

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors by name, of divided ones the rows of this process."""
        return {
            name: tensor[self.first : self.end] if self.is_divided(name, tensor) else tensor
            for name, tensor in tensors.items()
        }

    def shared(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that all processes have."""
        return {name: t for name, t in tensors.items() if not self.is_divided(name, t)}

    def divided(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of which this process has some rows only."""
        return {name: t for name, t in tensors.items() if self.is_divided(name, t)}

    def new_model(self) -> SparseAutoencoder:
        """Return a new model with the rows of this process."""
        sae = SparseAutoencoder(self.config, latents=range(self.first, self.end))
        if not self.has_all:
            sae.make_engine = self.engine
        return sae

    @torch.no_grad()
    def keep_(self, sae: SparseAutoencoder) -> None:
        """Leave of a whole model the rows of this process, in memory of their own."""
        tensors = dict([*sae.named_parameters(), *sae.named_buffers()])
        for name, rows in self.of(tensors).items():
            tensors[name].data = rows.clone()
        if not self.has_all:
            sae.make_engine = self.engine

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, in their order; without a gradient."""
        return self.ranks.sum_in_order(tensor.detach())

    def of_all(self, code: ops.Code) -> ops.Code:
        """Return a code with the values of all processes, for what only they decide."""
        if self.has_all:
            return code
        assert isinstance(code, ops.SparseCode)
        parts = [parts[0] for _, parts in self.ranks.gather(None, [code.values.detach()])]
        values = torch.cat([part.flatten() for part in parts])
        return ops.SparseCode(values, torch.zeros_like(values).int(), code.d_sae, code.offsets)

    def observed(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return sums over the tokens of a code, summed over the latents of all processes."""
        if self.has_all:
            return dict(sums)
        names = [name for name in sums if name != TOKENS]
        found = [parts for _, parts in self.ranks.gather(None, [sums[name] for name in names])]
        totals = [torch.stack(parts).sum(0) for parts in zip(*found, strict=True)]
        return {**sums, **dict(zip(names, totals, strict=True))}

    def save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors into one safetensors file, each process its rows; all call it.

        The path is the one of the first process. Raises OSError, or RankError where another process
        cannot write.
        """
        path = Path(self.ranks.values(str(path))[0])
        header, places, size = self._layout(tensors)
        with self.ranks.agreement():
            if self.ranks.is_first:
                path.unlink(missing_ok=True)
                with path.open("xb") as file:
                    file.write(header)
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk is known now
        with self.ranks.agreement(), path.open("r+b") as file:
            for name, tensor in tensors.items():
                start = places[name]
                if self.is_divided(name, tensor):
                    start += self.first * prod(tensor.shape[1:]) * tensor.element_size()
                elif not self.ranks.is_first:
                    continue
                file.seek(start)
                flat = tensor.detach().cpu().contiguous().view(-1)
                file.write(flat.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def _layout(self, tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
        """Return the header of a file of whole tensors, where each begins, and the file's size."""
        described, places, end = {}, {}, 0
        # Larger numbers first, so that all are aligned.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        for name in names:
            tensor = tensors[name]
            shape = list(tensor.shape)
            if self.is_divided(name, tensor):
                shape[0] = self.d_sae
            start, end = end, end + prod(shape) * tensor.element_size()
            places[name] = start
            described[name] = {
                "dtype": _TYPES[tensor.dtype],
                "shape": shape,
                "data_offsets": [start, end],
            }
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        places = {name: place + len(header) for name, place in places.items()}
        return header, places, end + len(header)


def _own_names(config: SAEConfig) -> Iterator[str]:
    """Yield the names of an architecture's parameters and buffers that have a number a latent."""
    architecture = make_architecture(config)
    for name, tensor in (architecture.parameters() | architecture.buffers()).items():
        if tensor.dim() > 0:
            yield name


class LatentEngine(Engine):
    """The encoders and decoders of a process that holds some of the latents."""

    rows: LatentRows

    @classmethod
    def of(cls, rows: LatentRows, precision: str, dense_grad: bool) -> LatentEngine:
        """Return the engine of a process."""
        select: dict[str, Callable[..., ops.SparseCode]] = {
            name: partial(_encode, rows, op)
            for name, op in (("topk", _topk), ("batch_topk", _batch_topk))
        }
        engine = cls(precision, dense_grad, select)
        engine.rows = rows
        return engine

    @property
    def has_all_latents(self) -> bool:
        """Whether the codes have all latents: here only the ones of this process."""
        return False

    def count_latents(self, mask: Tensor) -> Tensor:
        """Return how many latents are in a mask, of all processes, 0-d."""
        return self.rows.sum(mask.sum())

    def total(self, part: Tensor) -> Tensor:
        """Return the sum of what each process has computed of its latents."""
        if not part.is_floating_point():
            return self.rows.sum(part)
        total: Tensor = _Sum.apply(part, self.rows)  # type: ignore[no-untyped-call]
        return total

    def mean(self, per_latent: Tensor) -> Tensor:
        """Return the mean over the latents of all processes, 0-d."""
        return self.rows.sum(per_latent.detach().sum()) / self.rows.d_sae

    def joined(self, per_latent: Tensor) -> Tensor:
        """Return a number of each latent [F], of the latents of all processes."""
        found = self.rows.ranks.gather(None, [per_latent.detach()])
        return torch.cat([parts[0] for _, parts in found])

    def mean_squared_cosine(self, W_dec: Tensor) -> Tensor:
        """Return the mean of (ŵ_i·ŵ_j)² over pairs of different latents of all processes, 0-d.

        It is ‖Ŵᵀ Ŵ‖² without the squares of ŵ_i·ŵ_i, divided by the number of pairs.

        Args:
            W_dec: [F, D], the rows of this process.
        """
        unit = functional.normalize(W_dec.detach(), dim=1)
        gram = self.rows.sum(matmul(unit.t(), unit))
        own = self.rows.sum(unit.double().square().sum(1).square().sum())
        total = gram.double().square().sum() - own
        return total / max(self.rows.d_sae * (self.rows.d_sae - 1), 1)

    def decode(
        self,
        code: ops.SparseCode | Tensor,  # a tensor: [N, F]
        W_dec: Tensor,  # [F, D]
        b_dec: Tensor,  # [D]
    ) -> Tensor:
        """Return what `Engine.decode` does, summed over the latents of all processes."""
        return self.total(super().decode(code, W_dec, torch.zeros_like(b_dec))) + b_dec

    def encode_topk(self, weights: Weights, *given: Any, **options: Any) -> ops.SparseCode:
        """Return what `Engine.encode_topk` does, of the latents of this process."""
        return super().encode_topk(self._with_bias(weights), *given, **options)

    def encode_threshold(self, weights: Weights, *given: Any, **options: Any) -> ops.SparseCode:
        """Return what `Engine.encode_threshold` does, of the latents of this process."""
        return super().encode_threshold(self._with_bias(weights), *given, **options)

    def encode_dense(self, weights: Weights, *given: Any, **options: Any) -> ops.DenseCode:
        """Return what `Engine.encode_dense` does, of the latents of this process."""
        return super().encode_dense(self._with_bias(weights), *given, **options)

    def reconstruct(
        self,
        code: ops.Code,
        W_dec: Tensor,  # [F, D]
        b_dec: Tensor | None,  # [D]
        target: Tensor,  # [N, D]
    ) -> ops.Reconstruction:
        """Return the residual with the latents of all processes, and its squares' sum per token."""
        if isinstance(code, ops.SparseCode):
            part = ops.decode(code, W_dec, dense_grad=self.dense_grad)
        else:
            part = ops.reconstruct(code, W_dec, None, torch.zeros_like(target)).residual
        residual = self.total(part) - target
        if b_dec is not None:
            residual = residual + b_dec
        return ops.Reconstruction(residual, residual.square().sum(1))

    def reconstruct_prefixes(
        self,
        code: ops.SparseCode,
        W_dec: Tensor,  # [F, D]
        b_dec: Tensor,  # [D]
        target: Tensor,  # [N, D]
        prefixes: tuple[int, ...],
    ) -> ops.PrefixReconstruction:
        """Return the whole residual and the squared errors [N, G] of prefixes of all latents."""
        group = torch.zeros_like(code.indices)
        for prefix in prefixes[:-1]:
            group += code.indices + self.rows.first >= prefix
        pieces = []
        for number in range(len(prefixes)):
            values = torch.where(group == number, code.values, 0)
            piece = ops.SparseCode(values, code.indices, code.d_sae, code.offsets)
            pieces.append(ops.decode(piece, W_dec, dense_grad=self.dense_grad))
        x_hat = self.total(torch.stack(pieces)).cumsum(0)
        residuals = x_hat + b_dec - target
        return ops.PrefixReconstruction(residuals[-1], residuals.square().sum(2).t())

    def _with_bias(self, weights: Weights) -> Weights:
        """Return weights whose input bias gets the gradients of all processes."""
        bias: Tensor = _SumOfGradients.apply(  # type: ignore[no-untyped-call]
            weights.input_bias, self.rows
        )
        return weights._replace(input_bias=bias)


class _Sum(torch.autograd.Function):
    """The sum over processes; each part gets the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, rows: LatentRows) -> Tensor:
        return rows.sum(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumOfGradients(torch.autograd.Function):
    """A tensor as it is; its gradient is the sum over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: LatentRows) -> Tensor:
        ctx.rows = rows
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.sum(grad), None


def _encode(
    rows: LatentRows,
    select: Callable[..., tuple[Tensor, ...]],
    x: Tensor,  # [N, D]
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    **options: Any,
) -> ops.SparseCode:
    """Return the entries of own latents in the code that all processes select."""
    tensors = (x, W_enc, b_enc, b_dec)
    op = partial(select, rows)
    # Signed: a dead latent has a gradient straight through ReLU, which is applied here.
    found = encode_selected("encode_topk", op, tensors, k, **options, signed=True)
    aux = found.aux
    if aux is not None:
        values = aux.values + (aux.values.relu() - aux.values).detach()
        aux = _unsigned(aux, values, None)
    return _unsigned(found, found.values, aux)


def _unsigned(code: ops.SparseCode, values: Tensor, aux: ops.SparseCode | None) -> ops.SparseCode:
    return ops.SparseCode(
        *(values, code.indices, code.d_sae, code.offsets, aux, code.precision),
        made_key=code.key,
    )


def _topk(
    rows: LatentRows,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    precision: str,
    dead_mask: Tensor | None,
    k_aux: int,
    *copies: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return values and indices [N, k], then of aux; 0 where another process has the latent."""
    op = torch.ops.sae_fast.encode_topk.default
    most = min(k, len(W_enc))
    values, indices, *_ = op(x, W_enc, b_enc, b_dec, most, precision, None, 0, *copies)
    aux = _dead(rows, x, W_enc, b_enc, b_dec, dead_mask, k_aux)
    return *_merged(rows, values, indices, k), *aux


def _dead(
    rows: LatentRows,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    dead_mask: Tensor | None,
    k_aux: int,
) -> tuple[Tensor, Tensor]:
    """Return values before ReLU and indices [N, k_aux] of the best dead latents."""
    if dead_mask is None or k_aux == 0:
        return x.new_empty(len(x), 0), x.new_empty(len(x), 0, dtype=torch.int32)
    dead = dead_mask.nonzero().flatten()
    pre_acts = linear(x - b_dec, W_enc[dead], b_enc[dead])
    order = pre_acts.sort(dim=1, descending=True, stable=True).indices[:, :k_aux]
    return _merged(rows, pre_acts.gather(1, order), dead[order].int(), k_aux)


def _merged(
    rows: LatentRows,
    values: Tensor,  # [N, K], descending
    indices: Tensor,  # [N, K] int32
    k: int,
) -> tuple[Tensor, Tensor]:
    """Return the k largest of all processes, [N, k], as 0 where another process has the latent.

    Of equal values the lower index comes first: each process has them in this order, and the
    processes are in the order of their latents.
    """
    found = [parts for _, parts in rows.ranks.gather(None, [values])]
    widths = [parts[0].size(1) for parts in found]
    before = sum(widths[: rows.ranks.rank])
    everyone = torch.cat([parts[0] for parts in found], dim=1)
    largest, places = everyone.sort(dim=1, descending=True, stable=True)
    largest, places = largest[:, :k], places[:, :k] - before
    is_own = (places >= 0) & (places < values.size(1))
    if values.size(1) == 0:
        return torch.zeros_like(largest), torch.zeros_like(places).int()
    chosen = indices.gather(1, places.clamp(0, values.size(1) - 1))
    return torch.where(is_own, largest, 0), torch.where(is_own, chosen, 0)


def _batch_topk(
    rows: LatentRows,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    precision: str,
    dead_mask: Tensor | None,
    k_aux: int,
    *copies: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return values, indices and offsets of own latents among the N·k largest, then the aux."""
    n_rows, budget = len(x), len(x) * k
    op = torch.ops.sae_fast.encode_batch_topk.default
    most = min(k, len(W_enc))
    values, indices, offsets, *_ = op(x, W_enc, b_enc, b_dec, most, precision, None, 0, *copies)
    first = 0, rows.first
    values, tokens, latents = largest_of_all(
        rows.ranks, values, indices, offsets, first, rows.d_sae, budget
    )
    own = (latents >= rows.first) & (latents < rows.end)
    values, indices, tokens = values[own], latents[own] - rows.first, tokens[own]
    ends = torch.bincount(tokens, minlength=n_rows).cumsum(0)
    aux = _dead(rows, x, W_enc, b_enc, b_dec, dead_mask, k_aux)
    return values, indices, torch.nn.functional.pad(ends, (1, 0)), *aux
