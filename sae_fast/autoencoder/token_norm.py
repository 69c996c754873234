"""Normalisation of each token by numbers of its own, for `normalize_activations`.

layer_norm: (x − m) / (s + ε), with m the mean of the D numbers of a token and s their standard
deviation, about m and by D − 1; a reconstruction becomes x̂ s + m. So normalise the TopK models of
OpenAI (arXiv:2406.04093) and layer_norm of SAELens. constant_norm: x / s with s = |x| / √D, and
x̂ s. A token of zeros has zeros as its normalised activation too.

These numbers are of the token and not of the model, so that `decode` takes the activations again,
as it does with a skip connection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-5


class TokenUnits(NamedTuple):
    """The numbers by which tokens are normalised.

    Attributes:
        mean: subtracted from the activations, [..., 1]; None: nothing is.
        scale: of the activations, [..., 1], by which a reconstruction is multiplied.
        divisor: [..., 1], by which the activations are divided; greater than 0.
    """

    mean: Tensor | None
    scale: Tensor
    divisor: Tensor

    def normalized(
        self,
        x: Tensor,  # [..., D]
    ) -> Tensor:
        """Return the activations that the units are of, normalised."""
        return (x if self.mean is None else x - self.mean) / self.divisor

    def restored(
        self,
        x_hat: Tensor,  # [..., D]
    ) -> Tensor:
        """Return a reconstruction of normalised activations in the units of the activations."""
        x_hat = x_hat * self.scale
        return x_hat if self.mean is None else x_hat + self.mean


def token_units(
    kind: str,
    x: Tensor,  # [..., D]
) -> TokenUnits:
    """Return the units of each token, by the normalisation that `kind` names."""
    if kind == "layer_norm":
        scale = x.std(dim=-1, keepdim=True)
        return TokenUnits(x.mean(dim=-1, keepdim=True), scale, scale + EPSILON)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return TokenUnits(None, scale, torch.where(scale > 0, scale, 1.0))
