"""`Units`: what goes into a model and what comes out, in which width and in which units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sae_fast.config import SAEConfig


def require_tensor(given: object, name: str) -> None:
    """Raise TypeError for what is no tensor, such as an array of NumPy."""
    if not isinstance(given, Tensor):
        kind = type(given).__name__
        raise TypeError(f"{name} must be a tensor, got {kind}: torch.from_numpy makes one")


class Units(nn.Module):
    """Base of the model: the normalisation of its activations and, of a transcoder, its targets."""

    config: SAEConfig
    W_enc: nn.Parameter  # [F, D]
    activation_mean: Tensor  # [D]
    activation_scale: Tensor  # 0-d
    target_mean: Tensor  # [d_out], of a transcoder
    target_scale: Tensor  # 0-d, likewise

    @torch.no_grad()
    def set_normalization_(
        self,
        mean: Tensor,  # [D]
        scale: float | Tensor,
    ) -> None:
        """Take (x − mean) · scale as the normalised activation, unless there is to be none."""
        self._normalize_by_("activation", mean, scale)

    @torch.no_grad()
    def set_target_normalization_(
        self,
        mean: Tensor,  # [d_out]
        scale: float | Tensor,
    ) -> None:
        """The same for the targets of a transcoder."""
        if not self.config.transcoder:
            raise ValueError("targets belong to a transcoder, and this model is none")
        self._normalize_by_("target", mean, scale)

    def _normalize_by_(self, what: str, mean: Tensor, scale: float | Tensor) -> None:
        if self.config.normalize_activations == "none":
            raise ValueError("normalize_activations = 'none' leaves no mean and scale to set")
        own: Tensor = getattr(self, f"{what}_mean")
        if mean.shape != own.shape:
            raise ValueError(f"mean must have shape {tuple(own.shape)}, got {tuple(mean.shape)}")
        if not (float(scale) > 0 and bool(torch.isfinite(mean).all())):
            raise ValueError(
                f"mean must be finite and scale greater than 0, got scale {float(scale)}"
            )
        own.copy_(mean)
        getattr(self, f"{what}_scale").fill_(float(scale))

    def normalize(
        self,
        x: Tensor,  # [..., D]
    ) -> Tensor:
        """Activations in the units of the parameters."""
        if self.config.normalize_activations == "none":
            return x
        return (x - self.activation_mean) * self.activation_scale

    def denormalize(
        self,
        x_hat: Tensor,  # [..., D], of a transcoder [..., d_out]
    ) -> Tensor:
        """What the parameters give in the units of the activations, or of the targets."""
        if self.config.normalize_activations == "none":
            return x_hat
        return x_hat / self.output_scale + self.output_mean

    @property
    def output_mean(self) -> Tensor:
        """The mean [D] of what is reconstructed; of a transcoder of its targets, [d_out]."""
        return self.target_mean if self.config.transcoder else self.activation_mean

    @property
    def output_scale(self) -> Tensor:
        """The scale of the same, 0-d."""
        return self.target_scale if self.config.transcoder else self.activation_scale

    def _targets(
        self,
        x: Tensor,  # [N, D]
        targets: Tensor | None,  # [N, d_out]
    ) -> Tensor:
        """What is to be reconstructed of a batch; raises ValueError unless it goes with it."""
        if not self.config.transcoder:
            if targets is not None:
                raise ValueError("targets belong to a transcoder, and this model is none")
            return x
        if targets is None:
            raise ValueError("targets must be given: the model is a transcoder")
        y = self._output_rows(targets, "targets")
        if len(y) != len(x):
            raise ValueError(f"targets must be those of {len(x)} tokens, got {len(y)}")
        return y

    def _output_rows(self, x: Tensor, name: str) -> Tensor:
        """The same for what is reconstructed, of a transcoder d_out wide."""
        if not self.config.transcoder:
            return self._rows(x, name)
        return self._rows(x, name, "d_out")

    def _rows(self, x: Tensor, name: str = "x", width: str = "d_in") -> Tensor:
        """`x` as a matrix of the parameters' dtype; raises ValueError unless it is that wide.

        Raises TypeError for what is no tensor.
        """
        require_tensor(x, name)
        columns: int = getattr(self.config, width)
        if x.ndim == 0 or x.shape[-1] != columns:
            raise ValueError(
                f"{name} must have {width} = {columns} columns, got shape {tuple(x.shape)}"
            )
        return x.reshape(-1, columns).to(self.W_enc.dtype)
