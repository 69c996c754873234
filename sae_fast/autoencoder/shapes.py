"""Checks of the shapes and kinds of what is given to a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_fast.ops import Code

if TYPE_CHECKING:
    from sae_fast.autoencoder.model import SparseAutoencoder


def rows_of(
    sae: SparseAutoencoder,
    x: Tensor,  # [..., width]
    name: str = "x",
    width: str = "d_in",
) -> Tensor:
    """Return `x` as a matrix on the parameters' device, [N, width].

    It is float32, or float64 where the parameters are.

    Args:
        sae: the model.
        x: activations, targets or a dense code.
        name: of `x` in errors.
        width: the setting of the model that says how wide `x` must be.

    Raises ValueError for another width and on the meta device, and TypeError for what is no
    dense tensor of real numbers.
    """
    require_tensor(x, name)
    _require_dense(x, name)
    columns: int = len(sae.W_dec) if width == "d_sae" else getattr(sae.config, width)
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"{name} must have {width} = {columns} columns, got shape {tuple(x.shape)}"
        )
    if x.is_complex():
        raise TypeError(f"{name} must be real numbers, got {x.dtype}")
    if x.device.type == "meta" and sae.W_enc.device.type != "meta":
        raise ValueError(
            f"{name} must hold numbers, got a tensor on the meta device: load the weights of the "
            "model that it comes from"
        )
    dtype = torch.float64 if sae.W_enc.dtype == torch.float64 else torch.float32
    return x.reshape(-1, columns).to(device=sae.W_enc.device, dtype=dtype)


def output_rows(
    sae: SparseAutoencoder,
    x: Tensor,  # [..., D], of a transcoder [..., d_out]
    name: str,
) -> Tensor:
    """Reshape targets to [N, d_out] (d_in for an autoencoder) and check their width."""
    return rows_of(sae, x, name, "d_out" if sae.config.transcoder else "d_in")


def rows_of_both(sae: SparseAutoencoder, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """Return activations, or targets, and their reconstruction as matrices of one shape."""
    require_tensor(x, "x")
    require_tensor(x_hat, "x_hat")
    if x.shape != x_hat.shape:
        shapes = tuple(x.shape), tuple(x_hat.shape)
        raise ValueError(f"x_hat must have the shape of x, {shapes[0]}, got {shapes[1]}")
    return output_rows(sae, x, "x"), output_rows(sae, x_hat, "x_hat")


def target_of(
    sae: SparseAutoencoder,
    x: Tensor,  # [N, D]
    targets: Tensor | None,  # [N, d_out]
) -> Tensor:
    """Return the target of a batch: x, or a transcoder's targets [N, d_out].

    Raises ValueError where a transcoder has no targets, or not one a token, or another model has
    some.
    """
    if not sae.config.transcoder:
        if targets is not None:
            raise ValueError("targets belong to a transcoder, and this model is none")
        return x
    if targets is None:
        raise ValueError("targets must be given: the model is a transcoder")
    y = output_rows(sae, targets, "targets")
    if len(y) != len(x):
        raise ValueError(f"targets must have {len(x)} rows, one for each row of x, got {len(y)}")
    return y


def tokens_of(
    sae: SparseAutoencoder,
    x: Tensor,  # [..., D]
    code: Code | Tensor,  # [..., F]
) -> Tensor:
    """Return the activations of a code as a matrix, [N, D]; see `rows_of`.

    Raises ValueError for another number of tokens than the code has, where they are used by token.
    """
    rows = rows_of(sae, x)
    count = math.prod(code.shape[:-1]) if isinstance(code, Tensor) else code.n_rows
    # Sizes of tensors, and not len, stay symbols in an export for any number of tokens.
    if sae.config.normalizes_tokens and rows.shape[0] != count:
        raise ValueError(f"x must have {count} tokens as the code has, got {len(rows)}")
    return rows


def like(
    x_hat: Tensor,  # any shape
    x: Tensor,  # any shape
) -> Tensor:
    """Return `x_hat` on the device of x, and in its dtype if that is a floating one."""
    return x_hat.to(device=x.device, dtype=x.dtype if x.is_floating_point() else x_hat.dtype)


def require_tensor(given: object, name: str) -> None:
    """Raise TypeError for what is no tensor, such as an array of NumPy or a module's tuple."""
    if isinstance(given, Tensor):
        return
    kind = type(given).__name__
    if isinstance(given, tuple):
        inside = ", ".join(type(part).__name__ for part in given[:4])
        raise TypeError(
            f"{name} must be a tensor, got a {kind} of {len(given)} ({inside}): name the part, "
            "as output[0] for the hidden states that a transformer block returns first"
        )
    makes = {"ndarray": "torch.from_numpy makes one", "list": "torch.tensor makes one"}
    named = "name the part of it that is one, as in output.last_hidden_state"
    raise TypeError(f"{name} must be a tensor, got {kind}: {makes.get(kind, named)}")


def _require_dense(x: Tensor, name: str) -> None:
    """Raise TypeError for a quantised or sparse tensor."""
    if x.is_quantized:
        raise TypeError(f"{name} is quantised, {x.dtype}: {name}.dequantize() can be taken")
    if x.layout != torch.strided:
        kind = str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a sparse tensor, {kind}: {name}.to_dense() can be taken")
