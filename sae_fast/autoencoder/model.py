"""The sparse autoencoder: parameters, encode and decode, its training loss, and its files.

Rows are latents in both matrices. The parameters live in normalised units, (x − mean) · scale, or
by numbers of each token, see token_norm.py: `encode`, `decode` and `forward` take and give
activations as they are, `training_loss` takes them normalised. A transcoder reconstructs targets y
in place of x, see transcoder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae_fast import ops
from sae_fast.activations import STARTS, TARGETS, Rows
from sae_fast.autoencoder import metrics
from sae_fast.autoencoder.architecture import (
    Engine,
    StepSettings,
    Weights,
)
from sae_fast.autoencoder.architectures import make_architecture
from sae_fast.autoencoder.decoding import NARROW, decode_rows
from sae_fast.autoencoder.files import (
    is_saved_model,
    model_directory,
    read_config,
    read_origin,
    read_tensors,
    write_model,
)
from sae_fast.autoencoder.folding import fold_decoder_norms_, folded_normalization
from sae_fast.autoencoder.foreign import foreign_dictionary, local_place
from sae_fast.autoencoder.guidance import Guidance
from sae_fast.autoencoder.inference import (
    RunResult,
    check_units,
    floating_dtype,
    inference_engine,
    inference_weights,
    is_vmapped,
    under_vmap,
)
from sae_fast.autoencoder.initialization import centre, initialize_weights_, sample_rows
from sae_fast.autoencoder.interchange import config_for, state_for
from sae_fast.autoencoder.losses import TrainingLoss
from sae_fast.autoencoder.shapes import (
    like,
    require_tensor,
    rows_of,
    rows_of_both,
    target_of,
    tokens_of,
)
from sae_fast.autoencoder.token_norm import TokenUnits, token_units
from sae_fast.autoencoder.training_loss import batch_loss, decorrelation_term
from sae_fast.autoencoder.transcoder import (
    SKIP,
    skip,
    transcoder_buffers,
    transcoder_parameters,
)
from sae_fast.autoencoder.unpacking import refuse_unpacking
from sae_fast.config import RunConfig, SAEConfig
from sae_fast.ops.code_entries import latent_numbers

_NOT_SHOWN = {"T_destination", "call_super_init", "dump_patches"}

if TYPE_CHECKING:
    from sae_fast.autoencoder.expected_codes import Agreement
    from sae_fast.autoencoder.intervention import Intervention, Mode
    from sae_fast.autoencoder.saebench import SaebenchModel


class SparseAutoencoder(nn.Module):
    """x̂ = Σ_j f_j W_dec,j + b_dec with f = TopK((x − b_dec) W_encᵀ + b_enc), unit rows in W_dec.

    The architecture says what takes the place of TopK, see architectures.py. `origin` says of which
    activations the model is, by names such as model, hook, layer, tokenizer and dataset, and by
    settings of the capture; it is saved with it.

    Args:
        config: of the model.
        latents: the numbers of the latents that it has, where other processes have the others;
            None: all. Its tensors are these rows of the whole model's.

    Raises ValueError where the configuration leaves d_in open.
    """

    activation_mean: Tensor  # [D]
    activation_scale: Tensor  # 0-d
    target_mean: Tensor  # [d_out], of a transcoder
    target_scale: Tensor  # 0-d, of a transcoder
    no_bias: Tensor | None  # [D], zeros subtracted from x where b_dec is not
    tokens_since_fired: Tensor  # [F] int64
    decorrelation_draw: Tensor | None  # 0-d int64, which random chunks are next, if there are any
    # Of precision and dense_grad; another one where the model has some of its latents only.
    make_engine: Callable[[str, bool], Engine] = Engine

    @torch.inference_mode(False)
    def __init__(self, config: SAEConfig | RunConfig, latents: range | None = None):
        super().__init__()
        if isinstance(config, RunConfig):
            config = config.sae
        if not config.is_complete:
            name = "d_in" if config.d_in == 0 else "d_out"
            raise ValueError(
                f"{name} must be given, directly or by the data, to make a model, got 0"
            )
        self.config = config
        self.origin: dict[str, Any] = {}
        self.architecture = make_architecture(config)
        self.guidance = Guidance(config)
        dtype = torch.float32  # whatever the default is: the kernels take no other
        self._latents = range(config.d_sae) if latents is None else latents
        d_in, d_sae, width = config.d_in, len(self._latents), config.target_width
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype))
        self.W_dec = nn.Parameter(torch.empty(d_sae, width, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.register_buffer("activation_mean", torch.zeros(d_in, dtype=dtype))
        self.register_buffer("activation_scale", torch.ones((), dtype=dtype))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64))
        has_chunks = config.decorrelation == "chunked_max"
        draw = torch.zeros((), dtype=torch.int64) if has_chunks else None
        self.register_buffer("decorrelation_draw", draw)
        for name, start in self._own_parameters().items():
            self._check_new(name)
            self.register_parameter(name, nn.Parameter(start))
        for name, start in (self._own_buffers() | transcoder_buffers(config)).items():
            self._check_new(name)
            self.register_buffer(name, start)
        subtracts_nothing = config.transcoder or not config.subtract_b_dec
        no_bias = torch.zeros(d_in, dtype=dtype) if subtracts_nothing else None
        self.register_buffer("no_bias", no_bias, persistent=False)
        self._own_names = tuple(self._own_start())
        if not self.W_dec.is_meta:
            first = self._latents.start
            initialize_weights_(self.W_enc, self.W_dec, config, None, first=first)

    def extra_repr(self) -> str:
        """Return the architecture, its sizes and a dtype other than float32, which `repr` shows."""
        config = self.config
        sizes: dict[str, Any] = {"d_in": config.d_in}
        if config.transcoder:
            sizes["d_out"] = config.d_out
        sizes["d_sae"] = config.d_sae
        if config.k is not None:
            sizes["k"] = config.k
        parts = [config.arch, *(f"{name}={value}" for name, value in sizes.items())]
        if self.dtype != torch.float32:
            parts.append(str(self.dtype).removeprefix("torch."))
        return ", ".join(parts)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight matrices."""
        return self.W_enc.dtype

    @property
    def d_in(self) -> int:
        """The width of the activations."""
        return self.config.d_in

    @property
    def d_sae(self) -> int:
        """The number of latents."""
        return self.config.d_sae

    @property
    def k(self) -> int | None:
        """The number of active latents per token; None where it is not fixed."""
        return self.config.k

    @property
    def cfg(self) -> SAEConfig:
        """The configuration, by the name that other libraries have for it."""
        return self.config

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseAutoencoder:
        """Convert parameters and buffers; mean, scale and thresholds stay float32 in 16 bits.

        These few numbers are added to every activation, so that their rounding would be a bias.
        """
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in self._buffers.items():
            if tensor is not None and tensor.dtype in NARROW:
                exact = before[name]
                assert exact is not None
                self._buffers[name] = exact.to(device=tensor.device, dtype=torch.float32)
        return self

    def __dir__(self) -> list[str]:
        """Return the names that completion shows, without torch's own that are of no use."""
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return sorted({*names} - _NOT_SHOWN)

    # ---- starting values ---------------------------------------------------------------------

    @torch.no_grad()
    def initialize_(
        self,
        generator: torch.Generator | None = None,
        sample: Tensor | None = None,  # [N, D], normalised
        targets: Tensor | None = None,  # [N, d_out], normalised, of the same tokens
    ) -> None:
        """Start afresh from `generator`, and from `sample` where the configuration asks for one."""
        config = self.config
        if sample is None and sample_rows(config) > 0:
            name = "b_dec_init" if config.b_dec_init != "zero" else "decoder_init"
            raise ValueError(f"{name} = {getattr(config, name)!r} needs a sample of activations")
        rows = None if sample is None else rows_of(self, sample)
        modelled = rows if rows is None else target_of(self, rows, targets)
        first = self._latents.start
        initialize_weights_(self.W_enc, self.W_dec, config, generator, rows, modelled, first)
        self.b_enc.zero_()
        self.b_dec.zero_()
        if modelled is not None:
            self.b_dec.copy_(centre(modelled, config))
        self.tokens_since_fired.zero_()
        if self.decorrelation_draw is not None:
            self.decorrelation_draw.zero_()
        for name, start in self._own_start().items():
            getattr(self, name).copy_(start)

    def _own_parameters(self) -> dict[str, Tensor]:
        """Return start values of the architecture's parameters, the probe's and the skip's."""
        own = self._rows_of(self.architecture.parameters()) | self.guidance.parameters()
        return own | transcoder_parameters(self.config)

    def _own_buffers(self) -> dict[str, Tensor]:
        """Return start values of the architecture's buffers."""
        return self._rows_of(self.architecture.buffers())

    def _rows_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of all latents with the rows that the model has of them."""
        first, end, d_sae = self._latents.start, self._latents.stop, self.config.d_sae
        if len(self._latents) == d_sae:
            return dict(tensors)
        return {
            name: tensor[first:end].clone() if tensor.dim() > 0 else tensor
            for name, tensor in tensors.items()
        }

    def _check_new(self, name: str) -> None:
        if hasattr(self, name):
            raise ValueError(
                f"arch {self.config.arch}: a parameter or buffer is called {name}, and a model has "
                "that already"
            )

    def _own_start(self) -> dict[str, Tensor]:
        """Return start values of the own parameters and of the architecture's buffers."""
        return self._own_parameters() | self._own_buffers()

    # ---- normalisation -----------------------------------------------------------------------

    @torch.no_grad()
    def set_normalization_(
        self,
        mean: Tensor,  # [D]
        scale: float | Tensor,
    ) -> None:
        """Set mean and scale: the normalised activation is (x − mean) · scale.

        Raises ValueError where the configuration has no normalisation, or they are not usable.
        """
        self._normalize_by_(self.activation_mean, self.activation_scale, mean, scale)

    @torch.no_grad()
    def set_target_normalization_(
        self,
        mean: Tensor,  # [d_out]
        scale: float | Tensor,
    ) -> None:
        """Set mean and scale of a transcoder's targets, normalised to (y − mean) · scale.

        Raises ValueError where the model is no transcoder, has no normalisation, or they are not
        usable.
        """
        if not self.config.transcoder:
            raise ValueError("targets belong to a transcoder, and this model is none")
        self._normalize_by_(self.target_mean, self.target_scale, mean, scale)

    def _normalize_by_(
        self, own_mean: Tensor, own_scale: Tensor, mean: Tensor, scale: float | Tensor
    ) -> None:
        if not self.config.has_scale:
            kind = self.config.normalize_activations
            raise ValueError(f"normalize_activations = {kind!r} leaves no mean and scale to set")
        if mean.shape != own_mean.shape:
            shapes = tuple(own_mean.shape), tuple(mean.shape)
            raise ValueError(f"mean must have shape {shapes[0]}, got {shapes[1]}")
        if not (float(scale) > 0 and bool(torch.isfinite(mean).all())):
            raise ValueError(
                f"mean must be finite and scale greater than 0, got scale {float(scale)}"
            )
        own_mean.copy_(mean)
        own_scale.fill_(float(scale))

    def normalize(
        self,
        x: Tensor,  # [..., D]
    ) -> Tensor:
        """Return activations in the units of the parameters, in the shape of x."""
        if self.config.has_scale:
            return (x - self.activation_mean) * self.activation_scale
        tokens = self._token_units(x)
        return x if tokens is None else tokens.normalized(x)

    def denormalize(
        self,
        x_hat: Tensor,  # [..., D], of a transcoder [..., d_out]
        x: Tensor | None = None,  # [..., D], activations as they are
    ) -> Tensor:
        """Return a reconstruction in the units of the activations, or of a transcoder's targets.

        Args:
            x_hat: in the units of the parameters.
            x: what it reconstructs, where each token is normalised by numbers of its own.

        Raises ValueError where these numbers are needed and x is None.
        """
        if self.config.has_scale:
            return x_hat / self.output_scale + self.output_mean
        tokens = self._token_units(x)
        return x_hat if tokens is None else tokens.restored(x_hat)

    def _token_units(
        self,
        x: Tensor | None,  # [..., D]
    ) -> TokenUnits | None:
        """Return the units of each token; None: the model has no units by the token.

        Raises ValueError where it has and x is None.
        """
        if not self.config.normalizes_tokens:
            return None
        kind = self.config.normalize_activations
        if x is None:
            raise ValueError(
                f"x must be given: with normalize_activations {kind} each token is reconstructed "
                "in units of its own"
            )
        return token_units(kind, x.to(torch.promote_types(x.dtype, torch.float32)))

    @property
    def output_mean(self) -> Tensor:
        """The mean of what is reconstructed: of the activations [D], or of the targets [d_out]."""
        return self.target_mean if self.config.transcoder else self.activation_mean

    @property
    def output_scale(self) -> Tensor:
        """The scale of what is reconstructed, 0-d."""
        return self.target_scale if self.config.transcoder else self.activation_scale

    # ---- encode and decode -------------------------------------------------------------------

    def encode(
        self,
        x: Tensor,  # [..., D], activations as they are
        *,
        units: ops.Units = ops.NORMALIZED,
        precision: str = "screened",
        dense_grad: bool = True,
    ) -> ops.SparseCode:
        """Return the code of every activation: an array [..., d_sae] with few values other than 0.

        The code is on the device of the parameters, its values in float32 (float64 where the
        parameters are).

        Args:
            x: of any dtype and device.
            units: of the values. "normalized": one unit of latent j adds `direction(j)` to x_hat.
                "raw": the units of x, one unit adds the decoder row W_dec[j]. Both are equal for a
                model without normalisation. `decode` reads the units from the code. With
                normalize_activations layer_norm and constant_norm "normalized" is what the library
                of the dictionary gives, and one unit adds the row times the token's own scale.
            precision: mode of the product, see `ops.encode_topk`.
            dense_grad: whether backward leaves ordinary gradients.

        Raises ValueError for another width or unknown units.
        """
        check_units(units)
        rows = rows_of(self, x)
        tokens = self._token_units(rows)
        normalized = self.normalize(rows) if tokens is None else tokens.normalized(rows)
        engine = inference_engine(self, precision, dense_grad)
        code = self.architecture.infer(inference_weights(self), normalized, engine)
        if units == ops.RAW:
            values = code.values
            values = (
                values / self.output_scale
                if tokens is None
                else values * _per_entry(code, tokens.scale)
            )
            code = code.with_values(values, ops.RAW)
        return code if x.ndim == 2 else code.shaped(x.shape[:-1])

    def decode(
        self,
        code: ops.Code | Tensor,  # as a tensor: [..., F], also a sparse one
        x: Tensor | None = None,  # [..., D], activations as they are
        *,
        units: ops.Units | None = None,
        dense_grad: bool = True,
    ) -> Tensor:
        """Reconstruct activations, in their own units, from a code: [..., D] in the code's shape.

        Of a transcoder the result is what it predicts, with d_out columns. It is float32, or
        float64 where the parameters are. A dense code leaves dense gradients in any case.

        Args:
            code: as `encode` gives it, edited or not, or a dense tensor.
            x: the activations that were encoded, for a skip connection, and where each token is
                normalised by numbers of its own (normalize_activations layer_norm, constant_norm).
            units: of a dense code's values, see `encode`; None: "normalized". A SparseCode has its
                own.
            dense_grad: whether backward leaves ordinary gradients.

        Raises ValueError for another number of latents, or where x or the units do not fit.
        """
        if not isinstance(code, ops.Code):
            require_tensor(code, "code")
        elif code.d_sae != len(self.W_dec):
            raise ValueError(
                f"code must have {len(self.W_dec)} latents as the model has, got {code.d_sae}"
            )
        tokens = self._token_units(None if x is None else tokens_of(self, x, code))
        normalized = self._normalized(code, units, tokens)
        shape = normalized.shape[:-1]
        if not isinstance(normalized, Tensor) and not self.config.use_relu:
            normalized = normalized.dense()  # every latent is in it
        if isinstance(normalized, Tensor):
            if normalized.layout != torch.strided:
                normalized = normalized.to_dense()
            rows, precision = rows_of(self, normalized, "h", "d_sae"), "fp32"
            h: ops.SparseCode | Tensor = rows
        else:
            h, precision = normalized, normalized.precision
        engine = inference_engine(self, precision, dense_grad)
        x_hat = engine.decode(h, self.W_dec, self.b_dec)
        if self.config.skip_connection:
            if x is None:
                raise ValueError("x must be given: the model has a skip connection")
            rows = self.normalize(rows_of(self, x))
            x_hat = x_hat + skip(rows, self.get_parameter(SKIP), precision)
        x_hat = self.denormalize(x_hat) if tokens is None else tokens.restored(x_hat)
        return x_hat.reshape(*shape, self.config.target_width)

    def _normalized(
        self,
        code: ops.Code | Tensor,
        units: ops.Units | None,
        tokens: TokenUnits | None = None,  # of [N, D]
    ) -> ops.SparseCode | Tensor:
        """Return a code on the model's device, with its values in normalised units.

        Raises ValueError where each token has units of its own, and these are not given.
        """
        if units is not None:
            check_units(units)
        scale = self.output_scale
        if isinstance(code, ops.DenseCode):
            code = code.listed()
        is_raw = (units if isinstance(code, Tensor) else code.units) == ops.RAW
        if is_raw and tokens is None and self.config.normalizes_tokens:
            raise ValueError(
                "code must be in normalised units: in raw ones each token has a scale of its own"
            )
        if tokens is not None:  # a reconstruction in units of 0 is the mean, whatever the code is
            factors = 1 / torch.where(tokens.scale > 0, tokens.scale, 1.0)  # [N, 1]
        if isinstance(code, Tensor):
            code = code.to(scale.device)
            if is_raw:
                code = code.to(torch.promote_types(code.dtype, scale.dtype))
                by = scale if tokens is None else factors.view(*code.shape[:-1], 1)
                code = code * by
            return code
        if units is not None and units != code.units:
            raise ValueError(f"the code is in units {code.units!r}, but units is {units!r}")
        if code.device != scale.device:
            code = code.to(scale.device)
        if code.units == ops.RAW:
            values = code.values.to(torch.promote_types(code.dtype, scale.dtype))
            by = scale if tokens is None else _per_entry(code, factors)
            code = code.with_values(values * by, ops.NORMALIZED)
        return code

    def direction(
        self,
        latent: int | slice | Tensor,  # int64 or bool if a tensor
        *,
        units: ops.Units = ops.NORMALIZED,
    ) -> Tensor:
        """Return what one unit of a latent's code value adds to x_hat, in the units of x: [D].

        With code values in normalised units it is the latent's decoder row divided by the
        activations' scale, with values in raw units the decoder row itself. Of several latents the
        shape is [..., D], of a transcoder D is d_out. To steer, add a multiple of it to x: the
        multiple is a code value in the same units. Where each token is normalised by numbers of its
        own it is the decoder row too, and a multiple is a value in raw units.
        """
        check_units(units)
        if isinstance(latent, int):
            latent_numbers(latent, self.config.d_sae)  # no negative ones, as everywhere
        rows = self.W_dec[latent]
        is_raw = units == ops.RAW or not self.config.has_scale
        return rows if is_raw else rows / self.output_scale

    def threshold_of(
        self,
        latent: int | slice | Tensor,  # int64 or bool if a tensor
        *,
        units: ops.Units = ops.NORMALIZED,
    ) -> Tensor:
        """Return the code value that a latent exceeds where it is active: 0-d, of several [...].

        For jumprelu it is the trained threshold, for batch_topk and matryoshka the threshold of
        inference, for gated the value at which the gate opens, and for relu 0.

        Raises ValueError where there is none: topk chooses the largest of each token, and in raw
        units a token may have its own.
        """
        check_units(units)
        if units == ops.RAW and self.config.normalizes_tokens:
            raise ValueError("units must be 'normalized': each token has a scale of its own")
        thresholds = self.architecture.thresholds(inference_weights(self))
        if thresholds is None:
            raise ValueError(
                f"arch {self.config.arch} has no thresholds, it chooses among the latents of a "
                "token or a batch"
            )
        if isinstance(latent, int):
            latent_numbers(latent, self.config.d_sae)
        found = thresholds[latent]
        return found / self.output_scale if units == ops.RAW else found

    def forward(
        self,
        x: Tensor,  # [..., D], activations as they are
    ) -> Tensor:
        """Reconstruct `x`, in its shape, dtype and device; of a transcoder predict from `x`.

        The result is x_hat alone and refuses to be unpacked, see `forward_with_code` and `run`.
        """
        if is_vmapped(x) and not is_vmapped(self.W_enc):
            return under_vmap(self, x)
        return refuse_unpacking(self.forward_with_code(x)[0])

    def forward_with_code(
        self,
        x: Tensor,  # [..., D], activations as they are
    ) -> tuple[Tensor, ops.SparseCode]:
        """Return what `forward` returns, and the code that it is made from."""
        code = self.encode(x)
        return like(self.decode(code, x), x), code

    def run(
        self,
        x: Tensor,  # [..., D], activations as they are
        targets: Tensor | None = None,  # [..., d_out], of a transcoder, as they are
    ) -> RunResult:
        """Return x_hat, the code and the losses of activations; it can be unpacked.

        `x_hat` and `code` are the results of `forward_with_code`. `losses` has the numbers of
        `compute_loss_components` and `get_reconstruction_error`, and `l0`, active latents per
        token; `total_loss_tensor` is 0-d and has a graph where gradients are recorded.

        Raises ValueError where targets are missing, or given for what is no transcoder.
        """
        code = self.encode(x)
        x_hat = self.decode(code, x)
        wanted = target_of(self, rows_of(self, x), targets)
        rows_hat = rows_of(self, x_hat, "x_hat", "d_out" if self.config.transcoder else "d_in")
        losses = {
            **self.compute_loss_components(wanted, rows_hat, code),
            **self.get_reconstruction_error(wanted, rows_hat.detach()),
            "l0": float(code.l0().double().mean()),
        }
        return RunResult(like(x_hat, x), code, losses)

    def probe(self, code: ops.Code) -> Tensor:
        """Return what the probe predicts from a code: logits [..., classes], or numbers [..., 1].

        Raises ValueError where the model has no probe.
        """
        if not self.config.has_probe:
            raise ValueError("probe: the model was trained without one (see probe_loss_coeff)")
        normalized = self._normalized(code, None)
        assert not isinstance(normalized, Tensor)
        own = self.weights.own
        predicted = decode_rows(normalized, own["W_probe"], own["b_probe"], precision="fp32")
        return predicted.reshape(*normalized.shape[:-1], predicted.shape[-1])

    @property
    def engine(self) -> Engine:
        """The encoders and decoders of inference, and sums over all latents."""
        return inference_engine(self, "screened", dense_grad=True)

    def kept_copies(self, session: object = None) -> AbstractContextManager[None]:
        """Keep the weights in the kernels' format between calls inside this context.

        It makes many calls of few tokens faster. Inside, change weights by ordinary in-place
        operations and optimisers only, not through `.data` or memory shared with NumPy, which
        nothing counts. `session` is passed on to `ops.kept_copies`.
        """
        weights = self.weights
        kept = weights.W_enc, weights.W_dec, weights.input_bias
        return ops.kept_copies(*kept, session=session)

    @property
    def weights(self) -> Weights:
        """The tensors as the architecture takes them."""
        own = {name: getattr(self, name) for name in self._own_names}
        input_bias = self.b_dec if self.no_bias is None else self.no_bias
        return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec, own, input_bias)

    # ---- training ----------------------------------------------------------------------------

    def training_loss(
        self,
        x: Tensor,  # [N, D], normalised
        targets: Tensor | None = None,  # [N, d_out], normalised
        *,
        precision: str = "screened",
        dense_grad: bool = True,
        k_aux: int | None = None,
        sparsity_weight: float | Tensor = 1.0,
        k: int | None = None,
        labels: Tensor | None = None,  # [N]
        starts: Tensor | None = None,  # [N] bool
        relations: Tensor | None = None,  # [N] int64
        answers: Tensor | None = None,  # [N] int64
        reconstruction_only: bool = False,
        downstream: Callable[[Tensor], Tensor] | None = None,
    ) -> TrainingLoss:
        """Return the weighted sum of the loss terms of tensors, see training_loss.py.

        Args:
            x: the batch.
            targets: of a transcoder; other models have none.
            precision, dense_grad: see `Engine`.
            k_aux, sparsity_weight, k, reconstruction_only: see `StepSettings`.
            labels: for the probe, if there is one; -1: nothing to predict.
            starts: tokens that begin a sequence, for the temporal loss.
            relations, answers: of arch slots, -1: none.
            downstream: for loss_fn ce and kl, returns the loss, 0-d, of the model that continues
                from a reconstruction [N, D], normalised.

        Raises ValueError where `targets` or `downstream` do not fit the configuration.
        """
        config = self.config
        if self.dtype in NARROW:
            name = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"training needs float32 parameters, got {name}: sae.float() makes them"
            )
        if targets is not None and not config.transcoder:
            raise ValueError("targets belong to a transcoder, and this model is none")
        given = {
            TARGETS: targets,
            STARTS: starts,
            config.probe_labels: labels,
            config.relation_labels: relations,
            config.answer_labels: answers,
        }
        columns = {name: column for name, column in given.items() if name and column is not None}
        settings = StepSettings(
            sparsity_weight=sparsity_weight,
            k=k,
            k_aux=k_aux,
            reconstruction_only=reconstruction_only,
        )
        engine = Engine(precision, dense_grad)
        return batch_loss(self, Rows(x, columns), settings, engine, downstream=downstream)

    @torch.no_grad()
    def update_fired_(self, code: ops.Code | Tensor, n_tokens: int) -> None:
        """Count `n_tokens` more silent tokens for each latent that did not fire in `code`.

        In place of a code, which latents fired, [F] bool.
        """
        fired = code if isinstance(code, Tensor) else code.fired()
        self.tokens_since_fired.add_(n_tokens).masked_fill_(fired, 0)

    @torch.no_grad()
    def observe(self, code: ops.Code) -> dict[str, Tensor]:
        """Return sums over the tokens of a training loss's code, 0-d, which `after_step_` takes.

        Call it before the weights change. The sums of the parts of a step are added up.
        """
        found = self.architecture.observe(code)
        return found | self.architecture.observe_excess(self.weights, code)

    @torch.no_grad()
    def after_step_(
        self,
        code: ops.Code,
        sparsity_weight: float | Tensor = 1.0,
        observed: dict[str, Tensor] | None = None,
    ) -> None:
        """Update the architecture's buffers after a step, see `Architecture.after_step_`.

        The next step is decorrelated in other chunks.

        Args:
            code: of the training loss, of the last part of a step.
            sparsity_weight: of the step.
            observed: of `observe`, for a step of several parts the sums over them.
        """
        if observed is None:
            observed = self.observe(code)
        if self.decorrelation_draw is not None:
            self.decorrelation_draw.add_(1)
        self.architecture.after_step_(self.weights, code, observed, sparsity_weight)

    @torch.no_grad()
    def clamp_parameters_(self) -> None:
        """Put the architecture's own parameters back into their range, after an update."""
        self.architecture.clamp_parameters_(self.weights)

    def dead_mask(self) -> Tensor:
        """Return which latents have been silent for `dead_after_tokens`, [F] bool."""
        return self.tokens_since_fired >= self.config.kept_dead_after_tokens

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms of the loss, which are also components of it."""
        shared = ("recon_loss", "l1_loss", "decorr_loss", "aux_loss")
        own = (*self.architecture.term_names, *self.guidance.term_names)
        return tuple(dict.fromkeys((*shared, *own)))

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the components of the loss that are measured and not minimised."""
        own = (*self.architecture.metric_names, *self.guidance.metric_names)
        return ("fvu", "l0", *own)

    # ---- metrics of a code and a reconstruction at hand --------------------------------------

    def compute_loss_components(
        self,
        x: Tensor,  # [..., D], activations as they are
        x_hat: Tensor,  # in the shape of x
        h: ops.SparseCode | Tensor,  # the code of x; dense, [..., F]
        probe_loss: Tensor | None = None,
        temporal_loss: Tensor | None = None,
        **further_terms: Tensor,
    ) -> dict[str, float | Tensor]:
        """Return the loss of a reconstruction as numbers by term, and a tensor for backward.

        recon_loss, l1_loss, decorr_loss, probe_loss and temporal_loss carry the coefficients of the
        configuration and add up, with independence_loss and orthogonality_loss where the model has
        them and with the terms given besides, to total_loss; total_loss_tensor is that sum with its
        graph. recon_loss is of x_hat alone and l1_loss of h alone: of matryoshka the smaller
        dictionaries are left out, of gated the gates that are not h.

        Args:
            x: the activations; of a transcoder the targets, [..., d_out].
            x_hat: their reconstruction, as `decode` and `forward` give it.
            h: their code, as `encode` gives it, or as a dense tensor.
            probe_loss: 0-d, without its coefficient; None: 0.
            temporal_loss: 0-d, without its coefficient; None: 0.
            **further_terms: 0-d, with their coefficients: what h does not determine, as AuxK or the
                gradient of jumprelu's penalty.
        """
        rows, rows_hat = rows_of_both(self, x, x_hat)
        error = rows_hat - rows
        config = self.config
        tokens = self._token_units(rows)
        if config.has_scale:
            error = error * self.output_scale
            rows = (rows - self.output_mean) * self.output_scale
        elif tokens is not None:
            error, rows = error / tokens.divisor, tokens.normalized(rows)
        code = metrics.as_code(config, self._normalized(h, None, tokens), len(error))
        penalty = self.architecture.penalty(self.weights, code)
        terms: dict[str, float | Tensor] = {
            "recon_loss": metrics.reconstruction_term(config, error, rows),
            "l1_loss": (config.l1_penalty_coeff or 0.0) * penalty,
            "decorr_loss": decorrelation_term(self),
        }
        if config.independence_coeff or config.orthogonality_coeff:
            terms |= self.guidance.correlation_terms(code.dense())
        terms["probe_loss"] = 0.0
        if probe_loss is not None:
            terms["probe_loss"] = config.probe_loss_coeff * probe_loss
        terms["temporal_loss"] = 0.0
        if temporal_loss is not None:
            terms["temporal_loss"] = config.temporal_smoothness_coeff * temporal_loss
        return metrics.weighted_sum({**terms, **further_terms}, error)

    def get_activation_stats(
        self,
        h: ops.SparseCode | Tensor,  # dense: [..., F]
    ) -> dict[str, float]:
        """Return how active the latents are in a code.

        l0: latents that fire, per token; activation_fraction: their share of d_sae;
        mean_activation, max_activation: of the values of those that fire, of abs_topk of their
        magnitudes, 0 if none does;
        silent_fraction: share of the latents that fire for no token of `h`; dead_fraction: share
        that has been silent for dead_after_tokens of training.
        """
        return metrics.activation_stats(self.config, h, self.dead_mask())

    def get_reconstruction_error(
        self,
        x: Tensor,  # [..., D], activations as they are
        x_hat: Tensor,  # in the shape of x
    ) -> dict[str, float]:
        """Return how far a reconstruction is from the activations, in their units.

        Of a transcoder x are the targets. Sums are in float64.

        squared_error: Σ_d (x̂ − x)², averaged over tokens; mse: averaged over numbers;
        fvu: Σ (x̂ − x)² by Σ (x − mean(x))² over all tokens; explained_variance: 1 − fvu;
        explained_variance_overall: 1 − mse / x.var(), with one variance of all numbers;
        relative_error: |x̂ − x| / |x|, the norms over all tokens; cosine: of x and x̂, averaged over
        tokens.
        """
        return metrics.reconstruction_error(*rows_of_both(self, x, x_hat))

    @torch.no_grad()
    def mean_squared_cosine(self) -> Tensor:
        """Return the mean of (ŵ_i·ŵ_j)² over pairs of different decoder rows, 0-d; 0 of one row."""
        return self.engine.mean_squared_cosine(self.W_dec)

    # ---- inside a model ----------------------------------------------------------------------

    def attached(
        self,
        model: nn.Module,
        hook: str | None = None,
        mode: Mode = "replace",
        *,
        target_hook: str | None = None,
        record: bool = True,
        gradients: bool = False,
    ) -> AbstractContextManager[Intervention]:
        """Put the autoencoder into a transformers model: `with sae.attached(model, …) as run:`.

        Inside the context every forward pass of the model goes through it, also in `generate`.
        `run` is an `Intervention`: its `add`, `set`, `scale`, `clamp` and `ablate` edit codes,
        `run.codes` has the code of every pass, and `run.calls` their number. After the context,
        also after an error, the model is as it was. Several autoencoders may be attached at once,
        each in a context of its own; at one hook point they act in the order in which they were
        attached, each on the activations that the one before has left there.

        The activations keep their dtype and device. Padding, where an attention mask says what it
        is, is neither changed nor encoded.

        Args:
            model: a transformers model, or any module that takes input_ids.
            hook: a hook point as in a capture: residual.3, attn_out.3, mlp_out.3, resid_pre.3,
                mlp_in.3, z.3, a module's path, or one with :in for its input; or a name of
                TransformerLens. None: the one of the activations that it was trained on.
            mode: "replace", "error" or "observe", see `Intervention`.
            target_hook: of a transcoder, where its prediction is put, as mlp_out.3; None: where the
                targets that it was trained on are from.
            record: whether to keep the code of every pass.
            gradients: whether `run.attribution` is to be called.

        Raises:
            ValueError: in one line, for a hook point that there is not, or of another width, and
                for a model of another name than the origin has, unless `hook` is given: then it
                is a warning.
        """
        from sae_fast.autoencoder.attached import attach

        return attach(self, model, hook, mode, target_hook, record=record, gradients=gradients)

    def hook(
        self, mode: Mode = "replace", *, record: bool = True, gradients: bool = False
    ) -> Intervention:
        """Return the autoencoder as a function that is put into a model by other means.

        `module.register_forward_hook(sae.hook())`, `run_with_hooks(tokens, fwd_hooks=[(name,
        sae.hook())])` of TransformerLens, and `layer.output = hook(layer.output)` in a trace of
        nnsight. It knows nothing of padding, and positions are counted from the first token of a
        pass. Arguments as for `attached`. A transcoder, which reads and writes at two places, needs
        `attached`.
        """
        from sae_fast.autoencoder.intervention import Intervention

        if self.config.transcoder:
            raise ValueError("a transcoder reads and writes at two places: use attached, not hook")
        return Intervention(self, mode, record=record, gradients=gradients)

    def attribution(
        self,
        metric: Callable[[Any], Tensor],
        model: nn.Module,
        inputs: Mapping[str, Any] | Tensor,
        hook: str | None = None,
        mode: Mode = "error",
        *,
        target_hook: str | None = None,
        patched: Mapping[str, Any] | Tensor | None = None,
        steps: int | None = None,
    ) -> ops.SparseCode:
        """Return the effect of every active latent on a metric of a model's output.

        It is gradient times value, see `Intervention.attribution`, from one forward and one
        backward pass: `sae.attribution(lambda out: out.logits[0, -1, 5], model, tokens)`. It
        estimates what the metric loses when the latent alone is ablated at that token, or with
        `patched` when it gets the value that it has there (attribution patching).

        Args:
            metric: takes the output of the model, returns a 0-d tensor.
            model, hook, mode, target_hook: see `attached`.
            inputs: keyword arguments of the model, or input_ids [B, T].
            patched: inputs of as many tokens, whose codes take the place of 0.
            steps: the number of points between the values and those in their place, at which
                gradients are taken and averaged (integrated gradients), a pass for each: then the
                sum of all effects approaches what the metric loses when all latents change. None:
                the gradient at the values themselves.

        Raises ValueError for `patched` of another number of tokens, and what `attached` raises.
        """
        from sae_fast.autoencoder.attached import attribute

        return attribute(self, metric, model, inputs, hook, mode, target_hook, patched, steps)

    # ---- the same function by other parameters -----------------------------------------------

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to unit length, in place.

        Where rows are free (decoder_norm "free") their norms go into the codes, and the function
        stays, see `fold_decoder_norms`. Where rows are to have norm 1, they are only put back to
        it, as after an update.
        """
        if self.architecture.unit_norm:
            ops.normalize_rows_(self.W_dec)
        else:
            self.fold_decoder_norms()

    def fold_decoder_norms(self) -> None:
        """Scale decoder rows to unit length and codes by their norms, in place: x_hat stays.

        With n_j the norm of row j: W_dec,j' = W_dec,j / n_j and f_j' = f_j n_j, by way of W_enc,
        b_enc, and what else has the unit of f_j: thresholds, magnitudes, a probe. Rows of zeros
        stay, and so do relation slots, whose strength has a target.

        Raises ValueError for an architecture that compares latents with each other, unless its rows
        have norm 1 already: it would choose others.
        """
        fold_decoder_norms_(self)

    def fold_normalization(self) -> SparseAutoencoder:
        """Return the same function of raw activations, as a model without normalisation.

        With s the scale: f' = f / s, b_enc' = b_enc / s, b_dec' = b_dec / s + mean. Decoder rows
        keep their norm, and the same latents are picked. Of a transcoder s is the targets' scale.
        Where b_dec is not subtracted from x, the encoder takes up the mean, see folding.py.

        Raises ValueError where each token is normalised by numbers of its own, which no parameters
        of raw activations do.
        """
        return folded_normalization(self)

    def to_saebench(
        self,
        *,
        model_name: str | None = None,
        hook_name: str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> SaebenchModel:
        """Return the autoencoder as the evaluators of SAEBench and SAELens take it.

        It has `W_enc` [D, F], `W_dec` [F, D] with rows of unit length, `b_enc`, `b_dec`, `cfg`, and
        `encode`, `decode` and `forward` on dense codes [..., F], in the units of the activations:
        normalisation and norms are folded in. Codes are made by the rule of inference.

        Args:
            model_name: of the language model; None: as the origin has it.
            hook_name: hook point, such as residual.3, which gets its name in TransformerLens; None:
                as the origin has it.
            dtype: of the weights; None: as they are.

        Raises ValueError for a transcoder, and where no hook point is known.
        """
        from sae_fast.autoencoder.saebench import to_saebench

        return to_saebench(self, model_name, hook_name, dtype)

    # ---- files -------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write `sae.safetensors` and `config.json` into `directory`, which is made if need be.

        config.json says in `units` which units parameters, thresholds and code values are in:
        "normalized", (x − activation_mean) · activation_scale, or "raw", as after
        `fold_normalization`.
        """
        write_model(directory, self.config, self.state_dict(), self.origin)

    def export(self, directory: str | Path, to: str = "saelens") -> Agreement:
        """Write a dictionary that another library reads, and return how well it agrees.

        It takes and gives raw activations: the normalisation is folded in. Beside it are rows with
        the codes that it must give, `expected_codes.safetensors`, with which what was written is
        read again and compared here, and by `python -m sae_fast.verify` at any later time.

        Args:
            directory: must not be there, or be empty; with "circuit_tracer" it may have other
                layers.
            to: "saelens", "sparsify", "dictionary_learning", "circuit_tracer" or "sae_fast".

        Raises ValueError for what the format cannot express, with the reason, before anything is
        written, and for a directory with something in it.
        """
        from sae_fast.autoencoder.exporting import export

        return export(self, directory, to)

    def push_to_hub(
        self,
        name: str,
        to: str = "sae_fast",
        *,
        subfolder: str | None = None,
        private: bool | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> str:
        """Upload the dictionary to the Hugging Face hub, with a page on it; return the address.

        It needs huggingface_hub, and an account that `hf auth login` or HF_TOKEN names. What is
        uploaded is what `export` writes, so that `from_pretrained(name)` reads it.

        Args:
            name: of the repository, owner/name; it is made if need be.
            to: the format, as `export` takes it.
            subfolder: of the repository, for one of several dictionaries.
            private: whether a new repository is private; None: the account's default.
            figures: numbers and texts for the page by name, such as `get_reconstruction_error`
                returns, or the metrics of `sae_fast.evaluate`.

        Raises ValueError, in one line, for what the format cannot express or the hub refuses.
        """
        from sae_fast.autoencoder.exporting import push_to_hub

        return push_to_hub(self, name, to, subfolder, private, figures)

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        *,
        dtype: torch.dtype | str | None = None,
        trainable: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
    ) -> SparseAutoencoder:
        """Read what `save` wrote, a checkpoint, a run's latest one, or another library's files.

        The model is in evaluation mode and records no gradients of its parameters, so that calls
        keep nothing but their results. Dictionaries of SAELens, sparsify, dictionary_learning and
        others are recognised by their files; such a model takes and gives raw activations.

        Args:
            directory: a saved model, a checkpoint, the directory of a run, a directory or file of
                another library, or `owner/name[/subfolder][@revision]` on the Hugging Face hub.
            device: where the parameters will be.
            dtype: of the parameters, by its name or as torch's: float32, which is the default, or
                for inference bfloat16, float16 or float64.
            trainable: whether the model will be trained; it then records gradients.
            subfolder: below the directory, where that is of several dictionaries.
            revision: of a repository on the hub, a branch, tag or commit; None: the newest.

        Raises FileNotFoundError or ValueError, one line naming the file and what is wrong with it.
        """
        kind = floating_dtype(dtype)
        place = model_directory(local_place(directory, subfolder, revision))
        dictionary = None if is_saved_model(place) else foreign_dictionary(place)
        config = read_config(place) if dictionary is None else config_for(dictionary, place)
        with torch.device("meta"):
            sae = cls(config)
        if dictionary is None:
            sae.origin = read_origin(place)
            tensors = read_tensors(place, sae.state_dict(), device)
        else:
            sae.origin = dict(dictionary.origin)
            tensors = state_for(sae, dictionary, device)
        sae.load_state_dict(tensors, assign=True)
        if sae.no_bias is not None:  # not in the file: all zeros
            sae.no_bias = torch.zeros(config.d_in, dtype=torch.float32, device=device)
        return sae.to(kind).train(trainable).requires_grad_(trainable)


def _per_entry(
    code: ops.SparseCode,
    numbers: Tensor,  # [N, 1]
) -> Tensor:
    """Return for every entry of a code the number of its token, in the shape of its values."""
    return numbers.flatten()[code.entry_rows()].view(code.indices.shape)
