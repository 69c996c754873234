"""The training loss of a model: the terms of a batch with their coefficients, added up.

The architecture computes the terms that only it has; the terms here are common to all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_fast.activations import TARGETS, Rows
from sae_fast.autoencoder import losses
from sae_fast.autoencoder.architecture import (
    ArchitectureLoss,
    Batch,
    Engine,
    StepSettings,
    WholeStep,
)
from sae_fast.autoencoder.loss_terms import LossTerm
from sae_fast.autoencoder.losses import TrainingLoss
from sae_fast.autoencoder.penalties import decorrelation_loss
from sae_fast.autoencoder.shapes import rows_of, target_of
from sae_fast.autoencoder.transcoder import SKIP, skip

if TYPE_CHECKING:
    from sae_fast.autoencoder.model import SparseAutoencoder


def batch_loss(
    sae: SparseAutoencoder,
    batch: Rows,
    settings: StepSettings = StepSettings(),  # noqa: B008
    engine: Engine = Engine(),  # noqa: B008
    *,
    downstream: Callable[[Tensor], Tensor] | None = None,
    whole: WholeStep | None = None,
    loss_terms: Sequence[LossTerm] = (),
) -> TrainingLoss:
    """Return the weighted sum of the loss terms of a batch.

    Backward leaves ordinary gradients, or without `engine.dense_grad` row factors for
    `RowOptimizer`.

    Args:
        sae: the model.
        batch: x [N, D], normalised, and columns by the names that the configuration has for
            labels; a transcoder's targets [N, d_out], normalised.
        settings: of the step; its `rate` is not used here.
        engine: how the ops are called.
        downstream: for loss_fn ce and kl, returns the loss, 0-d, of the model that continues
            from a reconstruction [N, D], normalised.
        whole: the optimiser step that the batch is one of several parts of, see
            `whole_step`; the mean loss of the parts is then the loss of all their tokens.
        loss_terms: added to the terms of the model.

    Raises ValueError where `downstream` or a column does not fit the configuration.
    """
    if (downstream is None) == sae.config.is_end_to_end:
        raise ValueError(
            f"downstream must {'not ' if downstream else ''}be given with "
            f"loss_fn {sae.config.loss_fn}"
        )
    x = rows_of(sae, batch.x)
    weights, y = sae.weights, _target_in(sae, x, batch.columns)
    target = _residual_target(sae, x, y, engine.precision)
    variance = None  # of the targets, measured with the other statistics unless a term needs it
    if whole is not None:  # the part's share of it
        variance = whole.variance / whole.n_parts
    elif sae.config.loss_fn == "fvu":
        variance = losses.total_variance(y.detach())
    own = sae.architecture.loss(
        weights,
        Batch(
            x,
            target,
            sae.dead_mask() if sae.architecture.reads_dead_mask(settings) else None,
            batch.columns,
            settings,
            _error_weight(sae, y, variance),
            downstream,
            whole,
        ),
        engine,
    )
    further = {}
    if loss_terms and not settings.reconstruction_only:
        x_hat = y + own.residual.to(y.dtype)
        further = {term.name: term.of(sae, batch, own.code, x_hat) for term in loss_terms}
    elif loss_terms:
        further = {term.name: sae.b_dec.new_zeros(()) for term in loss_terms}
    total, components = _weighted_sum(sae, own, batch, settings, further)
    squared_error = own.squared_error.detach()
    statistics = losses.batch_statistics(own.code, squared_error, y.detach(), variance)
    components["fvu"], components["l0"], variance, fired = statistics
    if not engine.has_all_latents:
        active = engine.total(own.code.n_active())
        components["l0"] = losses.ratio(active, own.code.n_rows)
    if sae.config.transcoder:
        variance = variance + losses.total_variance(x.detach())
    return TrainingLoss(total, components, own.code, variance, fired)


@torch.no_grad()
def whole_step(
    sae: SparseAutoencoder,
    parts: Sequence[Rows],
    settings: StepSettings = StepSettings(),  # noqa: B008
    engine: Engine = Engine(),  # noqa: B008
    gathered: Callable[[list[list[Tensor]]], list[list[Tensor]]] = list,
) -> WholeStep:
    """Measure what `batch_loss` must know of a step whose gradient is added up from parts.

    With jumprelu's penalty l0_target, and with AuxK where latents may be dead, this encodes every
    part once more.

    Args:
        sae: the model.
        parts: of one size; of several processes only the ones that this process makes.
        settings: of the step.
        engine: how the ops are called.
        gathered: returns the numbers of all parts, given the numbers of the parts of this process.
    """
    architecture, dead = sae.architecture, sae.dead_mask()
    has_aux_k = architecture.has_aux_k and settings.k_aux != 0 and not settings.reconstruction_only
    measured = []
    for part in parts:
        x = rows_of(sae, part.x)
        y = _target_in(sae, x, part.columns)
        numbers = [*losses.moments(y)]
        if has_aux_k:
            target = _residual_target(sae, x, y, engine.precision)
            batch = Batch(x, target, dead, settings=settings)
            numbers += losses.moments(architecture.residual(sae.weights, batch, engine))
        if architecture.needs_step_l0:
            numbers.append(architecture.count_active(sae.weights, Batch(x, x, dead), engine))
        measured.append(numbers)
    means, variances, *further = zip(*gathered(measured), strict=True)
    n_rows, n_parts = len(parts[0].x), len(means)
    variance = losses.pooled_variance(means, variances, n_rows)
    of_residual = losses.pooled_variance(further[0], further[1], n_rows) if has_aux_k else None
    l0 = None
    if architecture.needs_step_l0:
        l0 = torch.stack(further[-1]).sum() / (n_parts * n_rows)
    return WholeStep(n_parts, variance, l0, of_residual)


def decorrelation_term(sae: SparseAutoencoder) -> Tensor:
    """Return the decorrelation of the decoder's rows, with its coefficient."""
    config = sae.config
    if config.decorrelation_coeff == 0:
        return sae.W_dec.new_zeros(())
    form, chunk = config.decorrelation, config.decorrelation_chunk
    assert form is not None
    draw, unit = sae.decorrelation_draw, config.error_of_the_mean
    penalty = decorrelation_loss(sae.W_dec, form, draw, chunk, unit)
    return config.decorrelation_coeff * penalty


