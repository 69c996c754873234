"""`SAEConfig`: what a model is and what it is trained for. Part of sae_fast.config.

Here are the settings of terms that need labels, sequences or pairs of latents; those of all others
are in dictionary.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from sae_fast.config.dictionary import DictionaryConfig
from sae_fast.config.effects import MODEL, Effect
from sae_fast.config.fields import with_aliases

RELATION_LABELS = "labels/relation"
ANSWER_LABELS = "labels/answer"
# Of arch slots, by mode: the terms that it trains, with their coefficients, for a reconstruction
# error that is a mean over numbers. The paper's are these but for value_loss_coeff, 0.5, by which
# answers bend the slots: of the relations 97 % are found in place of 100 %, at an L0 of 68 in place
# of 27 (benchmarks/results/slots_weights.md).
_TRAINED = {"alignment_coeff": 1.0, "independence_coeff": 1e-2, "orthogonality_coeff": 1e-2}
_SLOT_TERMS: dict[str, dict[str, float]] = {
    "joint": {**_TRAINED, "value_loss_coeff": 0.1},
    "separate_activation": _TRAINED,
    "separate_value": {"value_loss_coeff": 0.5},
}
_COEFFICIENTS = (*_TRAINED, "value_loss_coeff")
# The reconstruction error is a sum here: these defaults are multiplied by the error of the mean, as
# the terms on correlations are already.
_OF_MEAN_ERROR = ("alignment_coeff", "value_loss_coeff")
# Terms that are not of slots; trained in every mode but separate_value.
_OTHER_TERMS = (
    *("l1_penalty_coeff", "decorrelation_coeff"),
    *("probe_loss_coeff", "temporal_smoothness_coeff"),
)
# Of the L1 of the free slots: the paper's, for a mean over them; and for their sum, where it is in
# units of the typical norm, since a code of some L0 has values in proportion to it.
_SLOTS_L1_MEAN = 1e-3
_SLOTS_L1 = 0.1


@with_aliases(input_dim="d_in", num_latents="d_sae")
@dataclass(frozen=True, kw_only=True)
class SAEConfig(DictionaryConfig):
    """The model: architecture, sizes, the terms of its loss, normalisation and initialisation.

    `d_in=0` leaves the sizes open until the data are known (`with_d_in`); a model needs them.
    """

    section: ClassVar[str] = "sae"
    effects: ClassVar[Mapping[str, Effect]] = MODEL

    probe_loss_coeff: float = 0.0
    """Weight of the loss of a linear probe that predicts probe_labels from the code."""
    probe_labels: str | None = None
    """Dataset of the shards with a label for each row, such as labels/rule; -1: it has none."""
    probe_task: Literal["classification", "regression"] = "classification"
    """Cross-entropy over classes or squared error of a number, averaged over labelled tokens."""
    probe_classes: int | None = None
    """Classes that the labels number from 0; default: the largest label + 1. [classes]"""
    temporal_smoothness_coeff: float = 0.0
    """Weight of the squared change of the code to the next token of its sequence, a mean."""
    independence_coeff: float | None = None
    """Weight of the squared correlations of latents' activations over a batch, for pairs of latents
    below correlation_split; default: 0.01 with slots that are aligned, otherwise 0."""
    orthogonality_coeff: float | None = None
    """The same for pairs of a latent below correlation_split and one that is not."""
    correlation_pairs: Literal["scaled", "mean", "sum"] | None = None
    """Whether both are means over pairs of latents that are not silent in the batch (mean), sums
    (sum), or sums per latent in units of the reconstruction error of the mean, so that a weight of
    0.01 acts at every size (scaled); default: scaled."""
    correlation_split: int | None = None
    """Where the second group of latents begins; default: at the relation slots, or there is none.
    [latents]"""

    slots_mode: Literal["joint", "separate_activation", "separate_value"] | None = None
    """slots: train latents and value heads (joint), the latents alone (separate_activation), or the
    heads alone, on the model that --start-from names (separate_value); default: joint."""
    n_relations: int | None = None
    """slots: relation slots, the last latents; default: the largest relation + 1. [latents]"""
    n_answers: int | None = None
    """slots: answers that the labels number from 0; default: the largest + 1. [answers]"""
    relation_labels: str | None = None
    """slots: dataset of the shards with a relation for each row, -1: none; default:
    labels/relation."""
    answer_labels: str | None = None
    """slots: dataset with the answer, -1: none; default: labels/answer."""
    alignment_coeff: float | None = None
    """slots: weight of the squared distance of the relation slots to slot_target times the one-hot
    relation; default: d_in / slot_target², so that a relation that is missed costs as much as the
    reconstruction of a token by the mean; 1 / slot_target² with loss_fn fvu."""
    alignment_after_relu: bool = False
    """slots: measure that distance after ReLU and with slot_target 1 by default, as L_align is
    written, where a slot that is off gets no gradient; default: before it."""
    slots_l1_mean: bool = False
    """slots: average the L1 penalty over the free slots, as L_sparse is written, in place of a sum
    over them. Its default weight is then that of the paper, which hardly acts."""
    slot_target: float | None = None
    """slots: what the slot of a token's relation shall be, in units of E|x| / sqrt(d_in); default:
    sqrt(d_in) / 2, half the norm of an activation; 1 with alignment_after_relu."""
    value_loss_coeff: float | None = None
    """slots: weight of the cross-entropy of the answer, predicted from the relation's slot by a
    head of its own; default: 0.1 times d_in; with loss_fn fvu 0.1; with separate_value 0.5."""
    value_hidden: int | None = None
    """slots: width of a value head's hidden layer; default: 256. [numbers]"""

    def __post_init__(self) -> None:
        """Check every field and complete those left open; raises ValueError naming the field."""
        super().__post_init__()
        for name in ("probe_loss_coeff", "temporal_smoothness_coeff"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._check_probe()
        self._complete_slots()
        self._check_slots()
        self._check_correlation()
        self._check_effects()

    def _check_probe(self) -> None:
        self._require("probe_labels", self.probe_labels != "", "a name, not an empty string")
        if self.probe_classes is None:
            return
        self._require("probe_classes", self.probe_classes >= 2, "at least 2")
        if self.probe_task == "regression":
            raise ValueError(
                "probe_classes must be left out with probe_task regression, "
                f"got {self.probe_classes}"
            )

    def _complete_slots(self) -> None:
        """Labels, target, and the coefficients of the terms that the mode has, where left open."""
        defaults: dict[str, object] = dict.fromkeys(_COEFFICIENTS, 0.0)
        defaults["correlation_pairs"] = "scaled"
        if self.arch == "slots":
            mode = self.slots_mode or "joint"
            self._refuse_untrained(mode)
            defaults |= {
                "slots_mode": mode,
                "relation_labels": RELATION_LABELS,
                "slot_target": self._default_target,
                **_SLOT_TERMS[mode],
            }
            if mode != "separate_value":  # where nothing else is trained
                for name in set(_OF_MEAN_ERROR) & _SLOT_TERMS[mode].keys():
                    defaults[name] = self.error_of_the_mean * _SLOT_TERMS[mode][name]
                # In units of the target: a slot that is off costs as much at every target.
                target = self.slot_target or self._default_target or 1.0
                defaults["alignment_coeff"] = self.error_of_the_mean / target**2
            if mode != "separate_activation":
                defaults |= {"answer_labels": ANSWER_LABELS, "value_hidden": 256}
        if not self._has_widths:  # what a flag may yet change is not derived
            return
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    def _refuse_untrained(self, mode: str) -> None:
        """Raises ValueError for a coefficient of a term that the mode does not train."""
        for name in (*_COEFFICIENTS, *_OTHER_TERMS):
            is_trained = name in _SLOT_TERMS[mode] or (
                name not in _COEFFICIENTS and mode != "separate_value"
            )
            value = getattr(self, name)
            if value and not is_trained:
                raise ValueError(f"{name} must be left out with slots_mode {mode}, got {value:g}")

    def _check_slots(self) -> None:
        for name in _COEFFICIENTS:
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "at least 0")
        for name in ("n_relations", "n_answers", "value_hidden"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")
        for name in ("relation_labels", "answer_labels"):
            self._require(name, getattr(self, name) != "", "a name, not an empty string")
        positive = self.slot_target is None or self.slot_target > 0
        self._require("slot_target", positive, "greater than 0")
        if self.n_relations is not None and self.d_sae > 0:
            must = f"below d_sae = {self.d_sae}, which counts the free slots too"
            self._require("n_relations", self.n_relations < self.d_sae, must)

    def _check_correlation(self) -> None:
        split = self.correlation_split
        if split is None:
            if self.orthogonality_coeff and self.arch != "slots":
                raise ValueError(
                    f"orthogonality_coeff = {self.orthogonality_coeff:g} needs correlation_split: "
                    "which latents are to be orthogonal to which"
                )
            return
        if self.arch == "slots":
            raise ValueError(
                f"correlation_split must be left out with arch slots, got {split}: "
                "the second group are the relation slots"
            )
        inside = split >= 1 and (self.d_sae == 0 or split < self.d_sae)
        must = f"at least 1 and below d_sae = {self.d_sae}" if self.d_sae else "at least 1"
        self._require("correlation_split", inside, must)

    @property
    def _default_l1(self) -> float:
        if self.arch != "slots":
            return super()._default_l1
        if self.slots_mode == "separate_value":
            return 0.0
        share = _SLOTS_L1_MEAN if self.slots_l1_mean else _SLOTS_L1 / self._typical_norm
        return share * self._variance

    @property
    def _default_target(self) -> float:
        """The strength of a relation's slot: 1 for L_align as it is written, else half the norm."""
        return 1.0 if self.alignment_after_relu else 0.5 * self._typical_norm

    @property
    def _typical_norm(self) -> float:
        """The norm of normalised activations."""
        return math.sqrt(self.target_width)

    @property
    def term_coefficients(self) -> dict[str, float]:
        """The coefficients of the terms of the loss, by the names that the metrics have."""
        has_aux = 1.0 if self.arch == "gated" else self.aux_k_coeff
        given: dict[str, float | None] = {
            "recon_loss": self.reconstruction_coeff,
            "l1_loss": self.l1_penalty_coeff,
            "sparsity_loss": self.sparsity_penalty_coeff,
            "pre_act_loss": self.pre_act_loss_coeff,
            "decorr_loss": self.decorrelation_coeff,
            "aux_loss": has_aux,
            "multi_topk_loss": self.multi_topk_coeff if self.multi_topk else 0.0,
            "alignment_loss": self.alignment_coeff,
            "value_loss": self.value_loss_coeff,
            "probe_loss": self.probe_loss_coeff,
            "temporal_loss": self.temporal_smoothness_coeff,
            "independence_loss": self.independence_coeff,
            "orthogonality_loss": self.orthogonality_coeff,
        }
        return {name: value or 0.0 for name, value in given.items()}

    @property
    def has_probe(self) -> bool:
        """Whether a probe is trained with the model."""
        return self.probe_loss_coeff > 0 and self.probe_labels is not None

    @property
    def probe_outputs(self) -> int:
        """Numbers that the probe predicts for a token; 0: no probe, or its classes are open."""
        if not self.has_probe:
            return 0
        return 1 if self.probe_task == "regression" else self.probe_classes or 0

    @property
    def has_value_heads(self) -> bool:
        """Whether answers are predicted from the relation slots."""
        return self.arch == "slots" and self.slots_mode != "separate_activation"

    @property
    def group_split(self) -> int:
        """Where the second group of latents begins, d_sae where there is none."""
        if self.arch == "slots":
            return self.d_sae - (self.n_relations or 0)
        return self.d_sae if self.correlation_split is None else self.correlation_split
