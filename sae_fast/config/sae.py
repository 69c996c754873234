"""`SAEConfig`: what a model is and what it is trained for. Part of sae_fast.config."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sae_fast.config.effects import Run, check_effects
from sae_fast.config.fields import (
    ConfigFile,
    configuration,
    field_names,
    field_types,
    reject_unknown_keys,
    set_choices,
)
from sae_fast.config.plugins import load_installed
from sae_fast.config.setting import Effect, require, rules_of, setting
from sae_fast.json_files import shown

DEFAULT_EXPANSION_FACTOR = 8
DEFAULT_K = 32
DEFAULT_AUX_K_COEFF = 1 / 32
DEAD_AFTER_TOKENS = 10_000_000
DEAD_AFTER_SHARE = 20  # of a run, where that is less
DEFAULT_L1 = 5.0  # for activations of norm sqrt(d_in), as normalize_activations makes them
DEFAULT_FREE_NORM = 0.1
MATRYOSHKA_SIZES = 5  # nested dictionaries by default, each half as large as the next
DEFAULT_TARGET_L0 = 32.0
# The share of the variance that one more active latent must explain: 10 at a d_in of 4096, which is
# Anthropic's weight of the tanh.
DEFAULT_LATENT_PRICE = 1 / 400
DEFAULT_PRE_ACT_PRICE = 1e-5
# Pre-activations start with a spread of 1. From 0.5 with a window of 0.5, L0 is at its target of 32
# after 200 steps (MiniLM, lr 3e-3); from 0.1 with 0.2 it is 142, from 0.001 with 0.001 it is 395.
JUMPRELU_INIT_THRESHOLD = 0.5
JUMPRELU_BANDWIDTH = 0.5

RELATION_LABELS = "labels/relation"
ANSWER_LABELS = "labels/answer"
DEFAULT_VALUE_HIDDEN = 256
# The default L1 weight of the free slots: the paper's, for a mean over them; and one for their sum,
# in units of the typical norm, since a code of some L0 has values in proportion to it.
_SLOTS_L1_MEAN = 1e-3
_SLOTS_L1 = 0.1
# Weights of the terms of arch slots for a reconstruction error that is a mean over numbers. The
# paper's are these but for the value loss, 0.5, by which answers bend the slots: of the relations
# 97 % are found in place of 100 %, at an L0 of 68 in place of 27
# (benchmarks/results/slots_weights.md). Alignment and value loss are multiplied by the error of
# the mean, because the reconstruction error is a sum here; the correlations are in its units
# already.
_SLOTS_CORRELATION = 1e-2
_SLOTS_VALUE = 0.1
_SLOTS_VALUE_ALONE = 0.5

_TARGETS = "a transcoder trains on shards: capture its two hook points first"
_LABELS = "labels lie in shards: capture first, then add them"
_TOPK = ("topk",)
_WITH_K = ("topk", "batch_topk", "matryoshka")
_MATRYOSHKA = ("matryoshka",)
_WITH_L1 = ("relu", "gated", "slots")
_THRESHOLDED = (*_WITH_L1, "jumprelu")
_JUMPRELU = ("jumprelu",)
_WITH_PRE_ACT_LOSS = ("jumprelu", "gated")
_SLOTS = ("slots",)
# Modes of slots that train the latents, and those that train the value heads.
_LATENTS = ("joint", "separate_activation")
_HEADS = ("joint", "separate_value")


def _has_correlations(sae: SAEConfig) -> bool:
    both = sae.independence_coeff, sae.orthogonality_coeff
    is_default = sae.arch == "slots" and sae.slots_mode != "separate_value" and None in both
    return is_default or any(both)


_A_CORRELATION = Effect("an independence_coeff or orthogonality_coeff above 0", _has_correlations)
_A_PROBE = Effect("a probe_loss_coeff above 0", lambda sae: sae.probe_loss_coeff > 0)
_AN_L1 = Effect("an l1_penalty_coeff above 0", lambda sae: sae.l1_penalty_coeff != 0)
_A_PENALTY = Effect("a sparsity_penalty_coeff above 0", lambda sae: sae.sparsity_penalty_coeff != 0)
_ANSWERS = Effect(
    "slots_mode = 'joint' or 'separate_value'", lambda sae: sae.slots_mode != "separate_activation"
)


def _is_new_model(run: Run) -> bool:
    return run.train.start_from is None


_A_NEW_MODEL = Effect("a training without start_from, whose model has it already", _is_new_model)

_REGISTERED_BY = "registered_by"  # in saved configurations
_registered: dict[str, type[SAEConfig]] = {}  # of the architectures outside of the package


def built_in() -> tuple[str, ...]:
    """Return the names of the architectures of the package."""
    names = typing.get_args(field_types(SAEConfig)["arch"])
    return tuple(name for name in names if name not in _registered)


def registered() -> dict[str, type[SAEConfig]]:
    """Return the configurations of the registered architectures by name."""
    return dict(_registered)


def register(name: str, config: type[SAEConfig] | None) -> None:
    """Let an architecture have a configuration of its own; None: forget the architecture."""
    own = built_in()
    if config is None:
        _registered.pop(name, None)
    else:
        _registered[name] = config
    set_choices(SAEConfig, "arch", (*own, *_registered))


def config_of(arch: object, registered_by: object = None) -> type[SAEConfig]:
    """Return the configuration of an architecture, also of one in an installed package.

    Args:
        arch: the name; of an unknown one `SAEConfig` is returned, which refuses it.
        registered_by: the module that has registered it where a configuration was saved.

    Raises ValueError where only that module is known.
    """
    if not isinstance(arch, str) or arch in _registered or arch in built_in():
        return _registered.get(str(arch), SAEConfig)
    if load_installed(arch) and arch in _registered:
        return _registered[arch]
    if registered_by is not None:
        raise ValueError(
            f"arch {shown(arch)} is not registered here: first import {shown(registered_by)} "
            "(on the command line: --plugin FILE_OR_MODULE)"
        )
    return SAEConfig


@configuration(input_dim="d_in", num_latents="d_sae", dead_feature_threshold="dead_after_tokens")
@dataclass(frozen=True, kw_only=True)
class SAEConfig(ConfigFile):
    """The model: architecture, sizes, the terms of its loss, normalisation and initialisation.

    Settings that are left open follow from the others (`completed`) as soon as the widths are
    known: `SAEConfig(d_in=384).d_sae` is 3072. With `d_in=0`, the default, and `d_out=0` of a
    transcoder they stay open until `resolve` is told the widths of the data. `given` has the
    settings as they were asked for. With a registered architecture the configuration has the
    settings of that architecture as well.
    """

    title: ClassVar[str] = "Model"
    section: ClassVar[str] = "sae"
    shared: ClassVar[tuple[str, ...]] = ()
    registered_by: ClassVar[str] = ""

    if TYPE_CHECKING:  # the other names of settings, which `configuration` adds
        input_dim: int = 0
        num_latents: int = 0
        dead_feature_threshold: int | None = None

    arch: Literal["topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated", "slots"] = (
        setting(
            "topk",
            heading="Architecture and sizes",
            brief="architecture",
            elsewhere=("architecture", "sae_type"),
            of_start=True,
        )
    )
    """Architecture. topk: the k largest latents of every token; batch_topk: k latents a token on
    average over a batch; matryoshka: batch_topk with dictionaries nested in one another; relu: all
    latents above 0, made few by an L1 penalty; jumprelu: all latents above trained thresholds;
    gated: all latents whose gate is open, with a separate strength; slots: as relu, with latents
    that are bound to labelled relations."""
    d_in: int = setting(
        0,
        at_least=0,
        must="at least 1, or 0 to take it from the data",
        metavar="D_IN",
        of_start=True,
    )
    """Width of an activation, also accepted as input_dim; 0: taken from the data. [numbers]"""
    transcoder: bool = setting(False, shards_only=_TARGETS, of_start=True)
    """Predict other activations, the targets, and not the input again: the output of an MLP from
    its input, for example."""
    d_out: int = setting(
        0,
        at_least=0,
        must="at least 1, or 0 to take it from the data",
        shards_only=_TARGETS,
        of_start=True,
    )
    """Width of a target; 0: taken from the data; without transcoder it is d_in. [numbers]"""
    skip_connection: bool = setting(False, shards_only=_TARGETS, of_start=True)
    """Add a linear map of the activation, W_skip, to the prediction of a transcoder."""
    d_sae: int = setting(
        0,
        at_least=0,
        must="at least 1, or 0 for expansion_factor * d_in",
        brief="number of latents; default: --expansion-factor times d_in",
        elsewhere=("dict_size", "d_hidden", "n_latents", "n_features", "latents"),
        of_start=True,
    )
    """Number of latents, also accepted as num_latents; 0: expansion_factor times d_in. [latents]"""
    expansion_factor: float | None = setting(
        None, above=0, on_resume="free", brief="d_sae / d_in, in place of --d-sae; default: 8"
    )
    """d_sae / d_in, in place of d_sae; 8 when neither is given. [ratio]"""
    k: int | None = setting(
        None,
        at_least=1,
        arch=_WITH_K,
        heading="Selection of latents",
        brief="latents active per token; default: 32",
        elsewhere=("topk", "top_k", "activation_k"),
        at_start=True,
    )
    """Latents active per token, on average where a batch selects; default: 32. [latents]"""
    activation: Literal["topk", "abs_topk", "groupmax"] = setting("topk", arch=_TOPK, at_start=True)
    """The k latents of a token that arch topk selects, in training and after. topk: the largest;
    abs_topk: the largest in magnitude, with their sign; groupmax: the largest of each of k
    groups."""
    multi_topk: bool = setting(
        False,
        arch=_TOPK,
        needs=Effect("a multi_topk_coeff above 0", lambda sae: sae.multi_topk_coeff > 0),
    )
    """Let the 4k largest latents of a token reconstruct as well, in training; with arch topk."""
    multi_topk_coeff: float = setting(
        1 / 8, at_least=0, arch=_TOPK, needs=Effect("multi_topk", lambda sae: sae.multi_topk)
    )
    """Weight of the squared error of these 4k latents."""
    matryoshka_prefixes: tuple[int, ...] | None = setting(None, arch=_MATRYOSHKA, at_start=True)
    """Sizes of the nested dictionaries, ascending, the last one d_sae; default: 1/16, 1/8, 1/4, 1/2
    and all of d_sae. [latents]"""
    matryoshka_weights: tuple[float, ...] | None = setting(None, arch=_MATRYOSHKA)
    """Weights of the nested dictionaries' squared errors, which are added up; default: 1 each."""
    use_relu: bool = setting(True, of_start=True)
    """Apply ReLU to the selected values, so that codes are never negative. Without it, with arch
    relu, all latents are active, with any sign, and the penalty is on magnitudes. The activation
    abs_topk has none."""
    subtract_b_dec: bool = setting(True, of_start=True)
    """Encode x - b_dec in place of x: f = ReLU(W_enc x + b_enc). A transcoder subtracts nothing."""

    loss_fn: Literal["mse", "fvu", "ce", "kl"] = setting("mse", heading="Loss")
    """Reconstruction error. mse: squared, summed over d_in and averaged over tokens; fvu: as a
    share of the variance of its batch, where other weights must be about d_in times smaller. Of a
    model that is at hand, its loss where the reconstruction takes the place of the activations; ce:
    the cross-entropy of the text; kl: the divergence from its own prediction."""
    reconstruction_coeff: float = setting(
        1.0,
        at_least=0,
        needs=Effect(
            "slots_mode = 'joint' or 'separate_activation'",
            lambda sae: sae.slots_mode != "separate_value",
        ),
    )
    """Weight of the reconstruction error."""
    l1_penalty_coeff: float | None = setting(
        None,
        at_least=0,
        arch=(*_WITH_K, *_WITH_L1),
        brief="weight of the L1 penalty; default: 5 with relu and gated",
        elsewhere=("l1_coefficient", "l1_coeff", "l1", "sparsity_coefficient"),
        slots_modes=_LATENTS,
    )
    """Weight of the L1 penalty: the sum of a token's code values, each times the norm of its
    decoder row, averaged over tokens; with gated the sum of its gates, with slots the sum over the
    free ones; default: 5 with relu and gated, 0.1 sqrt(d_in) with slots, d_in / 1000 with
    slots_l1_mean, each divided by d_in with loss_fn fvu; otherwise 0."""
    sparsity_norm_p: float = setting(1.0, above=0, at_most=1, arch=("relu",), needs=_AN_L1)
    """Power to which the values in that sum are raised with relu, 0 to 1; 1: L1."""
    target_l0: float | None = setting(
        None,
        above=0,
        arch=_THRESHOLDED,
        needs=_A_PENALTY,
        brief="L0 to train for, of relu, gated and jumprelu",
    )
    """L0 to train for. With relu and gated the weight of the penalty, which starts at
    l1_penalty_coeff, is led there; if not given it stays. With jumprelu it is the target of penalty
    l0_target; default: 32. All thresholds move towards it too. [latents]"""
    target_l0_rate: float = setting(
        0.01,
        above=0,
        arch=_WITH_L1,
        needs=Effect("target_l0", lambda sae: sae.target_l0 is not None),
    )
    """Change of the weight's logarithm in a step while L0 is off by 10 % or more."""
    decorrelation_coeff: float = setting(0.0, at_least=0, slots_modes=_LATENTS)
    """Weight of the decorrelation of decoder rows, in the form that decorrelation names."""
    decorrelation: Literal["gram_scaled", "gram_mean", "gram_sum", "chunked_max"] | None = setting(
        None,
        on_resume="kept",
        needs=Effect("a decorrelation_coeff above 0", lambda sae: sae.decorrelation_coeff > 0),
    )
    """Form of the decorrelation, of the squared cosines of two decoder rows. gram_scaled, the
    default: summed over the others, averaged over rows, in units of 1/16 of the reconstruction
    error of the mean, so that a weight of 0.1 acts at every size; gram_mean: averaged over pairs;
    gram_sum: summed over pairs; chunked_max: between a row and the nearest in a random chunk,
    averaged over rows."""
    decorrelation_chunk: int = setting(
        1024,
        at_least=2,
        needs=Effect(
            "decorrelation = 'chunked_max'", lambda sae: sae.decorrelation == "chunked_max"
        ),
    )
    """Least number of rows in a chunk of chunked_max; every batch has other chunks. [latents]"""
    sparsity_penalty: Literal["l0_target", "l0", "tanh"] | None = setting(
        None, arch=_JUMPRELU, needs=_A_PENALTY, heading="JumpReLU"
    )
    """Penalty of jumprelu. l0_target, the default: (L0 / target_l0 - 1)^2; l0: L0; tanh: the sum of
    tanh(jumprelu_tanh_scale * value * norm of decoder row)."""
    sparsity_penalty_coeff: float | None = setting(None, at_least=0, arch=_JUMPRELU)
    """Weight of sparsity_penalty; default: d_in (with a transcoder d_out) with l0_target, otherwise
    that / 400; with loss_fn fvu 1 in place of d_in."""
    pre_act_loss_coeff: float | None = setting(None, at_least=0, arch=_WITH_PRE_ACT_LOSS)
    """Weight of the distance of dead latents below their thresholds, with jumprelu, or below the
    opening of their gates, with gated; default: d_in (with a transcoder d_out) / 100,000, with
    loss_fn fvu 1 in place of d_in; 0: off."""
    jumprelu_init_threshold: float = setting(
        JUMPRELU_INIT_THRESHOLD, at_least=0, arch=_JUMPRELU, run_needs=_A_NEW_MODEL
    )
    """Start of the thresholds, in units of E|x| / sqrt(d_in)."""
    jumprelu_bandwidth: float = setting(JUMPRELU_BANDWIDTH, above=0, arch=_JUMPRELU)
    """Width of the window around a threshold whose entries move it, in units of
    E|x| / sqrt(d_in)."""
    jumprelu_threshold_lr: float = setting(1.0, above=0, arch=_JUMPRELU)
    """Learning rate of the thresholds, as a share of the other parameters' rate."""
    jumprelu_ste_to_input: bool = setting(False, arch=_JUMPRELU)
    """Let the entries in the window move the encoder too, and not only the thresholds."""
    jumprelu_tanh_scale: float = setting(
        4.0,
        above=0,
        arch=_JUMPRELU,
        needs=Effect("sparsity_penalty = 'tanh'", lambda sae: sae.sparsity_penalty == "tanh"),
    )
    """Factor within the tanh of sparsity_penalty tanh."""
    aux_k_coeff: float | None = setting(None, at_least=0, arch=_WITH_K, heading="Dead latents")
    """Weight of AuxK, where dead latents model the error of the others, beside a reconstruction
    error in units of the error of the mean; 0: off; default: 1/32."""
    aux_k: int | None = setting(
        None,
        at_least=1,
        must="at least 1 (aux_k_coeff = 0 switches AuxK off)",
        arch=_WITH_K,
        needs=Effect("an aux_k_coeff above 0", lambda sae: sae.aux_k_coeff != 0),
    )
    """Dead latents per token in AuxK, at most as many as are dead; default: 2 k, at most d_in / 2,
    with a transcoder d_out / 2. [latents]"""
    dead_after_tokens: int | None = setting(None, at_least=1, on_resume="kept")
    """Tokens without firing after which a latent counts as dead, also accepted as
    dead_feature_threshold; default: a twentieth of the run, at most 10,000,000. [tokens]"""

    normalize_activations: Literal["mean_scale", "none", "layer_norm", "constant_norm"] = setting(
        "mean_scale", heading="Normalisation and initialisation", of_start=True
    )
    """mean_scale: subtract the mean and scale to an expected norm of sqrt(d_in), targets separately
    to sqrt(d_out); none: leave activations as they are; layer_norm: of each token subtract the mean
    of its numbers and divide by their standard deviation; constant_norm: scale each token to a norm
    of sqrt(d_in)."""
    decoder_init: Literal["random", "orthogonal", "kaiming", "active_subspace"] = setting(
        "random", run_needs=_A_NEW_MODEL
    )
    """Start of the decoder rows, at unit length, and of W_enc, along them. random: random rows;
    orthogonal: orthogonal in blocks of d_in; active_subspace: random within the fewest principal
    components that hold 99 % of the variance of the first activations; kaiming: W_enc is uniform
    within 1/sqrt(d_in), and W_dec its rows at unit length. With a transcoder the two are drawn
    independently, W_dec within the components of the targets."""
    decoder_norm: Literal["unit", "free"] | None = setting(None, arch=_THRESHOLDED, at_start=True)
    """unit: decoder rows keep norm 1; free: they have any; default: free with relu, else unit."""
    decoder_init_norm: float | None = setting(
        None, above=0, arch=_THRESHOLDED, run_needs=_A_NEW_MODEL
    )
    """Norm at which free decoder rows start, and W_enc with them; default: 0.1."""
    b_dec_init: Literal["zero", "mean", "geometric_median"] = setting(
        "zero", run_needs=_A_NEW_MODEL
    )
    """Start of b_dec: zero (right for centred data), or the centre of the first activations, with
    a transcoder of their targets."""

    probe_loss_coeff: float = setting(
        0.0,
        at_least=0,
        heading="Probe and neighbouring tokens",
        slots_modes=_LATENTS,
        shards_only=_LABELS,
    )
    """Weight of the loss of a linear probe that predicts probe_labels from the code."""
    probe_labels: str | None = setting(None, nonempty=True, needs=_A_PROBE, shards_only=_LABELS)
    """Dataset of the shards with a label for each row, such as labels/rule; -1: it has none."""
    probe_task: Literal["classification", "regression"] = setting(
        "classification", needs=_A_PROBE, shards_only=_LABELS
    )
    """Cross-entropy over classes or squared error of a number, averaged over labelled tokens."""
    probe_classes: int | None = setting(None, at_least=2, needs=_A_PROBE, shards_only=_LABELS)
    """Classes that the labels number from 0; default: the largest label + 1. [classes]"""
    temporal_smoothness_coeff: float = setting(0.0, at_least=0, slots_modes=_LATENTS)
    """Weight of the squared change of the code to the next token of its sequence, a mean."""
    independence_coeff: float | None = setting(
        None, at_least=0, heading="Correlation of latents", slots_modes=_LATENTS
    )
    """Weight of the squared correlations of latents' activations over a batch, for pairs of latents
    below correlation_split; default: 0.01 with slots that are aligned, otherwise 0."""
    orthogonality_coeff: float | None = setting(None, at_least=0, slots_modes=_LATENTS)
    """Weight of these squared correlations for pairs of a latent below correlation_split and one
    that is not; default: 0.01 with slots that are aligned, otherwise 0."""
    correlation_pairs: Literal["scaled", "mean", "sum"] | None = setting(
        None, on_resume="kept", needs=_A_CORRELATION
    )
    """Form of both. mean: means over pairs of latents that are not silent in the batch; sum: sums;
    scaled, the default: sums per latent in units of the reconstruction error of the mean, so that a
    weight of 0.01 acts at every size."""
    correlation_split: int | None = setting(None, needs=_A_CORRELATION)
    """Where the second group of latents begins; default: at the relation slots, or there is none.
    [latents]"""

    slots_mode: Literal["joint", "separate_activation", "separate_value"] | None = setting(
        None, arch=_SLOTS, heading="Slots"
    )
    """Parts of slots that are trained. joint, the default: latents and value heads;
    separate_activation: the latents alone; separate_value: the heads alone, on the model that
    --start-from names."""
    n_relations: int | None = setting(None, at_least=1, arch=_SLOTS, of_start=True)
    """Relation slots, the last latents; default: the largest relation + 1. [latents]"""
    n_answers: int | None = setting(None, at_least=1, arch=_SLOTS, needs=_ANSWERS)
    """Answers that the labels number from 0; default: the largest + 1. [answers]"""
    relation_labels: str | None = setting(None, nonempty=True, arch=_SLOTS)
    """Dataset of the shards with a relation for each row, -1: none; default: labels/relation."""
    answer_labels: str | None = setting(None, nonempty=True, arch=_SLOTS, needs=_ANSWERS)
    """Dataset of the shards with an answer for each row, -1: none; default: labels/answer."""
    alignment_coeff: float | None = setting(None, at_least=0, arch=_SLOTS, slots_modes=_LATENTS)
    """Weight of the squared distance of the relation slots to slot_target times the one-hot
    relation; default: d_in / slot_target², so that a relation that is missed costs as much as the
    reconstruction of a token by the mean; 1 / slot_target² with loss_fn fvu."""
    alignment_after_relu: bool = setting(
        False,
        arch=_SLOTS,
        needs=Effect(
            "an alignment_coeff above 0",
            lambda sae: sae.alignment_coeff != 0 and sae.slots_mode != "separate_value",
        ),
    )
    """Measure that distance after ReLU and with slot_target 1 by default, as L_align is written,
    where a slot that is off gets no gradient; default: before it."""
    slots_l1_mean: bool = setting(False, arch=_SLOTS, needs=_AN_L1)
    """Average the L1 penalty over the free slots, as L_sparse is written, in place of a sum over
    them. Its default weight is then the paper's, which hardly acts."""
    slot_target: float | None = setting(
        None,
        above=0,
        arch=_SLOTS,
        needs=Effect(
            "an alignment_coeff above 0, or slots_mode = 'joint' or 'separate_value'",
            lambda sae: sae.alignment_coeff != 0 or sae.slots_mode != "separate_activation",
        ),
    )
    """Value that the slot of a token's relation is led to, in units of E|x| / sqrt(d_in); default:
    sqrt(d_in) / 2, half the norm of an activation; 1 with alignment_after_relu."""
    value_loss_coeff: float | None = setting(None, at_least=0, arch=_SLOTS, slots_modes=_HEADS)
    """Weight of the cross-entropy of the answer, predicted from the relation's slot by a separate
    head; default: 0.1 times d_in; with loss_fn fvu 0.1; with separate_value 0.5."""
    value_hidden: int | None = setting(None, at_least=1, arch=_SLOTS, needs=_ANSWERS)
    """Width of a value head's hidden layer; default: 256. [numbers]"""

    def __new__(cls, **settings: Any) -> SAEConfig:
        """Make the configuration of the architecture, which for a registered one is its own."""
        own = config_of(settings.get("arch")) if cls is SAEConfig else cls
        return object.__new__(own)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAEConfig:
        """Make the configuration from JSON values; raise ValueError naming every unknown key.

        Raises ValueError where the architecture is registered by a module not yet imported.
        """
        values = dict(values)
        own = config_of(values.get("arch"), values.pop(_REGISTERED_BY, None))
        known = [*field_names(own), *own.aliases]
        for name, other in _registered.items():
            if strange := [key for key in values if key in field_names(other) and key not in known]:
                raise ValueError(
                    f"{strange[0]} belongs to arch {name} and must be left out with arch "
                    f"{values.get('arch', SAEConfig.arch)}, got {shown(values[strange[0]])}"
                )
        reject_unknown_keys(values, known)
        return own(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values, and the module that registers the architecture."""
        by = {_REGISTERED_BY: self.registered_by} if self.registered_by else {}
        return {**super().to_dict(), **by}

    def __post_init__(self) -> None:
        """Check the settings beside each other; raise ValueError naming field and value."""
        self._check_architecture()
        self._check_transcoder()
        self._check_k()
        self._check_matryoshka()
        self._check_objective()
        self._check_token_norm()
        self._check_sparsity()
        self._check_probe()
        self._check_slots()
        self._check_correlation()
        check_effects(self)

    # Filling in

    def resolve(
        self, d_in: int = 0, d_out: int = 0, labels: Mapping[str, int | None] | None = None
    ) -> SAEConfig:
        """Return the configuration for activations of these widths, with all filled in.

        Args:
            d_in: width of the activations; 0 leaves it as it is, and open sizes open.
            d_out: width of a transcoder's targets.
            labels: counts of labels by the setting that has them: probe_classes, n_relations or
                n_answers.

        Raises:
            ValueError: if it was made for another width, or a setting does not fit the sizes.
        """
        if d_in and self.d_in not in (0, d_in):
            raise ValueError(f"d_in must be {d_in}, the width of the activations, got {self.d_in}")
        if d_out and self.d_out not in (0, d_out):
            raise ValueError(f"d_out must be {d_out}, the width of the targets, got {self.d_out}")
        widths = {"d_in": d_in or self.d_in, "d_out": d_out or self.d_out}
        return type(self)(**{**self.given, **widths, **(labels or {})})

    def for_run(self, tokens: int) -> SAEConfig:
        """Return the configuration with what follows from the number of tokens of a run."""
        if self.dead_after_tokens is not None:
            return self
        dead_after = max(1, min(DEAD_AFTER_TOKENS, tokens // DEAD_AFTER_SHARE))
        return type(self)(**{**self.given, "dead_after_tokens": dead_after})

    def with_d_in(self, d_in: int, d_out: int = 0) -> SAEConfig:
        """Return the configuration for activations of width d_in, see `resolve`."""
        return self.resolve(d_in, d_out)

    @classmethod
    def completed(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the settings with those filled in that were left open, once the widths are known.

        This is the one place where a default that follows from other settings is chosen.
        """
        asked = object.__new__(cls)  # to read the settings by, not checked yet
        asked.__dict__.update(settings)
        if not asked._has_widths:  # what a flag or the data may yet change is not derived
            return settings
        sized = {**settings, "d_sae": asked._derived_d_sae()}
        asked.__dict__.update(sized)
        filled = asked._defaults_of_selection() | asked._defaults_of_sparsity()
        if asked.arch == "slots":
            filled |= asked._defaults_of_slots()
        return sized | {name: value for name, value in filled.items() if settings[name] is None}

    def _derived_d_sae(self) -> int:
        factor = self.expansion_factor
        latents = self.d_in * (DEFAULT_EXPANSION_FACTOR if factor is None else factor)
        is_number = math.isfinite(latents)
        require("expansion_factor", is_number, "a factor of d_in to latents", factor)
        derived = round(latents)
        if self.d_sae == 0:
            expected = f"large enough for a latent at d_in = {self.d_in}"
            require("expansion_factor", derived >= 1, expected, factor)
            return derived
        if factor is not None and derived != self.d_sae:
            raise ValueError(
                f"expansion_factor must agree with d_sae = {self.d_sae} at d_in = {self.d_in} "
                f"(give one of the two), got {factor:g}"
            )
        return self.d_sae

    def _defaults_of_selection(self) -> dict[str, Any]:
        filled: dict[str, Any] = {"aux_k_coeff": 0.0}
        if self.takes("k"):
            filled["k"] = min(DEFAULT_K, self.d_sae)
        if self.takes("aux_k_coeff"):
            filled["aux_k_coeff"] = DEFAULT_AUX_K_COEFF
        if self.arch == "matryoshka":
            halvings = {max(self.d_sae >> times, 1) for times in range(MATRYOSHKA_SIZES)}
            sizes = self.matryoshka_prefixes or tuple(sorted(halvings))
            filled |= {"matryoshka_prefixes": sizes, "matryoshka_weights": (1.0,) * len(sizes)}
        return filled

    def _defaults_of_sparsity(self) -> dict[str, Any]:
        """Return norm of the decoder, penalties and their weights."""
        filled: dict[str, Any] = {
            "l1_penalty_coeff": self._default_l1 if self.takes("target_l0_rate") else 0.0,
            "decorrelation": "gram_scaled",
            "correlation_pairs": "scaled",
            **dict.fromkeys(("independence_coeff", "orthogonality_coeff", "alignment_coeff"), 0.0),
            "value_loss_coeff": 0.0,
            "pre_act_loss_coeff": 0.0,
        }
        if self.takes("pre_act_loss_coeff"):
            filled["pre_act_loss_coeff"] = DEFAULT_PRE_ACT_PRICE * self.error_of_the_mean
        if self.takes("decoder_norm"):
            filled["decoder_norm"] = self._decoder_norm
            if self._decoder_norm == "free":
                filled["decoder_init_norm"] = DEFAULT_FREE_NORM
        if self.arch == "jumprelu":
            penalty = self.sparsity_penalty or "l0_target"
            weight = self.error_of_the_mean * (
                1.0 if penalty == "l0_target" else DEFAULT_LATENT_PRICE
            )
            filled |= {"sparsity_penalty": penalty, "sparsity_penalty_coeff": weight}
            if penalty == "l0_target":
                filled["target_l0"] = min(DEFAULT_TARGET_L0, float(self.d_sae))
        return filled

    def _defaults_of_slots(self) -> dict[str, Any]:
        """Return labels, target and the weights of the terms that the mode trains."""
        mode, error = self.slots_mode or "joint", self.error_of_the_mean
        target = 1.0 if self.alignment_after_relu else 0.5 * self._typical_norm
        filled: dict[str, Any] = {
            "slots_mode": mode,
            "relation_labels": RELATION_LABELS,
            "slot_target": target,
        }
        if mode != "separate_value":
            # In units of the target: a slot that is off costs as much at every target.
            filled["alignment_coeff"] = error / (self.slot_target or target) ** 2
            filled["independence_coeff"] = _SLOTS_CORRELATION
            filled["orthogonality_coeff"] = _SLOTS_CORRELATION
        if mode != "separate_activation":
            alone = mode == "separate_value"  # where nothing else is trained
            filled["value_loss_coeff"] = _SLOTS_VALUE_ALONE if alone else error * _SLOTS_VALUE
            filled |= {"answer_labels": ANSWER_LABELS, "value_hidden": DEFAULT_VALUE_HIDDEN}
        return filled

    @property
    def _default_l1(self) -> float:
        if self.arch != "slots":
            return DEFAULT_L1 * self.error_of_the_mean / self.target_width
        if self.slots_mode == "separate_value":
            return 0.0
        share = _SLOTS_L1_MEAN if self.slots_l1_mean else _SLOTS_L1 / self._typical_norm
        return share * self.error_of_the_mean

    @property
    def _typical_norm(self) -> float:
        """The norm of normalised activations."""
        return math.sqrt(self.target_width)

    @property
    def _decoder_norm(self) -> str:
        return self.decoder_norm or ("free" if self.arch == "relu" else "unit")

    def with_room(self, size: int) -> dict[str, Any]:
        """Return the settings that stand for open widths where these are to be `size`."""
        widths = {"d_in": self.d_in or size}
        return {**widths, "d_out": self.d_out or size} if self.transcoder else widths

    # Checks

    def takes(self, name: str) -> bool:
        """Return whether the architecture has a setting."""
        architectures = rules_of(self)[name].arch
        return not architectures or self.arch in architectures or name in self.shared

    def _require(self, name: str, condition: bool, expected: str) -> None:
        require(name, condition, expected, getattr(self, name))

    def _check_architecture(self) -> None:
        """Refuse settings that the architecture does not have, unless they switch something off."""
        defaults = self.defaults()
        for name, rules in rules_of(self).items():
            value = getattr(self, name)
            is_off = value in (defaults[name], None, 0.0)
            if not self.takes(name) and not is_off:
                raise ValueError(
                    f"{name} belongs to arch {' or '.join(rules.arch)} and must be left out "
                    f"with arch {self.arch}, got {value!r}"
                )

    def _check_transcoder(self) -> None:
        for name in ("d_out", "skip_connection"):
            if getattr(self, name) and not self.transcoder:
                raise ValueError(
                    f"{name} belongs to a transcoder and must be left out without transcoder, "
                    f"got {getattr(self, name)!r}"
                )
        if self.transcoder and not self.subtract_b_dec:
            raise ValueError(
                "subtract_b_dec must be left out with a transcoder, which subtracts nothing, "
                "got False"
            )

    def _check_k(self) -> None:
        if self.d_sae > 0 and self.k is not None:
            self._require("k", self.k <= self.d_sae, f"at most d_sae = {self.d_sae}")
            divides = self.activation != "groupmax" or self.d_sae % self.k == 0
            self._require("k", divides, f"a divisor of d_sae = {self.d_sae} with groupmax")
        if self.multi_topk and self.activation == "groupmax":
            raise ValueError("multi_topk must be left out with activation groupmax, got True")

    def _check_matryoshka(self) -> None:
        prefixes, weights = self.matryoshka_prefixes, self.matryoshka_weights
        if prefixes is not None:
            ascend = list(prefixes) == sorted({size for size in prefixes if size > 0})
            self._require("matryoshka_prefixes", ascend and len(prefixes) > 0, "ascending, from 1")
            ends = self.d_sae in (0, prefixes[-1])
            must = f"sizes of which the last is d_sae = {self.d_sae}"
            self._require("matryoshka_prefixes", ends, must)
        if weights is not None:
            n_prefixes = MATRYOSHKA_SIZES if prefixes is None else len(prefixes)
            fits = len(weights) == n_prefixes and all(weight >= 0 for weight in weights)
            self._require("matryoshka_weights", fits, f"{n_prefixes} numbers of at least 0")

    def _check_objective(self) -> None:
        """Refuse codes without ReLU where latents are chosen, and losses of another model."""
        if not self.use_relu and self.arch != "relu":
            raise ValueError(
                f"use_relu must be true for arch {self.arch!r}, got False: only with arch relu "
                "can codes be negative"
            )
        if not self.use_relu and self.target_l0 is not None:
            raise ValueError(
                "target_l0 must be left out without use_relu, where all latents are active, "
                f"got {self.target_l0:g}"
            )
        if self.is_end_to_end and (self.arch in ("matryoshka", "slots") or self.multi_topk):
            several = "multi_topk" if self.multi_topk else f"arch {self.arch}"
            raise ValueError(f"loss_fn {self.loss_fn} is of one reconstruction, not with {several}")
        if self.is_end_to_end and self.transcoder:
            raise ValueError(f"loss_fn {self.loss_fn} does not go with a transcoder")

    def _check_token_norm(self) -> None:
        """Refuse what has no meaning where each token has units of its own."""
        if not self.normalizes_tokens:
            return
        if self.transcoder:
            raise ValueError(
                f"normalize_activations {self.normalize_activations} does not go with a "
                "transcoder, whose targets have other units than its inputs"
            )
        if self.is_end_to_end:
            raise ValueError(
                f"loss_fn {self.loss_fn} does not go with normalize_activations "
                f"{self.normalize_activations}"
            )
        if self.d_in == 1 and self.normalize_activations == "layer_norm":
            raise ValueError("normalize_activations layer_norm needs a d_in of at least 2, got 1")

    def _check_sparsity(self) -> None:
        if self.target_l0 is not None and self.d_sae > 0:
            must = f"at most d_sae = {self.d_sae}"
            self._require("target_l0", self.target_l0 <= self.d_sae, must)
        if self.target_l0 is not None and self.l1_penalty_coeff == 0 and self.arch != "jumprelu":
            raise ValueError(
                "target_l0 leads l1_penalty_coeff, which must be greater than 0, got 0.0"
            )
        if self.target_l0 is not None and self.sparsity_penalty in ("l0", "tanh"):
            raise ValueError(
                "target_l0 is for sparsity_penalty = 'l0_target' and must be left out with "
                f"{self.sparsity_penalty!r}, got {self.target_l0:g}"
            )
        if self.decoder_init_norm is not None and self._decoder_norm == "unit":
            raise ValueError(
                "decoder_init_norm is for decoder_norm = 'free' and must be left out with "
                f"'unit', got {self.decoder_init_norm:g}"
            )

    def _check_probe(self) -> None:
        if self.probe_classes is not None and self.probe_task == "regression":
            raise ValueError(
                "probe_classes must be left out with probe_task regression, "
                f"got {self.probe_classes}"
            )

    def _check_slots(self) -> None:
        if self.n_relations is not None and self.d_sae > 0:
            must = f"below d_sae = {self.d_sae}, which counts the free slots too"
            self._require("n_relations", self.n_relations < self.d_sae, must)
        if self.arch != "slots":
            return
        mode = self.slots_mode or "joint"
        for name, rules in rules_of(self).items():
            value = getattr(self, name)
            if value and rules.slots_modes and mode not in rules.slots_modes:
                raise ValueError(f"{name} must be left out with slots_mode {mode}, got {value:g}")

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

    # Reading

    @property
    def is_complete(self) -> bool:
        """Whether the sizes are known, as a model needs them."""
        return self._has_widths and self.d_sae > 0

    @property
    def has_scale(self) -> bool:
        """Whether the model has a mean and a scale of its activations."""
        return self.normalize_activations == "mean_scale"

    @property
    def normalizes_tokens(self) -> bool:
        """Whether each token is normalised by numbers of its own."""
        return self.normalize_activations in ("layer_norm", "constant_norm")

    @property
    def target_width(self) -> int:
        """Width of the reconstruction: d_out of a transcoder, otherwise d_in."""
        return self.d_out if self.transcoder else self.d_in

    @property
    def _has_widths(self) -> bool:
        return self.d_in > 0 and self.target_width > 0

    @property
    def kept_aux_k(self) -> int:
        """`aux_k`, or its default; 0 where AuxK is off."""
        if not self.aux_k_coeff or self.k is None:
            return 0
        return self.aux_k or max(1, min(2 * self.k, self.target_width // 2))

    @property
    def kept_dead_after_tokens(self) -> int:
        """`dead_after_tokens`, or its default outside of a run."""
        return DEAD_AFTER_TOKENS if self.dead_after_tokens is None else self.dead_after_tokens

    @property
    def error_of_the_mean(self) -> float:
        """Reconstruction error per token of the mean, of normalised data: d_in, or 1 with fvu."""
        return float(self.target_width) if self.loss_fn == "mse" else 1.0

    @property
    def is_end_to_end(self) -> bool:
        """Whether the loss is the language model's, which reads the reconstruction."""
        return self.loss_fn in ("ce", "kl")

    @property
    def has_signed_codes(self) -> bool:
        """Whether values of a code may be negative."""
        return not self.use_relu or self.activation == "abs_topk"

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
        """First latent of the second group; d_sae if there is none."""
        if self.arch == "slots":
            return self.d_sae - (self.n_relations or 0)
        return self.d_sae if self.correlation_split is None else self.correlation_split


def without_other_size(values: dict[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Drop d_sae or expansion_factor where the settings that win over them give the other one."""
    outweighed = [
        other
        for one, other in (("d_sae", "expansion_factor"), ("expansion_factor", "d_sae"))
        if stronger.get(one)
    ]
    return {name: value for name, value in values.items() if name not in outweighed}
