"""When a setting has an effect: the one place that states it, for every setting that may have none.

A setting that was given and can change nothing beside the others is refused, in a line that names
what it needs. Given is what differs from the default and is not filled in by the program; 0, false
and null switch something off, which needs nothing. (Which architectures have a setting at all is in
dictionary.py.)

Some settings need more than the other settings, a directory or held-out rows: `RUN` has these, and
the trainer checks them when it knows its data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sae_fast.json_files import shown

if TYPE_CHECKING:
    from sae_fast.config.run import RunConfig
    from sae_fast.config.sae import SAEConfig
    from sae_fast.config.train import TrainConfig


_ROOM = 1 << 20
# Whether configurations are made that are not those of a training.
_is_trial = ContextVar("is_trial", default=False)


class IdleSettingError(ValueError):
    """A setting has no effect; `name` is that of the setting."""

    def __init__(self, name: str, value: object, needs: str) -> None:
        super().__init__(f"{name} = {shown(value)} needs {needs}")
        self.name = name


class Effect(NamedTuple):
    """When a setting has an effect.

    Attributes:
        needs: what it needs, in words that follow "needs".
        holds: whether a configuration has that, or may have it once its sizes are known.
    """

    needs: str
    holds: Callable[[Any], bool]


def _has_correlations(sae: SAEConfig) -> bool:
    both = sae.independence_coeff, sae.orthogonality_coeff
    is_default = sae.arch == "slots" and sae.slots_mode != "separate_value" and None in both
    return is_default or any(both)


_A_CORRELATION = Effect("an independence_coeff or orthogonality_coeff above 0", _has_correlations)
_A_PROBE = Effect("a probe_loss_coeff above 0", lambda sae: sae.probe_loss_coeff > 0)
_AN_L1 = Effect("an l1_penalty_coeff above 0", lambda sae: sae.l1_penalty_coeff != 0)
_ALIGNMENT = Effect(
    "an alignment_coeff above 0",
    lambda sae: sae.alignment_coeff != 0 and sae.slots_mode != "separate_value",
)
_ANSWERS = Effect(
    "slots_mode = 'joint' or 'separate_value'", lambda sae: sae.slots_mode != "separate_activation"
)
_TRAINED_LATENTS = Effect(
    "slots_mode = 'joint' or 'separate_activation'", lambda sae: sae.slots_mode != "separate_value"
)

MODEL: dict[str, Effect] = {
    "multi_topk": Effect("a multi_topk_coeff above 0", lambda sae: sae.multi_topk_coeff > 0),
    "multi_topk_coeff": Effect("multi_topk", lambda sae: sae.multi_topk),
    "sparsity_norm_p": _AN_L1,
    "slots_l1_mean": _AN_L1,
    "target_l0": Effect(
        "a sparsity_penalty_coeff above 0", lambda sae: sae.sparsity_penalty_coeff != 0
    ),
    "target_l0_rate": Effect("target_l0", lambda sae: sae.target_l0 is not None),
    "sparsity_penalty": Effect(
        "a sparsity_penalty_coeff above 0", lambda sae: sae.sparsity_penalty_coeff != 0
    ),
    "jumprelu_tanh_scale": Effect(
        "sparsity_penalty = 'tanh'", lambda sae: sae.sparsity_penalty == "tanh"
    ),
    "decorrelation": Effect(
        "a decorrelation_coeff above 0", lambda sae: sae.decorrelation_coeff > 0
    ),
    "decorrelation_chunk": Effect(
        "decorrelation = 'chunked_max'", lambda sae: sae.decorrelation == "chunked_max"
    ),
    "aux_k": Effect("an aux_k_coeff above 0", lambda sae: sae.aux_k_coeff != 0),
    "probe_labels": _A_PROBE,
    "probe_task": _A_PROBE,
    "probe_classes": _A_PROBE,
    "correlation_pairs": _A_CORRELATION,
    "correlation_split": _A_CORRELATION,
    "answer_labels": _ANSWERS,
    "n_answers": _ANSWERS,
    "value_hidden": _ANSWERS,
    "slot_target": Effect(
        "an alignment_coeff above 0, or slots_mode = 'joint' or 'separate_value'",
        lambda sae: sae.alignment_coeff != 0 or sae.slots_mode != "separate_activation",
    ),
    "alignment_after_relu": _ALIGNMENT,
    "reconstruction_coeff": _TRAINED_LATENTS,
}

_AVERAGES_GRADIENTS = ("sgd", "signum", "schedule_free_signum")

TRAINING: dict[str, Effect] = {
    "pin": Effect("keep_in_memory, whose rows it locks", lambda train: train.keep_in_memory),
    "start_from_elsewhere": Effect(
        "start_from, the model to start from", lambda train: train.start_from is not None
    ),
    "k_anneal_steps": Effect("k_anneal_start", lambda train: train.k_anneal_start is not None),
    **dict.fromkeys(
        ("betas", "eps"),
        Effect(
            "optimizer = 'adam' or 'adamw'; the others have momentum",
            lambda train: train.optimizer not in _AVERAGES_GRADIENTS,
        ),
    ),
    "momentum": Effect(
        "optimizer = 'sgd', 'signum' or 'schedule_free_signum'; 'adam' and 'adamw' have betas",
        lambda train: train.optimizer in _AVERAGES_GRADIENTS,
    ),
    "weight_decay": Effect(
        "optimizer = 'adamw', which decouples it from the gradient, or 'sgd', 'signum' or "
        "'schedule_free_signum'; 'adam' has none",
        lambda train: train.optimizer != "adam",
    ),
}


FROM_MODEL: dict[str, Effect] = {
    "shard_tokens": Effect(
        "cache_dir, where the shards are kept", lambda text: text.cache_dir is not None
    ),
}


@dataclass(frozen=True)
class Run:
    """What the settings of a training act on.

    Attributes:
        sae: the model, complete.
        train: its training.
        data: "shards", "tensor" or, of a caller, "source"; "model": the rows of a forward pass.
        has_heldout: whether there are rows to evaluate with.
        has_names: whether the files have names for their activations.
        has_target_names: whether the files of targets have.
        total_steps: of the training.
    """

    sae: SAEConfig
    train: TrainConfig
    data: Literal["shards", "tensor", "source", "model"]
    has_heldout: bool
    has_names: Callable[[], bool]  # which opens files
    has_target_names: Callable[[], bool]
    total_steps: int


_SPARSITY = ("l1_loss", "sparsity_loss")
_A_NEW_MODEL = Effect(
    "a training without start_from, whose model has it already",
    lambda run: run.train.start_from is None,
)


def _has_sparsity(run: Run) -> bool:
    return any(run.sae.term_coefficients[name] > 0 for name in _SPARSITY)


def _has_more_terms(run: Run) -> bool:
    return any(
        weight > 0 for name, weight in run.sae.term_coefficients.items() if name != "recon_loss"
    )


RUN: dict[str, Effect] = {
    "decoder_init": _A_NEW_MODEL,
    "decoder_init_norm": _A_NEW_MODEL,
    "b_dec_init": _A_NEW_MODEL,
    "jumprelu_init_threshold": _A_NEW_MODEL,
    "pool_rows": Effect(
        "loss_fn mse or fvu, where rows are shuffled", lambda run: not run.sae.is_end_to_end
    ),
    "activations_key": Effect("shards whose data sets have names", lambda run: run.has_names()),
    "target_key": Effect("targets whose data sets have names", lambda run: run.has_target_names()),
    "skip_nonfinite": Effect(
        "shards or a tensor; rows of a source are not left out",
        lambda run: run.data in ("shards", "tensor"),
    ),
    "shuffle_seed": Effect(
        "shards, a tensor or a model; a source has an order of its own",
        lambda run: run.data != "source",
    ),
    "reconstruction_epochs": Effect("another term of the loss than the first", _has_more_terms),
    "sparsity_warmup_steps": Effect(
        "a sparsity penalty, l1_penalty_coeff or, of jumprelu, sparsity_penalty_coeff above 0",
        _has_sparsity,
    ),
    "dead_percentage_threshold": Effect(
        "held-out rows, of which it is a share", lambda run: run.has_heldout
    ),
}


# Steps that a run is to have, so that it does not end before what they lead to.
LENGTHS = ("warmup_steps", "sparsity_warmup_steps", "k_anneal_steps")


@contextmanager
def unchecked() -> Iterator[None]:
    """Let configurations inside this context be made with settings that have no effect yet.

    It is for those that others are still laid over.
    """
    token = _is_trial.set(True)
    try:
        yield
    finally:
        _is_trial.reset(token)


def check_effects(config: Any, effects: Mapping[str, Effect]) -> None:
    """Raise IdleSettingError for the first given setting of a configuration that has no effect."""
    if _is_trial.get():
        return
    for name, value in _given(config, effects):
        effect = effects[name]
        if not effect.holds(config) and not _is_filled_in(config, name, value):
            raise IdleSettingError(name, value, effect.needs)


def check_run_effects(run: Run, before: RunConfig | None = None) -> None:
    """Raise IdleSettingError for a given setting that has no effect in a training.

    With `before`, the configuration of the run that goes on, settings that it had are left alone.
    """
    for config in (run.sae, run.train):
        for name, value in _given(config, RUN):
            known = before is not None and getattr(before, name) == value
            if not RUN[name].holds(run) and not known and not _is_filled_in(config, name, value):
                raise IdleSettingError(name, value, RUN[name].needs)
    limits = ("max_steps", "max_tokens", "max_epochs")
    for name in LENGTHS:
        steps = getattr(run.train, name) or 0
        is_known = before is not None and all(
            getattr(before, each) == getattr(run.train, each) for each in (name, *limits)
        )
        if steps > run.total_steps and not is_known:
            raise IdleSettingError(name, steps, f"a run that is as long, not {run.total_steps:,}")


def _given(config: Any, effects: Mapping[str, Effect]) -> Iterator[tuple[str, object]]:
    """The settings of a table that ask for something, with their values."""
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in effects and value and value != item.default:
            yield item.name, value


def _is_filled_in(config: Any, name: str, value: object) -> bool:
    """Whether a configuration that leaves a setting open has this value all the same."""
    left = {item.name: getattr(config, item.name) for item in fields(config) if item.name != name}
    # What is filled in where the sizes are known is seen with sizes that leave room for anything.
    is_open = not getattr(config, "is_complete", True)
    if is_open:
        widths = ("d_in", "d_out") if left["transcoder"] else ("d_in",)
        left |= {width: left[width] or _ROOM for width in widths}
    with unchecked():
        try:
            return bool(getattr(type(config)(**left), name) == value)
        except ValueError:  # other settings need it, or other sizes
            return is_open
