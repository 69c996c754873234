"""A dictionary in plain terms, which each format is read into and written from.

Formats differ in what they subtract, select by, scale and store. Here all of that is resolved:
parameters take and give raw activations, rows of both matrices are latents, and one formula holds,

    pre = (x − b_dec) W_encᵀ + b_enc,   f = select(pre),   x̂ = f W_dec + b_dec + x W_skipᵀ,

where b_dec is subtracted only if `subtract_b_dec`, and W_skip is there only if it is given. With
`token_norm` each token is normalised before it and its reconstruction restored after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = ("topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated")
_BLOCK = 1 << 23  # float64 numbers of a matrix that are made at once, 64 MiB


@dataclass(frozen=True)
class PlainDictionary:
    """A dictionary without a convention of any library.

    Attributes:
        arch: one of `ARCHITECTURES`; how latents are selected, as `SAEConfig.arch` says.
        W_enc: [F, D] float32.
        b_enc: [F] float32; of arch gated the gate's.
        W_dec: [F, d_out] float32; rows of any length.
        b_dec: [d_out] float32.
        subtract_b_dec: whether b_dec is subtracted from x; never of a transcoder.
        transcoder: whether the output is another activation than the input.
        k: latents per token, of arch topk, batch_topk and matryoshka.
        activation: of arch topk: "topk", "abs_topk" or "groupmax", see `SAEConfig.activation`.
        threshold: of arch jumprelu [F]; of batch_topk and matryoshka 0-d, or None where the file
            has none: then the latents of a batch compete, as in training.
        r_mag, b_mag: of arch gated, [F]: f = ReLU((pre − b_enc) e^r_mag + b_mag) where pre > 0.
        W_skip: [d_out, D], of a transcoder that has a skip connection.
        prefixes: of arch matryoshka, the sizes of the nested dictionaries, ascending.
        use_relu: False: of arch relu, all latents are active, with any sign.
        token_norm: "layer_norm": x is (x − m) / (s + 1e-5) with each token's mean m and standard
            deviation s (by D − 1), and x̂ is multiplied by s and m added; "constant_norm": x is
            x √D / |x|, and x̂ is multiplied by |x| / √D; None: raw activations.
        origin: model, hook, layer and what else the file says of the activations.
        remarks: what a user of the dictionary should know, a sentence each.
    """

    arch: str
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    subtract_b_dec: bool
    transcoder: bool = False
    k: int | None = None
    activation: str = "topk"
    threshold: Tensor | None = None
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None
    W_skip: Tensor | None = None
    prefixes: tuple[int, ...] | None = None
    use_relu: bool = True
    token_norm: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def d_in(self) -> int:
        """The width of the activations."""
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        """The number of latents."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """The width of the reconstruction."""
        return self.W_dec.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that there are by name."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "b_mag", "W_skip")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @torch.no_grad()
    def encode(
        self,
        x: Tensor,  # [N, D], raw
    ) -> Tensor:
        """Return the dense code [N, F] in float64, by the formula in plain PyTorch.

        It is the reference that converted files are checked against. Rows of batch_topk and
        matryoshka without a threshold compete as one batch.
        """
        x = self._normalized(x)[0]
        if self.arch in ("batch_topk", "matryoshka") and self.threshold is None:
            return self._select(self._pre_acts(x))
        parts = torch.split(x, max(1, _BLOCK // self.d_sae))
        return torch.cat([self._select(self._pre_acts(part)) for part in parts])

    @torch.no_grad()
    def decode(
        self,
        code: Tensor,  # [N, F]
        x: Tensor,  # [N, D], raw
    ) -> Tensor:
        """Return the reconstruction [N, d_out] in float64."""
        x_hat = self.b_dec.double().repeat(len(code), 1)
        for part in _parts(self.W_dec):
            x_hat += code[:, part].double() @ self.W_dec[part].double()
        if self.W_skip is not None:
            return x_hat + x.double() @ self.W_skip.double().t()
        _, mean, scale = self._normalized(x)
        return x_hat * scale + mean

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Return x by `token_norm` in float64, and mean and scale [N, 1] that restore it."""
        x = x.double()
        if self.token_norm is None:
            return x, 0.0, 1.0
        if self.token_norm == "layer_norm":
            mean, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True)
            return (x - mean) / (scale + 1e-5), mean, scale
        scale = torch.linalg.vector_norm(x, dim=1, keepdim=True) / self.d_in**0.5
        return torch.where(scale > 0, x / scale, 0.0), 0.0, scale

    def _pre_acts(self, x: Tensor) -> Tensor:
        x = x.double() - self.b_dec.double() if self.subtract_b_dec else x.double()
        pre_acts = torch.empty(len(x), self.d_sae, dtype=torch.float64)
        for part in _parts(self.W_enc):
            pre_acts[:, part] = x @ self.W_enc[part].double().t()
        return pre_acts + self.b_enc.double()

    def _select(
        self,
        pre_acts: Tensor,  # [N, F] float64
    ) -> Tensor:
        if self.arch == "relu":
            return pre_acts.relu() if self.use_relu else pre_acts
        if self.arch == "gated":
            assert self.r_mag is not None
            assert self.b_mag is not None
            magnitude = (pre_acts - self.b_enc) * self.r_mag.double().exp() + self.b_mag
            return torch.where(pre_acts > 0, magnitude.relu(), 0.0)
        if self.threshold is not None:
            return torch.where(pre_acts > self.threshold.double(), pre_acts, 0.0).relu()
        assert self.k is not None
        if self.arch != "topk":
            flat = pre_acts.flatten()
            return _only(flat, flat.topk(self.k * len(pre_acts)).indices).relu().view_as(pre_acts)
        if self.activation == "abs_topk":
            return _only(pre_acts, pre_acts.abs().topk(self.k, dim=1).indices)
        if self.activation == "groupmax":
            groups = pre_acts.view(len(pre_acts), self.k, -1)
            return _only(groups, groups.argmax(dim=2, keepdim=True)).relu().view_as(pre_acts)
        return _only(pre_acts, pre_acts.topk(self.k, dim=1).indices).relu()