def _weighted_sum(
    sae: SparseAutoencoder,
    own: ArchitectureLoss,
    batch: Rows,
    settings: StepSettings,
    further: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of the terms with their coefficients; and terms and metrics, detached."""
    none, alone = losses.constant_zero(sae.b_dec), settings.reconstruction_only
    coefficient, decorrelates = sae.config.reconstruction_coeff, sae.config.decorrelation_coeff != 0
    terms = {
        "recon_loss": own.recon_loss if coefficient == 1 else coefficient * own.recon_loss,
        "l1_loss": none,
        "decorr_loss": decorrelation_term(sae) if decorrelates and not alone else none,
        "aux_loss": none,
        **own.terms,
    }
    if alone:
        guided, measured = sae.guidance.nothing(none)
        terms = {name: t if name == "recon_loss" else none for name, t in terms.items()}
    else:
        guided, measured = sae.guidance.terms(sae.weights.own, own.code, batch.columns)
    terms |= guided | further
    components = {name: term.detach() for name, term in terms.items()}
    others = [term for name, term in terms.items() if name != "recon_loss" and term is not none]
    # A zero is added where it may change the order of the sum, and nowhere else.
    total = torch.stack(list(terms.values())).sum() if others else terms["recon_loss"]
    return total, components | own.metrics | measured


def _residual_target(sae: SparseAutoencoder, x: Tensor, y: Tensor, precision: str) -> Tensor:
    """Return the target minus the skip connection's output, y − x W_skipᵀ."""
    if not sae.config.skip_connection:
        return y
    return y - skip(x, sae.get_parameter(SKIP), precision)


def _error_weight(sae: SparseAutoencoder, y: Tensor, variance: Tensor | None) -> Tensor | None:
    """Return the factor, 0-d, that makes a mean squared error the term of loss_fn; None: 1."""
    if sae.config.loss_fn != "fvu":
        return None
    assert variance is not None
    return len(y) * losses.inverse_variance(y.detach(), variance)


def _target_in(
    sae: SparseAutoencoder,
    x: Tensor,  # [N, D]
    columns: Mapping[str, Tensor],
) -> Tensor:
    """Return the target of a batch; other models than transcoders leave `columns` alone."""
    return target_of(sae, x, columns.get(TARGETS) if sae.config.transcoder else None)
