"""The sparse autoencoder: parameters, encode and decode, its training loss, and its files.

Rows are latents in both matrices. The parameters live in normalised units, (x − mean) · scale:
`encode`, `decode` and `forward` take and give activations as they are, `training_loss` takes them
normalised. A transcoder has targets y in place of what is reconstructed, see transcoder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast import ops
from sae_fast.autoencoder import losses
from sae_fast.autoencoder.architecture import (
    ArchitectureLoss,
    Batch,
    Mode,
    Weights,
    WholeStep,
)
from sae_fast.autoencoder.architectures import ARCHITECTURES
from sae_fast.autoencoder.decorrelation import decorrelation_loss
from sae_fast.autoencoder.files import read_config, read_origin, read_tensors, write_model
from sae_fast.autoencoder.guidance import Guidance
from sae_fast.autoencoder.initialization import (
    centre,
    initialize_apart_,
    initialize_matrices_,
    sample_rows,
)
from sae_fast.autoencoder.losses import TrainingLoss
from sae_fast.autoencoder.measures import Measures
from sae_fast.autoencoder.probe import predictions
from sae_fast.autoencoder.transcoder import (
    SKIP,
    fold_input_,
    skip,
    transcoder_buffers,
    transcoder_parameters,
)
from sae_fast.autoencoder.units import require_tensor
from sae_fast.autoencoder.unpacking import refuse_unpacking
from sae_fast.config import RunConfig, SAEConfig
from sae_fast.ops.full_precision import addmm
from sae_fast.text_links import followed

_UNIT = 1e-5  # how far the norm of a row may be from 1 and still be called 1


class SparseAutoencoder(Measures):
    """x̂ = Σ_j f_j W_dec,j + b_dec with f = TopK((x − b_dec) W_encᵀ + b_enc), unit rows in W_dec.

    What takes the place of TopK is the architecture's choice, see the file of its name. `origin`
    tells of which activations it is, by names such as model, hook and layer; it is saved with it.

    Raises ValueError where the configuration leaves d_in open.
    """

    no_bias: Tensor | None  # [D], zeros subtracted from x where b_dec is not
    tokens_since_fired: Tensor  # [F] int64
    decorrelation_draw: Tensor | None  # 0-d int64, which random chunks are next, if there are any

    @torch.inference_mode(False)
    def __init__(self, config: SAEConfig | RunConfig):
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
        self.architecture = ARCHITECTURES[config.arch](config)
        self.guidance = Guidance(config)
        dtype = torch.float32  # whatever the default is: the kernels take no other
        d_in, d_sae, width = config.d_in, config.d_sae, config.target_width
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
            self.register_parameter(name, nn.Parameter(start))
        for name, start in (self.architecture.buffers() | transcoder_buffers(config)).items():
            self.register_buffer(name, start)
        subtracts_nothing = config.transcoder or not config.subtract_b_dec
        no_bias = torch.zeros(d_in, dtype=dtype) if subtracts_nothing else None
        self.register_buffer("no_bias", no_bias, persistent=False)
        self._own_names = tuple(self._own_start())
        if not self.W_dec.is_meta:
            self._initialize_weights(None)

    @torch.no_grad()
    def initialize_(
        self,
        generator: torch.Generator | None = None,
        sample: Tensor | None = None,  # [N, D], normalised
        targets: Tensor | None = None,  # [N, d_out], normalised, those of the sample
    ) -> None:
        """Start afresh from `generator`, and from `sample` where the configuration asks for one."""
        config = self.config
        if sample is None and sample_rows(config) > 0:
            name = "b_dec_init" if config.b_dec_init != "zero" else "decoder_init"
            raise ValueError(f"{name} = {getattr(config, name)!r} needs a sample of activations")
        rows = None if sample is None else self._rows(sample)
        modelled = rows if rows is None else self._targets(rows, targets)
        self._initialize_weights(generator, rows, modelled)
        self.b_enc.zero_()
        self.b_dec.zero_()
        if modelled is not None:
            self.b_dec.copy_(centre(modelled, config))
        self.tokens_since_fired.zero_()
        if self.decorrelation_draw is not None:
            self.decorrelation_draw.zero_()
        for name, start in self._own_start().items():
            getattr(self, name).copy_(start)

    @torch.no_grad()
    def _initialize_weights(
        self,
        generator: torch.Generator | None,
        sample: Tensor | None = None,  # [N, D]
        modelled: Tensor | None = None,  # [N, D], or of a transcoder [N, d_out]
    ) -> None:
        method = self.config.decoder_init
        if self.config.transcoder:
            initialize_apart_(self.W_enc, self.W_dec, method, generator, sample, modelled)
        else:
            initialize_matrices_(self.W_enc, self.W_dec, method, generator, sample)
            self.W_enc.mul_(self._encoder_share())
        if (norm := self.config.decoder_init_norm) is not None and norm != 1:
            self.W_dec.mul_(norm)
            self.W_enc.mul_(norm)

    def _encoder_share(self) -> float:
        """How long W_enc's rows are at the start, compared with those that are tied to W_dec.

        Half of a ReLU model's latents are active then, and unit rows would add up to
        d_sae / (2 d_in) times x, without ReLU to twice that: the first loss of 100,000 slots would
        be thousands of variances.
        """
        config = self.config
        is_long = config.arch in ("relu", "slots") and config.decoder_norm == "unit"
        if not is_long or config.decoder_init == "kaiming":
            return 1.0
        return min(1.0, (2 if config.use_relu else 1) * config.d_in / config.d_sae)

    def encode(
        self,
        x: Tensor,  # [..., D], activations as they are
        *,
        precision: str = "screened",
        dense_grad: bool = True,
    ) -> ops.SparseCode:
        """Return the code of every activation, one row each.

        Values are in normalised units: one unit of latent j adds `direction(j)` to x_hat.
        """
        rows = self.normalize(self._rows(x))
        return self.architecture.infer(self.weights, rows, Mode(precision, dense_grad))

    def decode(
        self,
        code: ops.SparseCode | Tensor,  # dense: [..., F]
        x: Tensor | None = None,  # [..., D], activations as they are
        *,
        dense_grad: bool = True,
    ) -> Tensor:
        """Reconstruct activations, in their own units, from a code: [N, D], or [..., D] if dense.

        Values of the code are in the units that `encode` gives, see `direction`.
        Of a transcoder the result is what it predicts, with d_out columns; a skip connection also
        needs the `x` that was encoded. A dense code leaves dense gradients in any case.
        """
        if not isinstance(code, ops.Code):
            require_tensor(code, "code")
        elif code.d_sae != self.config.d_sae:
            raise ValueError(
                f"code must have {self.config.d_sae} latents as the model has, got {code.d_sae}"
            )
        if not isinstance(code, Tensor) and not self.config.use_relu:
            code = code.dense()  # every latent is in it
        if isinstance(code, Tensor):
            h = self._rows(code, "h", "d_sae")
            shape, precision = code.shape[:-1], "fp32"
            x_hat = addmm(self.b_dec, h, self.W_dec)
        else:
            shape, precision = torch.Size([code.n_rows]), code.precision
            x_hat = ops.decode(code, self.W_dec, self.b_dec, dense_grad=dense_grad)
        if self.config.skip_connection:
            if x is None:
                raise ValueError("x must be given: the model has a skip connection")
            rows = self.normalize(self._rows(x))
            x_hat = x_hat + skip(rows, self.get_parameter(SKIP), precision)
        return self.denormalize(x_hat).reshape(*shape, self.config.target_width)

    def direction(
        self,
        latent: int | slice | Tensor,  # int64 or bool if a tensor
    ) -> Tensor:
        """Return what one unit of a latent's code value adds to x_hat, in the units of x: [D].

        It is the latent's decoder row divided by the activations' scale. Of several latents the
        shape is [..., D], of a transcoder D is d_out. To steer, add a multiple of it to x.
        """
        rows = self.W_dec[latent]
        return rows if self.config.normalize_activations == "none" else rows / self.output_scale

    def forward(
        self,
        x: Tensor,  # [..., D], activations as they are
    ) -> Tensor:
        """Reconstruct `x`, in its shape; of a transcoder return what it predicts from `x`.

        The result is x_hat alone and refuses to be unpacked, see `forward_with_code`.
        """
        return refuse_unpacking(self.forward_with_code(x)[0])

    def forward_with_code(
        self,
        x: Tensor,  # [..., D], activations as they are
    ) -> tuple[Tensor, ops.SparseCode]:
        """Return the reconstruction of `x`, in its shape, and the code that it is made from."""
        code = self.encode(x)
        x_hat = self.decode(code, x)
        return x_hat.reshape(*x.shape[:-1], self.config.target_width), code

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
        behind: Callable[[Tensor], Tensor] | None = None,
        whole: WholeStep | None = None,
    ) -> TrainingLoss:
        """The weighted sum of the loss terms of a batch.

        Backward leaves ordinary gradients, or without `dense_grad` row factors for `RowOptimizer`.

        Args:
            x: the batch.
            targets: what a transcoder is to predict; other models have none.
            precision: mode of the encoder's product, as for `encode`.
            dense_grad: whether backward leaves dense gradients.
            k_aux: room for dead latents in AuxK, per token: at least as many as are dead, up to
                aux_k. More changes nothing. By default the host counts them, and waits for that.
            sparsity_weight: what the terms that make codes sparse are multiplied by.
            k: latents active per token, while it is annealed; by default the model's.
            labels: what the probe is to predict, if there is one; -1: nothing.
            starts: which tokens do not go on from the one before, for the temporal loss.
            relations, answers: of arch slots, -1: none.
            reconstruction_only: whether all other terms are left out.
            behind: of loss_fn ce and kl: the loss, 0-d, of the model that goes on from a
                reconstruction [N, D], normalised.
            whole: the optimiser step that the batch is one of several parts of, see
                `whole_step`; the mean loss of the parts is then that of the batch that they make.

        Raises ValueError where `behind` does not go with loss_fn.
        """
        if (behind is None) == self.config.is_end_to_end:
            raise ValueError(
                f"behind must {'not ' if behind else ''}be given with loss_fn {self.config.loss_fn}"
            )
        x = self._rows(x)
        weights, y = self.weights, self._targets(x, targets)
        target = self._left_to_the_code(x, y, precision)
        if whole is None:
            variance = losses.total_variance(y.detach())
        else:  # the part's share of it
            variance = whole.variance / whole.n_parts
        options = (k_aux, sparsity_weight, k, reconstruction_only, self._error_weight(y, variance))
        batch = Batch(x, target, self.dead_mask(), *options, relations, answers, behind, whole)
        own = self.architecture.loss(weights, batch, Mode(precision, dense_grad))
        total, components = self._weighted_sum(own, x, labels, starts, reconstruction_only)
        components["fvu"] = losses.steady_sum(own.squared_error.detach()) / variance
        components["l0"] = losses.ratio(own.code.n_active(), own.code.n_rows)
        if self.config.transcoder:
            variance = variance + losses.total_variance(x.detach())
        return TrainingLoss(total, components, own.code, variance)

    def _weighted_sum(
        self,
        own: ArchitectureLoss,
        x: Tensor,  # [N, D]
        labels: Tensor | None,  # [N]
        starts: Tensor | None,  # [N] bool
        reconstruction_only: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms with their coefficients added up; each, and the figures, by name, detached."""
        none = x.new_zeros(())
        terms = {
            "recon_loss": self.config.reconstruction_coeff * own.recon_loss,
            "l1_loss": none,
            "decorr_loss": none if reconstruction_only else self._decorr_loss(),
            "aux_loss": none,
            **own.terms,
        }
        if reconstruction_only:
            guided, figures = self.guidance.nothing(x)
            terms = {name: t if name == "recon_loss" else none for name, t in terms.items()}
        else:
            guided, figures = self.guidance.terms(self.weights.own, own.code, labels, starts)
        terms |= guided
        components = {name: term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum(), components | own.figures | figures

    def _left_to_the_code(self, x: Tensor, y: Tensor, precision: str) -> Tensor:
        """What the code of x is to model: y without what a skip connection gives."""
        if not self.config.skip_connection:
            return y
        return y - skip(x, self.get_parameter(SKIP), precision)

    def _error_weight(self, y: Tensor, variance: Tensor) -> Tensor | None:
        """What makes the mean squared error of a batch the term that loss_fn names; None: 1."""
        if self.config.loss_fn != "fvu":
            return None
        return len(y) * losses.one_by_variance(y.detach(), variance)

    @torch.no_grad()
    def whole_step(
        self,
        parts: Sequence[tuple[Tensor, Tensor | None]],  # [N, D] and targets [N, d_out], normalised
        precision: str = "screened",
    ) -> WholeStep:
        """Measure what `training_loss` must know of a step whose gradient is added up from parts.

        With jumprelu's penalty l0_target this encodes every part once more.
        """
        rows = [self._rows(x) for x, _ in parts]
        targets = [self._targets(x, y) for x, (_, y) in zip(rows, parts, strict=True)]
        variance, l0 = losses.pooled_variance(targets), None
        if self.architecture.needs_step_l0:
            weights, mode, dead = self.weights, Mode(precision), self.dead_mask()
            active = [
                self.architecture.count_active(weights, Batch(x, x, dead), mode) for x in rows
            ]
            l0 = torch.stack(active).sum() / sum(map(len, rows))
        return WholeStep(len(parts), variance, l0)

    @torch.no_grad()
    def update_fired_(self, code: ops.Code | Tensor, n_tokens: int) -> None:
        """Count `n_tokens` more silent tokens for each latent that did not fire in `code`.

        In place of a code, which latents fired, [F] bool.
        """
        fired = code if isinstance(code, Tensor) else code.fired()
        self.tokens_since_fired.add_(n_tokens).masked_fill_(fired, 0)

    @torch.no_grad()
    def follow_(
        self,
        code: ops.Code,
        sparsity_weight: float | Tensor = 1.0,
        observed: dict[str, Tensor] | None = None,
    ) -> None:
        """Let the architecture learn from a code of training what inference and later steps need.

        `sparsity_weight` is that of the `training_loss` that gave the code; `observed` has, of a
        step in several parts, the sums of `architecture.observe` over their codes. The next step is
        decorrelated in other chunks.
        """
        if observed is None:
            observed = self.architecture.observe(code)
        if self.decorrelation_draw is not None:
            self.decorrelation_draw.add_(1)
        self.architecture.follow_(self.weights, code)
        self.architecture.steer_(self.weights, observed, sparsity_weight)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Put the architecture's own parameters back to where they may be, after an update."""
        self.architecture.constrain_(self.weights)

    def dead_mask(self) -> Tensor:
        """Which latents [F] have been silent for `dead_after_tokens`."""
        return self.tokens_since_fired >= self.config.dead_after_tokens

    def probe(self, code: ops.SparseCode) -> Tensor:
        """What the probe predicts from a code: logits [N, classes], or numbers [N, 1].

        Raises ValueError where the model has no probe.
        """
        if not self.config.has_probe:
            raise ValueError("probe: the model was trained without one (see probe_loss_coeff)")
        return predictions(self.weights.own, code)

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

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """Scale decoder rows to unit length and codes by their norms, in place: x_hat stays.

        With n_j the norm of row j: W_dec,j' = W_dec,j / n_j and f_j' = f_j n_j, by way of W_enc,
        b_enc, and what else has the unit of f_j: thresholds, magnitudes, a probe. Rows of zeros
        stay, and so do relation slots, whose strength has a target.

        Raises ValueError for an architecture that compares latents with each other, unless its rows
        have norm 1 already: it would choose others.
        """
        norms = torch.linalg.vector_norm(self.W_dec, dim=1)
        if self.architecture.compares_latents:
            if bool(((norms - 1).abs() <= _UNIT).all()):
                return
            raise ValueError(
                f"decoder rows must have norm 1 with arch {self.config.arch}, which chooses the "
                f"largest values: folding would change the choice, got norms from "
                f"{float(norms.min()):g} to {float(norms.max()):g}"
            )
        factor = torch.where(norms > 0, norms, 1.0)
        if self.config.arch == "slots":
            factor[self.config.group_split :] = 1.0
        self.W_dec.div_(factor[:, None])
        self.W_enc.mul_(factor[:, None])
        self.b_enc.mul_(factor)
        self.architecture.rescale_(self.weights, factor)
        self.guidance.rescale_(self.weights.own, factor)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold_normalization(self) -> SparseAutoencoder:
        """The same function of raw activations, as a model without normalisation.

        With s the scale: f' = f / s, b_enc' = b_enc / s, b_dec' = b_dec / s + mean. Decoder rows
        keep their norm, and the same latents are picked. Of a transcoder s is that of the targets.
        Where b_dec is not subtracted from x, the encoder takes up the mean, see `fold_input_`.
        """
        values = {**self.config.to_dict(), "normalize_activations": "none"}
        folded = SparseAutoencoder(SAEConfig.from_dict(values)).to(self.W_dec.device)
        folded.load_state_dict(self.state_dict())
        folded.origin = dict(self.origin)
        folded.b_enc.div_(self.output_scale)
        folded.b_dec.div_(self.output_scale).add_(self.output_mean)
        folded.architecture.rescale_(folded.weights, 1 / self.output_scale)
        folded.guidance.rescale_(folded.weights.own, 1 / self.output_scale)
        if self.no_bias is not None:
            fold_input_(folded, self)
        for mean, scale in (
            (folded.activation_mean, folded.activation_scale),
            (folded.output_mean, folded.output_scale),
        ):
            mean.zero_()
            scale.fill_(1.0)
        return folded

    def save(self, directory: str | Path) -> None:
        """Write `sae.safetensors` and `config.json` into `directory`, which is made if need be."""
        write_model(directory, self.config, self.state_dict(), self.origin)

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        *,
        trainable: bool = False,
    ) -> SparseAutoencoder:
        """Read what `save` wrote, or a checkpoint of a training run.

        The model is in evaluation mode and records no gradients of its parameters, so that calls
        keep nothing but their results; with `trainable` it is ready to be trained.

        Raises FileNotFoundError or ValueError, one line naming the file and what is wrong with it.
        """
        directory = followed(directory)  # `latest` or `best` of a run
        config = read_config(directory)
        with torch.device("meta"):
            sae = cls(config)
        sae.origin = read_origin(directory)
        tensors = read_tensors(directory, sae.state_dict(), device)
        sae.load_state_dict(tensors, assign=True)
        if sae.no_bias is not None:  # not in the file: all zeros
            sae.no_bias = torch.zeros(config.d_in, dtype=torch.float32, device=device)
        return sae.train(trainable).requires_grad_(trainable)

    def kept_copies(self, session: object = None) -> AbstractContextManager[None]:
        """Keep the weights in the kernels' format between calls inside this context.

        It makes many calls of few tokens faster. Inside, change weights by ordinary in-place
        operations and optimisers only, not through `.data` or memory shared with NumPy, which
        nothing counts. `session` is that of `ops.kept_copies`.
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

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms of the loss, which are also components of it."""
        shared = ("recon_loss", "l1_loss", "decorr_loss", "aux_loss")
        own = (*self.architecture.term_names, *self.guidance.term_names)
        return tuple(dict.fromkeys((*shared, *own)))

    @property
    def figure_names(self) -> tuple[str, ...]:
        """Names of the components of the loss that are measured and not minimised."""
        own = (*self.architecture.figure_names, *self.guidance.figure_names)
        return ("fvu", "l0", *own)

    def _own_parameters(self) -> dict[str, Tensor]:
        """Start values of the parameters that only this architecture, or a probe or skip, has."""
        own = self.architecture.parameters() | self.guidance.parameters()
        return own | transcoder_parameters(self.config)

    def _decorr_loss(self) -> Tensor:
        """The decorrelation of the decoder's rows, with its coefficient."""
        config = self.config
        if config.decorrelation_coeff == 0:
            return self.W_dec.new_zeros(())
        form, chunk = config.decorrelation, config.decorrelation_chunk
        assert form is not None
        draw, unit = self.decorrelation_draw, config.error_of_the_mean
        penalty = decorrelation_loss(self.W_dec, form, draw, chunk, unit)
        return config.decorrelation_coeff * penalty

    @torch.no_grad()
    def mean_squared_cosine(self) -> Tensor:
        """Return the mean of (ŵ_i·ŵ_j)² over pairs of different decoder rows, 0-d; 0 of one row."""
        return decorrelation_loss(self.W_dec, "gram_mean", None, self.config.decorrelation_chunk)

    def _correlation_terms(self, dense: Tensor) -> dict[str, Tensor]:
        return self.guidance.correlation_terms(dense)

    def _own_start(self) -> dict[str, Tensor]:
        """The same with the architecture's own buffers."""
        return self._own_parameters() | self.architecture.buffers()
