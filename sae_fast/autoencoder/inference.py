"""Encoding and decoding with parameters of any floating dtype.

The kernels compute in float32. Parameters of 16 bits are widened for a call, and decoder rows are
gathered as they are. In float64, which is for checks, plain PyTorch computes everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from sae_fast import ops
from sae_fast.autoencoder.architecture import Engine, Weights
from sae_fast.autoencoder.decoding import NARROW
from sae_fast.ops import reference
from sae_fast.ops.reference.encode import relu as plain_relu
from sae_fast.ops.working_copies import float32_copy
from sae_fast.tensor_files import FLOATS

if TYPE_CHECKING:
    from sae_fast.autoencoder.model import SparseAutoencoder


class RunResult(NamedTuple):
    """The results of `SparseAutoencoder.run`.

    Attributes:
        x_hat: the reconstruction, in the shape, dtype and device of the activations.
        code: of the activations.
        losses: numbers by name; `total_loss_tensor` is 0-d, with its graph.
    """

    x_hat: Tensor
    code: ops.SparseCode
    losses: dict[str, float | Tensor]

    @property
    def loss(self) -> Tensor:
        """The total loss, 0-d, with its graph."""
        loss = self.losses["total_loss_tensor"]
        assert isinstance(loss, Tensor)
        return loss


def check_units(units: str) -> None:
    """Raise ValueError for units that there are not."""
    known = get_args(ops.Units)
    if units not in known:
        raise ValueError(f"units must be one of {', '.join(map(repr, known))}, got {units!r}")


def floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """Return a dtype that parameters can have, by its name or as torch's; None: float32.

    Raises ValueError for another one.
    """
    known = {str(kind).removeprefix("torch."): kind for kind in FLOATS}
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name}")
    return known[name]


def inference_weights(sae: SparseAutoencoder) -> Weights:
    """Return the weights of a model as its architecture encodes with them: not in 16 bits."""
    weights = sae.weights
    if sae.W_enc.dtype not in NARROW:
        return weights
    own = {
        name: float32_copy(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in weights.own.items()
    }
    return Weights(
        cast(nn.Parameter, float32_copy(weights.W_enc)),
        cast(nn.Parameter, float32_copy(weights.b_enc)),
        weights.W_dec,
        cast(nn.Parameter, float32_copy(weights.b_dec)),
        own,
        float32_copy(weights.input_bias),
    )


def inference_engine(sae: SparseAutoencoder, precision: str, dense_grad: bool) -> Engine:
    """Return the encoders and decoders for a model's dtype, and for the latents that it has."""
    is_wide = sae.W_enc.dtype == torch.float64
    return (Float64Engine if is_wide else sae.make_engine)(precision, dense_grad)


def is_vmapped(tensor: object) -> bool:
    """Return whether a tensor is one of the batches that `torch.func.vmap` runs over."""
    return isinstance(tensor, Tensor) and torch._C._functorch.is_batchedtensor(tensor)


def under_vmap(
    sae: SparseAutoencoder,
    x: Tensor,  # [..., D], batched by vmap
) -> Tensor:
    """Return the reconstruction of `x` from one call for all batches, as vmap expects it.

    A model takes any leading shape, and codes of different sizes could not be stacked.
    """
    x_hat: Tensor = _UnderVmap.apply(sae, x)  # type: ignore[no-untyped-call]
    return x_hat


class _UnderVmap(torch.autograd.Function):
    """The rule by which vmap calls a model: its ops are recorded outside of vmap, by autograd."""

    @staticmethod
    def forward(sae: SparseAutoencoder, x: Tensor) -> Tensor:
        return sae.forward_with_code(x)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, int], sae: SparseAutoencoder, x: Tensor
    ) -> tuple[Tensor, int]:
        return sae(x.movedim(in_dims[1], 0)), 0


class Float64Engine(Engine):
    """The encoders of inference in float64, by the reference ops; differentiable."""

    def encode_topk(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        k: int,
        *,
        selection: str = "topk",
        dead_mask: Tensor | None = None,  # [F] bool
        k_aux: int = 0,
    ) -> ops.SparseCode:
        """Return the k latents per token that `selection` names; raise ValueError for an AuxK."""
        if k_aux:
            raise ValueError("AuxK is not computed in float64: a training needs float32 parameters")
        tensors = (x, weights.W_enc, weights.b_enc, weights.input_bias)
        copies = (None, None, None)
        offsets = None
        if selection == "topk":
            values, indices, _, _ = reference.encode_topk(
                *tensors, k, self.precision, None, 0, *copies
            )
        elif selection == "batch_topk":
            values, indices, offsets, _, _ = reference.encode_batch_topk(
                *tensors, k, self.precision, None, 0, *copies
            )
        else:
            values, places = _CHOICES[selection](self._pre_acts(weights, x), k)
            indices = places.int()
        signed = selection == "abs_topk"
        d_sae = len(weights.W_enc)
        return ops.SparseCode(
            values, indices, d_sae, offsets, precision=self.precision, signed=signed
        )

    def encode_threshold(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        threshold: Tensor | None = None,  # [F]; None: 0
        *,
        b_enc: Tensor | None = None,  # [F]; None: the model's
    ) -> ops.SparseCode:
        """Return all latents whose pre-activation is above their threshold."""
        b_enc = weights.b_enc if b_enc is None else b_enc
        threshold = torch.zeros_like(b_enc) if threshold is None else threshold
        tensors = (x, weights.W_enc, b_enc, weights.input_bias, threshold)
        rest = (self.precision, None, None, None)
        values, indices, offsets = reference.encode_threshold(*tensors, *rest)
        return ops.SparseCode(
            values, indices, len(weights.W_enc), offsets, precision=self.precision
        )

    def encode_dense(
        self,
        weights: Weights,
        x: Tensor,  # [N, D], normalised
        *,
        b_enc: Tensor | None = None,  # [F]; None: the model's
        relu: bool = True,
    ) -> ops.DenseCode:
        """Return all latents of every token, [N, F], after ReLU or without it."""
        if b_enc is not None:
            raise ValueError("b_enc is the model's in float64")
        pre_acts = self._pre_acts(weights, x)
        values = plain_relu(pre_acts) if relu else pre_acts
        active = torch.count_nonzero(values.detach())
        return ops.DenseCode(values, active, self.precision, not relu, active)

    def _pre_acts(self, weights: Weights, x: Tensor) -> Tensor:
        """Return (x − b_dec) W_encᵀ + b_enc, [N, F]."""
        return torch.addmm(weights.b_enc, x - weights.input_bias, weights.W_enc.t())


def _largest_magnitudes(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    order = pre_acts.abs().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return pre_acts.gather(1, order), order


def _largest_of_groups(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    width = pre_acts.shape[1] // k
    largest, places = pre_acts.view(len(pre_acts), k, width).max(dim=2)
    return plain_relu(largest), places + torch.arange(k, device=places.device) * width


_CHOICES: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "abs_topk": _largest_magnitudes,
    "groupmax": _largest_of_groups,
}