def _parts(matrix: Tensor) -> Iterator[slice]:
    """Yield the rows of a matrix in parts, of which float64 copies are small."""
    n_rows, step = len(matrix), max(1, _BLOCK // matrix.shape[1])
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _only(
    values: Tensor,
    places: Tensor,  # along the last dimension
) -> Tensor:
    """Return the values at some places, and 0 elsewhere."""
    return torch.zeros_like(values).scatter_(-1, places, values.gather(-1, places))


def rescale_codes_(
    dictionary: PlainDictionary,
    factor: Tensor,  # [F], greater than 0
) -> PlainDictionary:
    """Return the same function with codes multiplied by `factor` and decoder rows divided by it.

    The matrices are changed in place, as a second pair would not fit beside a large one. Latents
    that are compared with each other are compared after it: a format that weighs pre-activations by
    decoder norms is read by multiplying by these norms.
    """
    return replace(
        dictionary,
        W_enc=dictionary.W_enc.mul_(factor[:, None]),
        b_enc=dictionary.b_enc * factor,
        W_dec=dictionary.W_dec.div_(factor[:, None]),
        threshold=None if dictionary.threshold is None else dictionary.threshold * factor,
        b_mag=None if dictionary.b_mag is None else dictionary.b_mag * factor,
    )


def fold_scales_(
    dictionary: PlainDictionary,
    input_scale: float,
    output_scale: float,
) -> PlainDictionary:
    """Return the dictionary of raw activations for one of scaled ones, x · s and x̂ / t.

    With codes in raw units, f / s: W_enc stays, b_enc, thresholds and magnitudes are divided by s,
    W_dec is multiplied by s / t, in place, b_dec divided by t. s and t must be equal where b_dec is
    subtracted from x.
    """
    s, t = input_scale, output_scale
    return replace(
        dictionary,
        b_enc=dictionary.b_enc / s,
        W_dec=dictionary.W_dec if s == t else dictionary.W_dec.mul_(s / t),
        b_dec=dictionary.b_dec / t,
        threshold=None if dictionary.threshold is None else dictionary.threshold / s,
        b_mag=None if dictionary.b_mag is None else dictionary.b_mag / s,
        W_skip=None if dictionary.W_skip is None else dictionary.W_skip * (s / t),
    )


def with_subtraction(dictionary: PlainDictionary, subtract: bool) -> PlainDictionary:
    """Return the same function with b_dec subtracted from x, or without.

    (x − b_dec) W_encᵀ + b_enc = x W_encᵀ + (b_enc − W_enc b_dec). Of arch gated b_mag moves with
    it. A dictionary that is so already is returned as it is, to the bit.
    """
    if subtract == dictionary.subtract_b_dec:
        return dictionary
    W_enc, b_dec = dictionary.W_enc, dictionary.b_dec.double()
    moved = torch.cat([W_enc[part].double() @ b_dec for part in _parts(W_enc)])
    moved = moved if subtract else -moved
    b_mag = dictionary.b_mag
    if b_mag is not None:
        assert dictionary.r_mag is not None
        # (pre − b_enc) is the product alone, which loses what b_enc gains.
        b_mag = (b_mag + moved * dictionary.r_mag.double().exp()).float()
    return replace(
        dictionary,
        b_enc=(dictionary.b_enc.double() + moved).float(),
        b_mag=b_mag,
        subtract_b_dec=subtract,
    )
