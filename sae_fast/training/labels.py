"""The labels that terms of the loss need, found and checked before training."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sae_fast.activations import STARTS, TARGETS, Column
from sae_fast.config import SAEConfig
from sae_fast.config.sae import ANSWER_LABELS, RELATION_LABELS

_SETTINGS = {"n_relations": "relation_labels", "n_answers": "answer_labels"}
_MAX_COUNTED = 1 << 20  # kinds of labels; a label beyond is a mistake, or their number is given


def label_columns(sae: SAEConfig) -> tuple[str, ...]:
    """Return the names of the columns with labels that a training of this model reads.

    Raises ValueError where the configuration does not say which labels its probe predicts.
    """
    return tuple(_labels(sae))


def needs_sequences(sae: SAEConfig) -> bool:
    """Return whether a training of this model needs the rows of a sequence together."""
    return sae.temporal_smoothness_coeff > 0


def check_columns(sae: SAEConfig, columns: Mapping[str, Column]) -> None:
    """Raise ValueError, naming it, for a column that the data do not have."""
    needed = _labels(sae)
    if sae.transcoder:
        if TARGETS in needed:
            raise ValueError(
                f"{needed[TARGETS]} must not be {TARGETS!r}: so the targets are called"
            )
        needed[TARGETS] = "transcoder"
    if needs_sequences(sae):
        needed[STARTS] = "temporal_smoothness_coeff"
    for name, why in needed.items():
        if name not in columns:
            there = ", ".join(columns) or "none"
            raise ValueError(
                f"{why} needs the column {name!r}, which the data do not have (there: {there})"
            )


def with_label_counts(sae: SAEConfig, columns: Mapping[str, Column]) -> SAEConfig:
    """Return the configuration with the numbers of classes, relations and answers filled in.

    Raises ValueError for labels that the probe cannot predict or slots cannot be bound to.
    """
    counts = _probe_classes(sae, columns)
    if sae.arch != "slots":
        return sae.resolve(labels=counts)
    names = _slot_labels(sae).items()
    label_counts = {name: _count(name, getattr(sae, name), columns[label]) for name, label in names}
    slots = label_counts["n_relations"]
    if 0 < sae.d_sae <= slots:
        labels = columns[sae.relation_labels or RELATION_LABELS]
        raise ValueError(
            f"{labels.place}: {labels.name} has the label {slots - 1}, "
            f"and {slots:,} relation slots leave no free one of d_sae = {sae.d_sae:,}"
        )
    return sae.resolve(labels={**counts, **label_counts})


def check_heldout_labels(sae: SAEConfig, labels: Mapping[str, Tensor]) -> None:
    """Raise ValueError for labels of held-out rows that slots cannot be evaluated with."""
    if sae.arch != "slots" or not labels:
        return
    for name, label in _slot_labels(sae).items():
        where, count = f"held-out rows: {label}", getattr(sae, name)
        if label not in labels:
            raise ValueError(f"{where} is missing (there: {', '.join(labels)})")
        given = labels[label]
        if given.dtype.is_floating_point or given.dtype == torch.bool:
            raise ValueError(f"{where} must hold whole numbers, got {given.dtype}")
        low, high = (int(given.min()), int(given.max())) if len(given) else (0, 0)
        if not -1 <= low <= high < count:
            raise ValueError(
                f"{where} has the label {low if low < -1 else high}, but {name} is {count} (by "
                "default as many as the rows to train on have): labels are 0 to "
                f"{count - 1}, or -1 for none; give a larger {name}"
            )


def _labels(sae: SAEConfig) -> dict[str, str]:
    """Return the setting that needs each column, by its name; ValueError for a probe of nothing."""
    needed = {}
    if sae.probe_loss_coeff > 0 and sae.probe_labels is None:
        raise ValueError(
            f"probe_labels is missing: probe_loss_coeff is {sae.probe_loss_coeff:g}; "
            "name the dataset of the labels with --probe-labels"
        )
    if sae.has_probe and sae.probe_labels is not None:
        needed[sae.probe_labels] = "probe_labels"
    if sae.arch == "slots":
        needed |= {label: _SETTINGS[name] for name, label in _slot_labels(sae).items()}
    return needed


def _slot_labels(sae: SAEConfig) -> dict[str, str]:
    """Return the columns of labels that slots are bound to, by the setting with their number."""
    labels = {"n_relations": sae.relation_labels or RELATION_LABELS}
    if sae.has_value_heads:
        labels["n_answers"] = sae.answer_labels or ANSWER_LABELS
    return labels


def _count(name: str, count: int | None, labels: Column) -> int:
    """Count the kinds of labels; raise ValueError for a label that `count` has no room for.

    `count` is the value of the setting `name`.
    """
    where = f"{labels.place}: {labels.name}"
    if labels.dtype != torch.int64:
        raise ValueError(f"{where} holds real numbers; arch slots needs whole ones")
    if labels.maximum < 0:
        raise ValueError(f"{where}: no token has a label, all are -1")
    needed = _largest(labels, where) + 1
    if count is not None and needed > count:
        raise ValueError(
            f"{where} has the label {needed - 1}, but {name} is {count}: "
            f"labels are 0 to {count - 1}"
        )
    return _counted(name, where, needed) if count is None else count


def _largest(labels: Column, where: str) -> int:
    """Return the largest label; raise ValueError where a caller's own source does not say it."""
    if labels.maximum == math.inf:
        raise ValueError(f"{where}: the source must say the largest label, Column(maximum=...)")
    return int(labels.maximum)


def _counted(name: str, where: str, needed: int) -> int:
    """Return the number of labels found; raise ValueError where it is implausibly large."""
    if needed > _MAX_COUNTED:
        raise ValueError(
            f"{where} has the label {needed - 1:,}, for which {needed:,} labels are a lot; "
            f"if there are so many, give {name}"
        )
    return needed


def _probe_classes(sae: SAEConfig, columns: Mapping[str, Column]) -> dict[str, int]:
    """Return the classes of the probe by the setting that has them; empty where it has none."""
    if not sae.has_probe or sae.probe_labels is None:
        return {}
    labels = columns[sae.probe_labels]
    where = f"{labels.place}: {labels.name}"
    if labels.dtype == torch.int64 and labels.maximum < 0:
        raise ValueError(f"{where}: no token has a label, all are -1")
    if sae.probe_task == "regression":
        return {}
    if labels.dtype != torch.int64:
        raise ValueError(
            f"{where} holds real numbers; probe_task classification needs whole ones, "
            "regression (--probe-task) takes both"
        )
    needed = _largest(labels, where) + 1
    if sae.probe_classes is not None and needed > sae.probe_classes:
        raise ValueError(
            f"{where} has the label {needed - 1}, but probe_classes is {sae.probe_classes}: "
            f"labels are 0 to {sae.probe_classes - 1}"
        )
    if sae.probe_classes is None and needed < 2:
        raise ValueError(f"{where}: the only label is 0, a classification needs two classes")
    counted = sae.probe_classes or _counted("probe_classes", where, needed)
    return {"probe_classes": counted}
