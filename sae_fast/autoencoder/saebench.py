"""An autoencoder as evaluators of SAEBench and SAELens take it: `SparseAutoencoder.to_saebench`.

They want dense codes, W_enc of shape [D, F] and decoder rows of unit length, all in the units of
the activations, and the names of TransformerLens.
"""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae_fast.activations.capture.hooks import transformer_lens_name
from sae_fast.autoencoder.inference import floating_dtype
from sae_fast.interop.hook_names import hook_named_by

if TYPE_CHECKING:
    from sae_fast.autoencoder.model import SparseAutoencoder


class SaebenchModel(nn.Module):
    """A dictionary with the attributes and methods of SAEBench's BaseSAE and SAELens's SAE.

    Attributes:
        W_enc: [D, F].
        b_enc: [F].
        W_dec: [F, D], rows of unit length.
        b_dec: [D].
        b_mag: [F], of a gated one only.
        cfg: architecture, d_in, d_sae, model_name, hook_name, hook_layer, hook_head_index, dtype,
            device and more, with the same names in `cfg.metadata`; `cfg.to_dict()` has them all.
    """

    def __init__(self, sae: SparseAutoencoder, model_name: str, hook_name: str) -> None:
        super().__init__()
        by_token = sae.config.normalizes_tokens
        folded = copy.deepcopy(sae) if by_token else sae.fold_normalization()
        folded.eval().requires_grad_(False)
        if not folded.architecture.unit_norm:
            folded.fold_decoder_norms()
        self._sae = folded
        self._last: Tensor | None = None  # activations of the last code, where they are needed
        self.W_enc = nn.Parameter(folded.W_enc.detach().T.contiguous(), requires_grad=False)
        self.b_enc = nn.Parameter(folded.b_enc.detach().clone(), requires_grad=False)
        self.W_dec = nn.Parameter(folded.W_dec.detach().clone(), requires_grad=False)
        self.b_dec = nn.Parameter(folded.b_dec.detach().clone(), requires_grad=False)
        if (b_mag := folded.weights.own.get("b_mag")) is not None:
            self.b_mag = nn.Parameter(b_mag.detach().clone(), requires_grad=False)
        self.hook_z_reshaping_mode = False
        layer = re.search(r"\d+", hook_name)
        self.cfg = _Config(
            architecture=sae.config.arch,
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            model_name=model_name,
            hook_name=hook_name,
            hook_layer=int(layer[0]) if layer else 0,
            hook_head_index=None,
            context_size=None,
            prepend_bos=True,
            normalize_activations="none",
            apply_b_dec_to_input=True,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
        )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of codes and reconstructions."""
        return self.W_dec.dtype

    def encode(
        self,
        x: Tensor,  # [..., D]
    ) -> Tensor:
        """Return the code of activations, [..., F], by the rule of inference."""
        x = x.to(self.device, self.dtype)
        if self._sae.config.normalizes_tokens:
            self._last = x.detach()
        code: Tensor = self._sae.encode(x).dense()
        return code.to(self.dtype)

    def decode(
        self,
        code: Tensor,  # [..., F]
    ) -> Tensor:
        """Return the reconstruction of a code, [..., D].

        Where each token is normalised by numbers of its own, the numbers are of the activations
        that were encoded last, as in SAELens.

        Raises ValueError where these are of other tokens than the code.
        """
        x_hat = code.to(self.device, self.dtype) @ self.W_dec + self.b_dec
        if not self._sae.config.normalizes_tokens:
            return x_hat
        if self._last is None or self._last.numel() != x_hat.numel():
            raise ValueError("code must be of the activations that were encoded last")
        return self._sae.denormalize(x_hat, self._last.reshape(x_hat.shape))

    def forward(
        self,
        x: Tensor,  # [..., D]
    ) -> Tensor:
        """Return the reconstruction of activations, [..., D]."""
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> SaebenchModel:
        """Move the weights to a device or a dtype, as any module; return the model."""
        super().to(*args, **kwargs)
        self.cfg.set(dtype=str(self.dtype).removeprefix("torch."), device=str(self.device))
        return self

    def fold_W_dec_norm(self) -> None:
        """Leave the weights, whose decoder rows have unit length already."""

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Leave the shape of activations, whose heads are always flattened here."""

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Leave the shape of activations, whose heads are always flattened here."""


class _Config(SimpleNamespace):
    """The configuration of a dictionary, with its values also in `metadata`."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values, metadata=SimpleNamespace(**values))

    def set(self, **values: Any) -> None:
        """Change values."""
        self.__dict__.update(values)
        self.metadata.__dict__.update(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the values as a dictionary."""
        return dict(self.metadata.__dict__)


def to_saebench(
    sae: SparseAutoencoder,
    model_name: str | None,
    hook_name: str | None,
    dtype: torch.dtype | str | None,
) -> SaebenchModel:
    """Return an autoencoder for evaluators, see `SparseAutoencoder.to_saebench`."""
    if sae.config.transcoder:
        raise ValueError("evaluators take autoencoders, and this is a transcoder")
    name = hook_name or hook_named_by(sae.origin)
    if not name:
        raise ValueError(
            "hook_name must be given: the autoencoder does not name the hook point that it is of"
        )
    model = model_name or str(sae.origin.get("model", ""))
    made = SaebenchModel(sae, model, transformer_lens_name(name))
    return made if dtype is None else made.to(floating_dtype(dtype))
