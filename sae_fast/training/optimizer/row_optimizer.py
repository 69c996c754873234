"""Optimisers for a sparse autoencoder: AdamW, SGD, Signum, also schedule-free.

Around each goes a global clip, W_dec's gradient is projected, and its rows have unit norm.

`RowOptimizer` consumes the factors of `training_loss(dense_grad=False)`, no dense gradient.
`DenseOptimizer` does the same with an optimiser of torch on `.grad`. Equal codes give the same
parameters to fp32 rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import TrainConfig
from sae_fast.distributed.ranks import ALONE
from sae_fast.ops.reference.moments import moment_blocks
from sae_fast.ops.row_factors import MergedFactors, merge_row_factors, row_factors
from sae_fast.training.fitted_rates import BETAS, LONG, fitted_rates
from sae_fast.training.latent_rows import LatentRows
from sae_fast.training.optimizer.signum import ScheduleFreeSignum, Signum
from sae_fast.training.optimizer.states import (
    FIRST_MOMENTS,
    LR_SQUARES,
    ROWS,
    STATE_DTYPES,
    STEP,
    check_states,
)

_DECAY, _STEP_SIZE = 1, 5  # places in the scalars of update_scalars


def make_optimizer(
    sae: SparseAutoencoder,
    config: TrainConfig,
    total_steps: int = LONG,
    latent_rows: LatentRows | None = None,
) -> SparseOptimizer:
    """Make the optimiser that `config` asks for in a run of `total_steps` steps."""
    kind = RowOptimizer if config.fused else DenseOptimizer
    return kind(
        sae,
        rule="adam" if config.optimizer == "adamw" else config.optimizer,
        betas=fitted_rates(config, sae.config, total_steps).betas,
        momentum=config.kept_momentum,
        eps=config.eps,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
        precision=config.precision,
        skip_overflow=config.amp == "fp16",
        states=config.optimizer_states,
        latent_rows=latent_rows,
    )


class SparseOptimizer(ABC):
    """Base of both optimisers: a step is project, clip, the step of the rule, unit norm.

    "adam" steps as torch.optim.AdamW, "sgd" as torch.optim.SGD with momentum, "signum" as `Signum`,
    "schedule_free_signum" as `ScheduleFreeSignum`: of the last, the trained weights are
    the model's parameters, and schedule_free.py makes the model for evaluation.

    Args:
        sae: the model; its parameters are updated in place.
        rule: "adam", "sgd", "signum" or "schedule_free_signum".
        betas: adam's decay rates of the first and second moment.
        momentum: what sgd and signum keep of theirs; the last rule's share of the average.
        eps: added to adam's denominator.
        weight_decay: decoupled, but of sgd, where it is a part of the gradient.
        grad_clip: largest global norm, taken after W_dec's gradient is projected; 0: no clipping.
        precision: mode of the encoder's product, whose working copy is kept up to date.
        skip_overflow: whether a gradient that is not finite is only left out, as loss scaling needs
            it; otherwise no later step changes anything either.
        latent_rows: where each of several processes has a block of the latents, the block of this
            one: the norm is of all of them.
        states: what the moments of the weight rows are kept as, "fp32", "bf16" or "8bit". Not in
            8 bits z − y: it forgets ever more slowly, so that roundings add up (at 2000 steps on
            real activations held-out FVU is 2.6 % above float32's, at 8000 steps 24 %).

    Attributes:
        exp_avg: the first moment, the momentum, or z − y, of every parameter.
        exp_avg_sq: adam's second moment of every parameter; the other rules have none.
        exp_avg_scale, exp_avg_sq_scale: of W_enc and W_dec [F, ceil(D / 256)], where they are 8bit.
        step_count: 0-d int64 on the model's device, the updates made.
        halted: 0-d int64 there, their number when a gradient was not finite; -1: none was.
        lr_squares: 0-d float64 there, Σ lr² of the updates, for schedule_free_signum; or None.
    """

    dense_grad: bool  # the kind of gradient that it needs, see Engine

    def __init__(
        self,
        sae: SparseAutoencoder,
        *,
        rule: str = "adam",
        betas: tuple[float, float] = BETAS,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        precision: str = "screened",
        skip_overflow: bool = False,
        states: str = "fp32",
        latent_rows: LatentRows | None = None,
    ):
        if rule not in FIRST_MOMENTS:
            raise ValueError(f"rule must be one of {', '.join(FIRST_MOMENTS)}, got {rule!r}")
        if rule == "schedule_free_signum" and states == "8bit":
            raise ValueError(f"states must be 'fp32' or 'bf16' with rule {rule}, got {states!r}")
        self.sae = sae
        self.rule = rule
        self.betas = betas
        self.momentum = momentum
        self.eps = eps
        self.weight_decay = weight_decay
        self.grad_clip = grad_clip
        self.precision = precision
        self.skip_overflow = skip_overflow
        self.device = sae.W_enc.device
        self.step_count = torch.zeros((), dtype=torch.int64, device=self.device)
        self.halted = torch.full_like(self.step_count, -1)
        averages = rule == "schedule_free_signum"
        self.lr_squares = self.step_count.double() if averages else None
        self.states = states
        trained = sae.architecture.trained()
        names = (name for name, _ in sae.named_parameters())
        self.names = tuple(name for name in names if trained is None or name in trained)
        self.rows = tuple(name for name in ROWS if name in self.names)  # both or none
        self.latent_rows = latent_rows or LatentRows(ALONE, sae.config)
        self.rate_shares = sae.architecture.learning_rates()
        self.exp_avg = {name: self._new_moment(name) for name in self.names}
        scaled = self.rows if states == "8bit" else ()
        self.exp_avg_scale = {name: self._new_scale(name) for name in scaled}
        has_squares = rule == "adam"
        self.exp_avg_sq = {name: self._new_moment(name) for name in self.names if has_squares}
        self.exp_avg_sq_scale = {name: self._new_scale(name) for name in scaled if has_squares}

    @abstractmethod
    def step(
        self,
        lr: float | Tensor,
        loss_scale: float | Tensor = 1.0,
        *,
        fault: Tensor | None = None,
        losses: Tensor | None = None,
        await_decoder: Callable[[], None] | None = None,
    ) -> Tensor:
        """Update the parameters from the gradients of `loss_scale` times the loss.

        Rate and scale may be 0-d tensors. Returns the gradient's global norm before the clip, 0-d;
        not finite: no update. It is NaN where `fault`, 0-d, or the first of `losses` is given and
        not finite. `await_decoder` is called before the dense sides of W_dec's factors are read.
        """

    def zero_grad(self) -> None:
        """Drop all gradients and factors."""
        for name in self.names:
            parameter = self._parameter(name)
            parameter.grad = None
            row_factors(parameter).clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Return step count and moments under names that both classes share; no copies."""
        first = FIRST_MOMENTS[self.rule]
        kinds = {
            first: self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            f"{first}_scale": self.exp_avg_scale,
            "exp_avg_sq_scale": self.exp_avg_sq_scale,
        }
        state = {STEP: self.step_count}
        if self.lr_squares is not None:
            state[LR_SQUARES] = self.lr_squares
        for kind, tensors in kinds.items():
            state |= {f"{name}.{kind}": tensor for name, tensor in tensors.items()}
        return state

    def check_rule(self, state: dict[str, Tensor]) -> None:
        """Raise ValueError where a `state_dict` is another rule's, or keeps moments otherwise."""
        check_states(state, self.rule, self.states, self.exp_avg)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a `state_dict`; raise ValueError naming a tensor that does not fit."""
        self.check_rule(state)
        for name, tensor in self.state_dict().items():
            if name not in state:
                raise ValueError(f"optimiser state: has no tensor {name}")
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"optimiser state: {name} must have shape {tuple(tensor.shape)}, "
                    f"got {tuple(state[name].shape)}"
                )
            tensor.copy_(state[name])
        self.halted.fill_(-1)

    def _parameter(self, name: str) -> torch.nn.Parameter:
        return self.sae.get_parameter(name)

    def _new_moment(self, name: str) -> Tensor:
        dtype = STATE_DTYPES[self.states] if name in ROWS else torch.float32
        return torch.zeros_like(self._parameter(name), dtype=dtype, requires_grad=False)

    def _new_scale(self, name: str) -> Tensor:
        d_sae, d_in = self._parameter(name).shape
        return torch.zeros(d_sae, moment_blocks(d_in), device=self.device)


@dataclass(frozen=True)
class _RowGradient:
    """A factored gradient with what `row_gradient_norm` learned about it."""

    factors: MergedFactors
    extra_grad: Tensor | None
    squared_norm: Tensor
    sums: Tensor
    cached: Tensor
    cache_slots: Tensor


class RowOptimizer(SparseOptimizer):
    """The step on row factors: everything from clip to unit norm in one pass over the rows."""

    dense_grad = False

    @torch.no_grad()
    def step(
        self,
        lr: float | Tensor,
        loss_scale: float | Tensor = 1.0,
        *,
        fault: Tensor | None = None,
        losses: Tensor | None = None,
        await_decoder: Callable[[], None] | None = None,
    ) -> Tensor:
        """Update the parameters, see `SparseOptimizer.step`; never waits for the device."""
        rows = self._measure_rows(await_decoder) if self.rows else {}
        if rows:
            squared, more = rows["W_enc"].squared_norm, rows["W_dec"].squared_norm
        else:
            squared, more = torch.zeros((), dtype=torch.float64, device=self.device), None
        vectors = [name for name in self.names if name not in ROWS]
        divided = self.latent_rows.divided({name: self._parameter(name) for name in vectors})
        if divided:
            self._add_squares_(squared, list(divided), more)
            squared, more = self.latent_rows.sum(squared), None
        self._add_squares_(squared, [name for name in vectors if name not in divided], more)
        norm, scalars = ops.update_scalars(
            squared,
            self._scalar(lr, torch.float64),
            self._scalar(loss_scale, torch.float32),
            self.step_count,
            self.halted,
            lr_squares=self.lr_squares,
            rule=self.rule,
            grad_clip=self.grad_clip,
            beta1=self.betas[0] if self.rule == "adam" else self.momentum,
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay,
            skip_overflow=self.skip_overflow,
            fault=fault,
            losses=losses,
        )
        for name, measured in rows.items():
            self._update_rows(name, measured, scalars)
        # After the rows: W_enc's factors are taken relative to the b_dec that the encoder saw.
        self._update_vectors(vectors, scalars)
        return norm

    def _add_squares_(
        self, squared: Tensor, names: Sequence[str], more: Tensor | None = None
    ) -> None:
        """Add `more` and the squares of vectors' gradients to a sum, two at a time."""
        grads = [grad for name in names if (grad := self._parameter(name).grad) is not None]
        if not grads and more is not None:
            squared.add_(more)
        for first in range(0, len(grads), 2):
            second = grads[first + 1] if first + 1 < len(grads) else None
            ops.add_squares_(squared, grads[first], second, more if first == 0 else None)

    def _measure_rows(self, await_decoder: Callable[[], None] | None) -> dict[str, _RowGradient]:
        sae = self.sae
        merged = merge_row_factors(sae.W_enc, sae.W_dec)
        encoder = self._measure("W_enc", next(merged), project_onto=None)
        if await_decoder is not None:
            await_decoder()
        onto = sae.W_dec if sae.architecture.unit_norm else None
        return {"W_enc": encoder, "W_dec": self._measure("W_dec", next(merged), project_onto=onto)}

    def _scalar(self, value: float | Tensor, dtype: torch.dtype) -> Tensor:
        """Return a number as a tensor on the device, without waiting for it."""
        if isinstance(value, Tensor):
            return value.to(self.device, dtype, non_blocking=True)
        return torch.full((), value, dtype=dtype, device=self.device)

    def _measure(
        self, name: str, factors: MergedFactors, project_onto: Tensor | None
    ) -> _RowGradient:
        extra_grad = self._parameter(name).grad
        measured = ops.row_gradient_norm(
            factors.latent_offsets,
            factors.rows,
            factors.coefficients,
            factors.dense,
            factors.shift,
            project_onto,
            extra_grad,
        )
        return _RowGradient(factors, extra_grad, *measured)

    def _update_rows(self, name: str, grad: _RowGradient, scalars: Tensor) -> None:
        unit_norm = name == "W_dec" and self.sae.architecture.unit_norm
        W = self._parameter(name)
        ops.fused_update_(
            W,
            self.exp_avg[name],
            self.exp_avg_sq.get(name),
            grad.factors.latent_offsets,
            grad.factors.rows,
            grad.factors.coefficients,
            grad.factors.dense,
            grad.factors.shift,
            grad.extra_grad,
            grad.sums,
            grad.cached,
            grad.cache_slots,
            scalars,
            rule=self.rule,
            project=unit_norm,
            unit_norm=unit_norm,
            precision=self.precision,
            exp_avg_scale=self.exp_avg_scale.get(name),
            exp_avg_sq_scale=self.exp_avg_sq_scale.get(name),
            step_count=self.step_count,
        )

    def _update_vectors(self, names: Sequence[str], scalars: Tensor) -> None:
        """Update the vectors, two at a time where they have one rate."""
        common = [self._vector(name) for name in names if name not in self.rate_shares]
        for first in range(0, len(common), 2):
            second = common[first + 1] if first + 1 < len(common) else None
            ops.update_vector_(*common[first], scalars, rule=self.rule, second=second)
        for name in names:
            if (share := self.rate_shares.get(name)) is not None:
                shared = _with_rate_share(scalars, share)
                ops.update_vector_(*self._vector(name), shared, rule=self.rule)

    def _vector(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return a vector, its moments and its gradient."""
        vector = self._parameter(name)
        return vector, self.exp_avg[name], self.exp_avg_sq.get(name), vector.grad


def _with_rate_share(scalars: Tensor, share: float) -> Tensor:
    """Return what `update_scalars` gives for `share` times the learning rate."""
    scalars = scalars.clone()
    scalars[_STEP_SIZE].mul_(share)
    scalars[_DECAY].sub_(1).mul_(share).add_(1)
    return scalars


class DenseOptimizer(SparseOptimizer):
    """An optimiser of torch on dense gradients, with projection, clip and unit norm around it.

    Its step reads the gradient's norm, and so waits for the device.
    """

    dense_grad = True

    def __init__(self, sae: SparseAutoencoder, *, states: str = "fp32", **settings: Any) -> None:
        if states != "fp32":
            raise ValueError(f"states must be 'fp32' for dense gradients, got {states!r}")
        super().__init__(sae, states=states, **settings)
        parameters = [self._parameter(name) for name in self.names]
        self.torch_optimizer = self._torch_optimizer(parameters)
        for name, parameter in zip(self.names, parameters, strict=True):
            state = {FIRST_MOMENTS[self.rule]: self.exp_avg[name]}
            if self.rule == "adam":
                state |= {"step": torch.zeros(()), "exp_avg_sq": self.exp_avg_sq[name]}
            self.torch_optimizer.state[parameter] = state

    def _torch_optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Make torch's optimiser; every parameter is a group, whose learning rate a step sets."""
        groups = [{"params": [parameter]} for parameter in parameters]
        decay = self.weight_decay
        if self.rule == "adam":
            return torch.optim.AdamW(groups, betas=self.betas, eps=self.eps, weight_decay=decay)
        if self.rule == "sgd":
            return torch.optim.SGD(groups, momentum=self.momentum, weight_decay=decay)
        if self.rule == "schedule_free_signum":
            return ScheduleFreeSignum(groups, lr=0.0, momentum=self.momentum, weight_decay=decay)
        return Signum(groups, lr=0.0, momentum=self.momentum, weight_decay=decay)

    @torch.no_grad()
    def step(
        self,
        lr: float | Tensor,
        loss_scale: float | Tensor = 1.0,
        *,
        fault: Tensor | None = None,
        losses: Tensor | None = None,
        await_decoder: Callable[[], None] | None = None,
    ) -> Tensor:
        """Update the parameters, see `SparseOptimizer.step`."""
        for number in (fault, None if losses is None else losses[0]):
            if number is not None:
                loss_scale = loss_scale + 0 * number
        parameters = [self._parameter(name) for name in self.names]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.div_(loss_scale)
        W_dec, unit_norm = self.sae.W_dec, bool(self.rows) and self.sae.architecture.unit_norm
        if unit_norm:
            assert W_dec.grad is not None
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        is_finite = math.isfinite(float(norm))
        if not is_finite and not self.skip_overflow and self.halted < 0:
            self.halted.copy_(self.step_count)
        if not is_finite or self.halted >= 0:
            return norm
        if self.grad_clip > 0:
            factor = (self.grad_clip / (norm + 1e-6)).clamp_max(1.0)
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(factor)
        self.step_count += 1
        for name, group in zip(self.names, self.torch_optimizer.param_groups, strict=True):
            group["lr"] = float(lr) * self.rate_shares.get(name, 1.0)
        if self.lr_squares is not None:
            self.lr_squares += float(lr) ** 2
            for group in self.torch_optimizer.param_groups:
                group["average_share"] = float(lr) ** 2 / float(self.lr_squares)
        self.torch_optimizer.step()
        if unit_norm and self.lr_squares is not None:  # z and y are divided by the same
            self.exp_avg["W_dec"].div_(W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))
        if unit_norm:
            ops.normalize_rows_(W_dec)
        return norm

    def check_rule(self, state: dict[str, Tensor]) -> None:
        """Raise ValueError where a `state_dict` is another rule's, or keeps moments otherwise."""
        check_states(state, self.rule, self.states, self.exp_avg)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a `state_dict`, see `SparseOptimizer.load_state_dict`."""
        super().load_state_dict(state)
        for values in self.torch_optimizer.state.values():
            if "step" in values:
                values["step"].copy_(self.step_count)
