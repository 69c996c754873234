"""Every setting in a training of every architecture is refused by name or has an effect."""

import math

import pytest
import torch
from setting_values import (
    ARCHITECTURES,
    D_IN,
    D_OUT,
    N_ANSWERS,
    N_RELATIONS,
    over_base,
    values_of,
)
from slow_cases import slow_after

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.fields import field_names
from sae_fast.training.trainer import Trainer

ROWS, HELD = 160, 64
TRAINING = {"batch_size": 32, "max_steps": 4, "lr": 1e-2, "log_every": 1, "eval_every": 0}
TIMES = ("tokens_per_second", "time_per_step_ms", "reader_stall_fraction")
# Latents fall silent within these trainings, so that settings for dead latents have an effect.
SILENT = {"dead_after_tokens": 32}
FEW = {
    **{arch: {**SILENT, "k": 2} for arch in ("topk", "batch_topk", "matryoshka")},
    "jumprelu": {**SILENT, "jumprelu_init_threshold": 2.5},
}
MODEL = [name for name in field_names(SAEConfig) if name not in ("arch", "d_in", "d_sae")]
# Settings of files, devices and reports, which a training on a tensor does not use.
ELSEWHERE = {
    *("shard_dir", "mix", "activations_key", "heldout", "target_key", "target_shard_dir"),
    *("target_heldout", "keep_in_memory", "pin", "device_cache", "pool_rows", "skip_nonfinite"),
    *("repeated_rows", "heldout_fraction", "max_norm_multiple"),
    *("start_from", "device", "cuda_graph", "num_threads", "log_every", "wandb_log_every"),
    *("eval_every", "checkpoint_every", "keep_checkpoints", "checkpoint_dir", "resume_from"),
    *("wandb_project", "no_wandb", "batch_size", "max_steps", "max_tokens", "max_epochs"),
    *("wandb_entity", "wandb_name", "wandb_group", "wandb_tags", "logger", "verify"),
    *("checkpoint_minutes", "max_hours", "best_by"),
    *("eval_metrics", "eval_dataset", "eval_model", "eval_hook", "eval_tokens"),
}
# By setting, the architectures for which it changes nothing, and why.
UNCHANGED = {
    "optimizer=adamw": ARCHITECTURES,  # equal to adam without weight decay
    "sparsity_penalty=l0_target": ("jumprelu",),  # the default
    "decoder_norm=unit": ("jumprelu", "gated", "slots"),  # the default
    "decoder_norm=free": ("relu",),  # the default
    "slots_mode=joint": ("slots",),  # the default
    "pre_act_loss_coeff=0.6": ("gated",),  # all its latents fire in these few steps
}
# Other forms of architectures, for which further settings have an effect.
FORMS = {
    **{arch: {} for arch in ARCHITECTURES},
    "jumprelu, tanh": {"sparsity_penalty": "tanh"},
    "slots, latents": {
        "slots_mode": "separate_activation",
        "n_answers": None,
        "value_hidden": None,
    },
    "relu, unpenalised": {"l1_penalty_coeff": 0.0},
    "topk, without AuxK": {"aux_k_coeff": 0.0},
}
TRAIN = [name for name in field_names(TrainConfig) if name not in ELSEWHERE]


def make_columns(rows, seed):
    """Make labels, sequences and targets of rows."""
    generator = torch.Generator().manual_seed(seed)

    def whole(top):
        return torch.randint(-1, top, (rows,), generator=generator)

    return {
        "labels/relation": whole(N_RELATIONS),
        "labels/other_relation": whole(N_RELATIONS),
        "labels/answer": whole(N_ANSWERS),
        "labels/other_answer": whole(N_ANSWERS),
        "labels/rule": whole(3),
        "labels/mood": torch.randn(rows, generator=generator),
        "doc_id": torch.arange(rows) // 8,
        "targets": torch.randn(rows, D_OUT, generator=generator),
    }


def make_rows(rows, seed):
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(seed))


DATA, HELDOUT = make_rows(ROWS, 0), make_rows(HELD, 1)
COLUMNS, HELDOUT_COLUMNS = make_columns(ROWS, 2), make_columns(HELD, 3)


def trained(fields, settings):
    """Return the final weights and the metrics of a short training."""
    sae, train = SAEConfig(**fields), TrainConfig(**{**TRAINING, **settings})
    needed = [name for name in COLUMNS if sae.transcoder or name != "targets"]
    trainer = Trainer(
        *(sae, train, DATA),
        columns={name: COLUMNS[name] for name in needed},
        heldout=HELDOUT,
        heldout_columns={name: HELDOUT_COLUMNS[name] for name in needed if name != "doc_id"},
        show_progress=False,
    )
    state = trainer.train().state_dict()
    rows = [{name: row[name] for name in row if name not in TIMES} for row in trainer.history]
    return state, rows


def few_of(form):
    """Return a small model's settings, updated by a form of its architecture."""
    return {**FEW.get(form.partition(",")[0], {}), **FORMS[form]}


def alone(config, name):
    """Return a setting's values without the other settings that they need."""
    several = (settings for settings in values_of(config, name) if len(settings) > 1)
    return [{name: settings[name]} for settings in several if name in settings]


def changes(one, other):
    """Return whether two trainings differ in a weight or a metric."""
    (state, rows), (others, other_rows) = one, other
    if state.keys() != others.keys() or str(rows) != str(other_rows):
        return True
    return not all(torch.equal(state[name], others[name]) for name in state)


def tried(form, settings, base):
    """Try settings in a training; return the fault in a line, or None."""
    arch = form.partition(",")[0]
    of_model = {name: value for name, value in settings.items() if name in field_names(SAEConfig)}
    of_training = {name: value for name, value in settings.items() if name not in of_model}
    try:
        result = trained(over_base(arch, {**few_of(form), **of_model}), of_training)
    except ValueError as error:
        words = [str(word) for pair in settings.items() for word in pair]
        return None if any(word in str(error) for word in words) else f"names none: {error}"
    losses = [row["loss"] for row in result[1]]
    if not all(map(math.isfinite, losses)):
        return f"losses {losses}"
    given = ",".join(f"{name}={value}" for name, value in settings.items())
    is_listed = arch in UNCHANGED.get(given, ())
    if changes(result, base) != is_listed:
        return None
    return "changes something now" if is_listed else "changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("form", slow_after(3, FORMS))
def test_every_setting_is_refused_by_name_or_changes_the_training(form):
    base = trained(over_base(form.partition(",")[0], few_of(form)), {})
    found = []
    for config, names in ((SAEConfig, MODEL), (TrainConfig, TRAIN)):
        for name in names:
            if form not in ARCHITECTURES and name in FORMS[form]:
                continue
            for settings in [*values_of(config, name), *alone(config, name)]:
                if said := tried(form, settings, base):
                    found.append(f"{settings}: {said}")
    assert "\n".join(found) == ""
