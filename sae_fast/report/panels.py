"""The panels in which the metrics of runs are drawn.

They follow from the metrics: a metric that only one architecture or term logs gets a panel although
it is not named here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]  # of metrics.jsonl

HELD_OUT = "held out"
TARGET = "target"
_HELD_OUT = "heldout_"
_AVERAGED = "averaged_"  # of the model with averaged weights, on held-out rows only
_TARGET_L0 = "target_l0"  # a setting, see `with_target`

_TITLES = {
    "loss": "Loss per token",
    "fvu": "Fraction of variance unexplained",
    "l0": "L0: active latents per token",
    "dead_fraction": "Dead latents",
    "silent_fraction": "Latents silent for a tenth of the run",
    "gram_mean": "Mean squared cosine of two decoder rows",
    "skipped_steps": "Steps skipped because gradients overflowed",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Tokens per second",
    "reader_stall_fraction": "Time spent waiting for the reader",
    "probe_r2": "Probe R²",
    "k": "k: latents a token may use",
    "sparsity_coeff": "Coefficient of the sparsity penalty",
    "objective": "FVU with the penalty, by which best is chosen",
    "recon_loss": "Reconstruction loss",
    "l1_loss": "L1 penalty",
    "decorr_loss": "Decorrelation loss of decoder rows",
    "aux_loss": "Auxiliary loss",
    "multi_topk_loss": "Multi-TopK loss",
    "sparsity_loss": "Sparsity penalty",
    "pre_act_loss": "Pre-activation loss of dead latents",
    "temporal_loss": "Temporal smoothness loss",
    "ce": "Cross-entropy with the reconstruction",
    "ce_increase": "Cross-entropy that the reconstruction adds [nats]",
    "ce_score": "CE loss score: 1 as the model itself, 0 as with zeros",
    "kl": "Divergence from the model's prediction",
    "alignment_loss": "Alignment loss of relation slots",
}
_DEAD = "dead_fraction"  # null until a latent can be dead
_FIRST = ("loss", "fvu", "l0", _DEAD)
_LAST = ("learning_rate", "grad_norm", "tokens_per_second")
_WIDE = {"loss", "fvu", "l0", "grad_norm", "loss_scale", "sparsity_coeff"}
# Not drawn: the axis, and what another panel says.
_NO_PANEL = {
    *("step", "tokens", "epoch", "time_per_step_ms", "activation_fraction", "ce_model"),
    *("explained_variance", "explained_variance_overall", _TARGET_L0),
}


@dataclass(frozen=True)
class Curve:
    """A metric in a panel.

    Attributes:
        metric: its name.
        label: what the legend calls it.
    """

    metric: str
    label: str


@dataclass(frozen=True)
class Panel:
    """A panel of one quantity.

    Attributes:
        title: above it.
        curves: what is drawn, the main one first.
        is_wide: whether it may span decades, so that its axis is logarithmic where it does.
    """

    title: str
    curves: tuple[Curve, ...]
    is_wide: bool = False

    @property
    def main(self) -> str:
        """The metric that the panel is of."""
        return self.curves[0].metric

    @property
    def is_accuracy(self) -> bool:
        """Whether all of 0 to 1 matters."""
        return self.main.endswith("_accuracy")

    @property
    def is_share(self) -> bool:
        """Whether percentages tell more."""
        return self.main.endswith(("_fraction", "_accuracy"))


def with_target(rows: Iterable[Row], target_l0: float | None) -> list[Row]:
    """Return rows that also hold the L0 that the run is trained for, a line in the panel of L0.

    Args:
        rows: of metrics.jsonl.
        target_l0: the setting; None where the run has none, which leaves the rows as they are.
    """
    if target_l0 is None:
        return list(rows)
    return [{**row, _TARGET_L0: target_l0} for row in rows]


def overview(rows: Sequence[Row]) -> list[Panel]:
    """Return a panel for each metric but the terms of the loss.

    Metrics that every run logs have their panel in any case, dead latents once they are counted.
    """
    is_counted = any(row.get(curve.metric) is not None for row in rows for curve in _curves(_DEAD))
    first = [name for name in _FIRST if name != _DEAD or is_counted]
    others = [
        name
        for name in _nonzero_metrics(rows)
        if not name.endswith("_loss") and name not in {*_FIRST, *_LAST, *_NO_PANEL}
    ]
    qualities = [name for name in others if name.endswith(("_accuracy", "_r2"))]
    figures = [name for name in others if name not in qualities]
    return [_panel(name) for name in (*first, *qualities, *_LAST, *figures)]


def loss_terms(rows: Iterable[Row]) -> list[Panel]:
    """Return a panel for each term of the loss that is not 0 throughout, with its coefficient."""
    return [_panel(name) for name in _nonzero_metrics(rows) if name.endswith("_loss")]


def _nonzero_metrics(rows: Iterable[Row]) -> list[str]:
    """Return the metrics that are a number other than 0 somewhere, in order of appearance.

    A metric of held-out rows counts under the name of the training's.
    """
    names = [name for row in rows for name, value in row.items() if value]
    bare = (name.removeprefix(_AVERAGED).removeprefix(_HELD_OUT) for name in names)
    return list(dict.fromkeys(bare))


def _panel(name: str) -> Panel:
    plain = name.replace("_", " ")
    title = _TITLES.get(name, plain[:1].upper() + plain[1:])
    return Panel(title, _curves(name), is_wide=name in _WIDE or name.endswith("_loss"))


def _curves(name: str) -> tuple[Curve, ...]:
    if name == "loss":
        return Curve("loss", "total"), Curve("recon_loss", "reconstruction")
    if name == "ce":
        return Curve("heldout_ce", HELD_OUT), Curve("heldout_ce_model", "the model by itself")
    curves = (
        Curve(name, "train"),
        Curve(_HELD_OUT + name, HELD_OUT),
        Curve(_AVERAGED + _HELD_OUT + name, f"{HELD_OUT}, averaged"),
    )
    return (*curves, Curve(_TARGET_L0, TARGET)) if name == "l0" else curves
