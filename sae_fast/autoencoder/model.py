"""The sparse autoencoder: parameters, encode and decode, its training loss, and its files.

Rows are latents in both matrices. The parameters live in normalised units, (x − mean) · scale:
`encode`, `decode` and `forward` take and give activations as they are, `training_loss` takes them
normalised. A transcoder reconstructs targets y in place of x, see transcoder.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

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
from sae_fast.autoencoder.architectures import ARCHITECTURES
from sae_fast.autoencoder.files import read_config, read_origin, read_tensors, write_model
from sae_fast.autoencoder.folding import fold_decoder_norms_, fold_normalization_
from sae_fast.autoencoder.guidance import Guidance
from sae_fast.autoencoder.initialization import centre, initialize_weights_, sample_rows
from sae_fast.autoencoder.losses import TrainingLoss
from sae_fast.autoencoder.penalties import decorrelation_loss
from sae_fast.autoencoder.probe import predictions
from sae_fast.autoencoder.shapes import require_tensor, rows_of, rows_of_both, target_of
from sae_fast.autoencoder.training_loss import batch_loss, decorrelation_term
from sae_fast.autoencoder.transcoder import (
    SKIP,
    skip,
    transcoder_buffers,
    transcoder_parameters,
)
from sae_fast.autoencoder.unpacking import refuse_unpacking
from sae_fast.config import RunConfig, SAEConfig
from sae_fast.ops.full_precision import addmm
from sae_fast.text_links import followed


class SparseAutoencoder(nn.Module):
    """x̂ = Σ_j f_j W_dec,j + b_dec with f = TopK((x − b_dec) W_encᵀ + b_enc), unit rows in W_dec.

    The architecture says what takes the place of TopK, see architectures.py. `origin` says of which
    activations the model is, by names such as model, hook and layer; it is saved with it.

    Raises ValueError where the configuration leaves d_in open.
    """

    activation_mean: Tensor  # [D]
    activation_scale: Tensor  # 0-d
    target_mean: Tensor  # [d_out], of a transcoder
    target_scale: Tensor  # 0-d, of a transcoder
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
            initialize_weights_(self.W_enc, self.W_dec, config, None)

    def extra_repr(self) -> str:
        """Return the architecture and its sizes, which `repr` shows."""
        config = self.config
        sizes: dict[str, Any] = {"d_in": config.d_in}
        if config.transcoder:
            sizes["d_out"] = config.d_out
        sizes["d_sae"] = config.d_sae
        if config.k is not None:
            sizes["k"] = config.k
        return ", ".join([config.arch, *(f"{name}={value}" for name, value in sizes.items())])

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
        initialize_weights_(self.W_enc, self.W_dec, config, generator, rows, modelled)
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
        own = self.architecture.parameters() | self.guidance.parameters()
        return own | transcoder_parameters(self.config)

    def _own_start(self) -> dict[str, Tensor]:
        """Return start values of the own parameters and of the architecture's buffers."""
        return self._own_parameters() | self.architecture.buffers()

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
        if self.config.normalize_activations == "none":
            raise ValueError("normalize_activations = 'none' leaves no mean and scale to set")
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
        if self.config.normalize_activations == "none":
            return x
        return (x - self.activation_mean) * self.activation_scale

    def denormalize(
        self,
        x_hat: Tensor,  # [..., D], of a transcoder [..., d_out]
    ) -> Tensor:
        """Return a reconstruction in the units of the activations, or of a transcoder's targets."""
        if self.config.normalize_activations == "none":
            return x_hat
        return x_hat / self.output_scale + self.output_mean

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
        precision: str = "screened",
        dense_grad: bool = True,
    ) -> ops.SparseCode:
        """Return the code of every activation, one row each.

        Values are in normalised units: one unit of latent j adds `direction(j)` to x_hat.
        """
        rows = self.normalize(rows_of(self, x))
        return self.architecture.infer(self.weights, rows, Engine(precision, dense_grad))

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
            h = rows_of(self, code, "h", "d_sae")
            shape, precision = code.shape[:-1], "fp32"
            x_hat = addmm(self.b_dec, h, self.W_dec)
        else:
            shape, precision = torch.Size([code.n_rows]), code.precision
            x_hat = ops.decode(code, self.W_dec, self.b_dec, dense_grad=dense_grad)
        if self.config.skip_connection:
            if x is None:
                raise ValueError("x must be given: the model has a skip connection")
            rows = self.normalize(rows_of(self, x))
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

    def probe(self, code: ops.SparseCode) -> Tensor:
        """Return what the probe predicts from a code: logits [N, classes], or numbers [N, 1].

        Raises ValueError where the model has no probe.
        """
        if not self.config.has_probe:
            raise ValueError("probe: the model was trained without one (see probe_loss_coeff)")
        return predictions(self.weights.own, code)

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
            observed: for a step of several parts, the sums of `architecture.observe` over them.
        """
        if observed is None:
            observed = self.architecture.observe(code)
        if self.decorrelation_draw is not None:
            self.decorrelation_draw.add_(1)
        self.architecture.after_step_(self.weights, code, observed, sparsity_weight)

    @torch.no_grad()
    def clamp_parameters_(self) -> None:
        """Put the architecture's own parameters back into their range, after an update."""
        self.architecture.clamp_parameters_(self.weights)

    def dead_mask(self) -> Tensor:
        """Return which latents have been silent for `dead_after_tokens`, [F] bool."""
        return self.tokens_since_fired >= self.config.dead_after_tokens

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
        if config.normalize_activations != "none":
            error = error * self.output_scale
            rows = (rows - self.output_mean) * self.output_scale
        code = metrics.as_code(config, h, len(error))
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
        return decorrelation_loss(self.W_dec, "gram_mean", None, self.config.decorrelation_chunk)

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

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold_normalization(self) -> SparseAutoencoder:
        """Return the same function of raw activations, as a model without normalisation.

        With s the scale: f' = f / s, b_enc' = b_enc / s, b_dec' = b_dec / s + mean. Decoder rows
        keep their norm, and the same latents are picked. Of a transcoder s is the targets' scale.
        Where b_dec is not subtracted from x, the encoder takes up the mean, see folding.py.
        """
        values = {**self.config.to_dict(), "normalize_activations": "none"}
        folded = SparseAutoencoder(SAEConfig.from_dict(values)).to(self.W_dec.device)
        folded.load_state_dict(self.state_dict())
        folded.origin = dict(self.origin)
        fold_normalization_(folded, self)
        return folded

    # ---- files -------------------------------------------------------------------------------

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
