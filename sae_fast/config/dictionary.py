"""`DictionaryConfig`: what of a model, and of its loss, needs activations alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from sae_fast.config.fields import ConfigFile

DEFAULT_EXPANSION_FACTOR = 8
DEFAULT_K = 32
DEFAULT_AUX_K_COEFF = 1 / 32
DEFAULT_L1 = 5.0  # for activations of norm sqrt(d_in), as normalize_activations makes them
DEFAULT_FREE_NORM = 0.1
MATRYOSHKA_SIZES = 5  # of the nested dictionaries by default: d_sae halved so many times less one
DEFAULT_TARGET_L0 = 32.0
# What one more active latent must explain, as a share of the variance: 10 at a d_in of 4096, which
# is Anthropic's weight of the tanh.
DEFAULT_LATENT_PRICE = 1 / 400
# Pre-activations start with a spread of 1. From 0.5 with a window of 0.5, L0 is at its target of 32
# after 200 steps (MiniLM, lr 3e-3); from 0.1 with 0.2 it is 142, from 0.001 with 0.001 it is 395.
JUMPRELU_INIT_THRESHOLD = 0.5
JUMPRELU_BANDWIDTH = 0.5

Config = TypeVar("Config", bound="DictionaryConfig")

K_ARCHITECTURES = ("topk", "batch_topk", "matryoshka")
_WITH_L1 = ("relu", "gated", "slots")
_THRESHOLDED = (*_WITH_L1, "jumprelu")
# Settings that only some architectures have; with another they must stay at their defaults.
_BELONG_TO: dict[str, tuple[str, ...]] = {
    "k": K_ARCHITECTURES,
    "aux_k_coeff": K_ARCHITECTURES,
    "aux_k": K_ARCHITECTURES,
    "activation": ("topk",),
    "multi_topk": ("topk",),
    "multi_topk_coeff": ("topk",),
    "matryoshka_prefixes": ("matryoshka",),
    "matryoshka_weights": ("matryoshka",),
    "l1_penalty_coeff": (*K_ARCHITECTURES, *_WITH_L1),
    "decoder_norm": _THRESHOLDED,
    "decoder_init_norm": _THRESHOLDED,
    "sparsity_norm_p": ("relu",),
    "target_l0": _THRESHOLDED,
    "target_l0_rate": _WITH_L1,
    "sparsity_penalty": ("jumprelu",),
    "sparsity_penalty_coeff": ("jumprelu",),
    "pre_act_loss_coeff": ("jumprelu",),
    "jumprelu_init_threshold": ("jumprelu",),
    "jumprelu_bandwidth": ("jumprelu",),
    "jumprelu_threshold_lr": ("jumprelu",),
    "jumprelu_ste_to_input": ("jumprelu",),
    "jumprelu_tanh_scale": ("jumprelu",),
    "slots_mode": ("slots",),
    "n_relations": ("slots",),
    "n_answers": ("slots",),
    "relation_labels": ("slots",),
    "answer_labels": ("slots",),
    "alignment_coeff": ("slots",),
    "slot_target": ("slots",),
    "value_loss_coeff": ("slots",),
    "value_hidden": ("slots",),
    "alignment_after_relu": ("slots",),
    "slots_l1_mean": ("slots",),
}
_POSITIVE = (
    *("target_l0", "target_l0_rate", "decoder_init_norm"),
    *("jumprelu_bandwidth", "jumprelu_threshold_lr", "jumprelu_tanh_scale"),
)


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig(ConfigFile):
    """Architecture, sizes, unsupervised terms of the loss, normalisation and initialisation.

    `d_in=0` leaves the sizes open until the data are known (`with_d_in`); a model needs them. So
    does `d_out=0` with a transcoder.
    """

    arch: Literal["topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated", "slots"] = "topk"
    """Architecture: the k largest latents of every token (topk), k a token on average over a batch
    (batch_topk), that with dictionaries nested in one another (matryoshka), all latents above 0,
    made few by an L1 penalty (relu), all above trained thresholds (jumprelu), all whose gate is
    open, with a strength of their own (gated), or as relu with latents that are bound to labelled
    relations (slots)."""
    d_in: int = 0
    """Width of an activation, also accepted as input_dim; 0: taken from the data. [numbers]"""
    transcoder: bool = False
    """Predict other activations, the targets, not the same ones again: from the input of an MLP its
    output, for example."""
    d_out: int = 0
    """Width of a target; 0: taken from the data; without transcoder it is d_in. [numbers]"""
    skip_connection: bool = False
    """Add a linear map of the activation, W_skip, to what a transcoder predicts."""
    d_sae: int = 0
    """Number of latents, also accepted as num_latents; 0: expansion_factor times d_in. [latents]"""
    expansion_factor: float | None = None
    """d_sae / d_in, in place of d_sae; 8 when neither is given. [ratio]"""
    k: int | None = None
    """Latents active per token, on average where a batch selects; default: 32. [latents]"""
    activation: Literal["topk", "abs_topk", "groupmax"] = "topk"
    """Which k latents of a token arch topk takes, in training and after: the largest (topk), the
    largest in magnitude, with their sign (abs_topk), or that of each of k groups (groupmax)."""
    multi_topk: bool = False
    """Let the 4k largest latents of a token reconstruct as well, in training; with arch topk."""
    multi_topk_coeff: float = 1 / 8
    """Weight of the squared error of these 4k latents."""
    matryoshka_prefixes: tuple[int, ...] | None = None
    """Sizes of the nested dictionaries, ascending, the last one d_sae; default: 1/16, 1/8, 1/4, 1/2
    and all of d_sae. [latents]"""
    matryoshka_weights: tuple[float, ...] | None = None
    """Weights of the nested dictionaries' squared errors, which are added up; default: 1 each."""
    use_relu: bool = True
    """ReLU on the selected values, so that codes are never negative. Without it, with arch relu,
    all latents are active, with any sign, and the penalty is on magnitudes. The activation abs_topk
    has none."""
    subtract_b_dec: bool = True
    """Encode x - b_dec, not x itself: f = ReLU(W_enc x + b_enc). A transcoder subtracts nothing."""

    loss_fn: Literal["mse", "fvu", "ce", "kl"] = "mse"
    """Reconstruction error: squared, summed over d_in and averaged over tokens (mse), or as a share
    of the variance of its batch (fvu), where other weights must be about d_in times smaller. With a
    model that is at hand, its loss where the reconstruction takes the place of the activations: the
    cross-entropy of the text (ce), or the divergence from its own prediction (kl)."""
    reconstruction_coeff: float = 1.0
    """Weight of the reconstruction error."""
    l1_penalty_coeff: float | None = None
    """Weight of the sum of a token's code values, each times the norm of its decoder row, averaged
    over tokens; with gated of its gates, with slots of the free ones; default: 5 with relu and
    gated, 0.1 sqrt(d_in) with slots, d_in / 1000 with slots_l1_mean, each divided by d_in with
    loss_fn fvu; otherwise 0."""
    sparsity_norm_p: float = 1.0
    """With relu the values in that sum are raised to this power, 0 to 1; 1: L1."""
    target_l0: float | None = None
    """L0 to train for. relu, gated: the penalty's weight is led there from l1_penalty_coeff; if not
    given it stays. jumprelu: the target of penalty l0_target; default: 32. [latents]"""
    target_l0_rate: float = 0.01
    """How fast: the weight's logarithm moves so far in a step while L0 is off by a factor of e."""
    decorrelation_coeff: float = 0.0
    """Weight of the decorrelation of decoder rows, in the form that decorrelation names."""
    decorrelation: Literal["gram_scaled", "gram_mean", "gram_sum", "chunked_max"] | None = None
    """Squared cosine of two decoder rows: summed over the others, averaged over rows, in units of
    1/16 of the reconstruction error of the mean, so that a weight of 0.1 acts at every size
    (gram_scaled, the default); as it is, averaged over pairs (gram_mean) or summed (gram_sum); or
    that of a row and the nearest in a random chunk, averaged over rows (chunked_max)."""
    decorrelation_chunk: int = 1024
    """Rows in a chunk of chunked_max, at least; every batch has other chunks. [latents]"""
    sparsity_penalty: Literal["l0_target", "l0", "tanh"] | None = None
    """jumprelu: (L0 / target_l0 - 1)^2; or L0; or the sum of tanh(jumprelu_tanh_scale * value *
    norm of decoder row); default: l0_target."""
    sparsity_penalty_coeff: float | None = None
    """Weight of sparsity_penalty; default: d_in (with a transcoder d_out) with l0_target, otherwise
    that / 400; with loss_fn fvu 1 in place of d_in."""
    pre_act_loss_coeff: float = 0.0
    """jumprelu: weight of how far dead latents are below their thresholds; 3e-6 is customary."""
    jumprelu_init_threshold: float = JUMPRELU_INIT_THRESHOLD
    """Start of the thresholds, in units of E|x| / sqrt(d_in)."""
    jumprelu_bandwidth: float = JUMPRELU_BANDWIDTH
    """Width of the window round a threshold whose entries move it, in the same units."""
    jumprelu_threshold_lr: float = 1.0
    """Learning rate of the thresholds, as a share of that of the other parameters."""
    jumprelu_ste_to_input: bool = False
    """Whether the entries in the window move the encoder too, not only the thresholds."""
    jumprelu_tanh_scale: float = 4.0
    """Factor within the tanh of sparsity_penalty tanh."""
    aux_k_coeff: float | None = None
    """Weight of AuxK, where dead latents model the error of the others; 0: off; default: 1/32."""
    aux_k: int | None = None
    """Dead latents per token in AuxK, at most as many as are dead; default: d_in / 2, with a
    transcoder d_out / 2. [latents]"""
    dead_after_tokens: int = 10_000_000
    """A latent that has not fired for so long counts as dead. [tokens]"""

    normalize_activations: Literal["mean_scale", "none"] = "mean_scale"
    """mean_scale: subtract the mean, scale to an expected norm of sqrt(d_in), targets on their own
    to sqrt(d_out); none: as they are."""
    decoder_init: Literal["random", "orthogonal", "kaiming", "active_subspace"] = "random"
    """Unit decoder rows, and W_enc the same: random, orthogonal in blocks of d_in, or random within
    the fewest principal components that hold 99 % of the variance of the first activations. With
    kaiming W_enc is uniform within 1/sqrt(d_in), and W_dec its rows at unit length. With a
    transcoder the two are drawn independently, W_dec within the components of the targets."""
    decoder_norm: Literal["unit", "free"] | None = None
    """unit: decoder rows keep norm 1; free: they have any; default: free with relu, else unit."""
    decoder_init_norm: float | None = None
    """Norm at which free decoder rows start, and W_enc with them; default: 0.1."""
    b_dec_init: Literal["zero", "mean", "geometric_median"] = "zero"
    """Start of b_dec: zero (right for centred data), or the centre of the first activations, with
    a transcoder of their targets."""

    def __post_init__(self) -> None:
        """Check every field and complete d_sae; raises ValueError naming field and value."""
        self._check_types()
        self._require("d_in", self.d_in >= 0, "at least 1, or 0 to take it from the data")
        self._require("d_sae", self.d_sae >= 0, "at least 1, or 0 for expansion_factor * d_in")
        if self.expansion_factor is not None:
            self._require("expansion_factor", self.expansion_factor > 0, "greater than 0")
        self._require("k", self.k is None or self.k >= 1, "at least 1")
        self._check_architecture()
        self._check_transcoder()
        if self._has_widths:
            self._complete_d_sae()
            self._complete_k()
            self._complete_sparsity()
            self._complete_matryoshka()
        self._check_matryoshka()
        if self.d_sae > 0 and self.k is not None:
            self._require("k", self.k <= self.d_sae, f"at most d_sae = {self.d_sae}")
            divides = self.activation != "groupmax" or self.d_sae % self.k == 0
            self._require("k", divides, f"a divisor of d_sae = {self.d_sae} with groupmax")
        if self.multi_topk and self.activation == "groupmax":
            raise ValueError("multi_topk must be left out with activation groupmax, got True")
        self._check_objective()

    def _check_architecture(self) -> None:
        """Refuse settings that the architecture does not have, where they say anything."""
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for name, architectures in _BELONG_TO.items():
            is_off = getattr(self, name) in (defaults[name], None, 0.0)
            if self.arch not in architectures and not is_off:
                raise ValueError(
                    f"{name} belongs to arch {' or '.join(architectures)} and must be left out "
                    f"with arch {self.arch}, got {getattr(self, name)!r}"
                )

    def _check_transcoder(self) -> None:
        self._require("d_out", self.d_out >= 0, "at least 1, or 0 to take it from the data")
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

    def _complete_k(self) -> None:
        has_k = self.arch in _BELONG_TO["k"]
        if self.k is None and has_k:
            object.__setattr__(self, "k", min(DEFAULT_K, self.d_sae))
        if self.aux_k_coeff is None:
            object.__setattr__(self, "aux_k_coeff", DEFAULT_AUX_K_COEFF if has_k else 0.0)

    def _complete_matryoshka(self) -> None:
        if self.arch != "matryoshka":
            return
        if self.matryoshka_prefixes is None:
            halvings = {max(self.d_sae >> times, 1) for times in range(MATRYOSHKA_SIZES)}
            object.__setattr__(self, "matryoshka_prefixes", tuple(sorted(halvings)))
        if self.matryoshka_weights is None:
            assert self.matryoshka_prefixes is not None
            object.__setattr__(self, "matryoshka_weights", (1.0,) * len(self.matryoshka_prefixes))

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

    def _complete_sparsity(self) -> None:
        """The decoder's norm, the penalty and its weight, where left to the architecture."""
        defaults: dict[str, object] = {"l1_penalty_coeff": 0.0, "decorrelation": "gram_scaled"}
        if self.arch in _BELONG_TO["target_l0_rate"]:
            defaults["l1_penalty_coeff"] = self._default_l1
        if self.arch in _BELONG_TO["decoder_norm"]:
            defaults["decoder_norm"] = self._default_decoder_norm
        if self.arch == "jumprelu":
            penalty = self.sparsity_penalty or "l0_target"
            weight = self._variance * (1.0 if penalty == "l0_target" else DEFAULT_LATENT_PRICE)
            defaults |= {"sparsity_penalty": penalty, "sparsity_penalty_coeff": weight}
            if penalty == "l0_target":
                defaults["target_l0"] = min(DEFAULT_TARGET_L0, float(self.d_sae))
        if (self.decoder_norm or defaults.get("decoder_norm")) == "free":
            defaults["decoder_init_norm"] = DEFAULT_FREE_NORM
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    def _complete_d_sae(self) -> None:
        factor = self.expansion_factor
        latents = self.d_in * (DEFAULT_EXPANSION_FACTOR if factor is None else factor)
        self._require("expansion_factor", math.isfinite(latents), "a factor of d_in to latents")
        derived = round(latents)
        if self.d_sae == 0:
            self._require(
                "expansion_factor", derived >= 1, f"large enough for a latent at d_in = {self.d_in}"
            )
            object.__setattr__(self, "d_sae", derived)
        elif factor is not None and derived != self.d_sae:
            raise ValueError(
                f"expansion_factor must agree with d_sae = {self.d_sae} at d_in = {self.d_in} "
                f"(give one of the two), got {factor:g}"
            )

    def _check_objective(self) -> None:
        if not self.use_relu:
            self._check_identity()
        if self.is_end_to_end and (self.arch in ("matryoshka", "slots") or self.multi_topk):
            several = "multi_topk" if self.multi_topk else f"arch {self.arch}"
            raise ValueError(f"loss_fn {self.loss_fn} is of one reconstruction, not with {several}")
        if self.is_end_to_end and self.transcoder:
            raise ValueError(f"loss_fn {self.loss_fn} does not go with a transcoder")
        for name in (
            "reconstruction_coeff",
            "l1_penalty_coeff",
            "decorrelation_coeff",
            "aux_k_coeff",
            "multi_topk_coeff",
        ):
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "at least 0")
        self._require("decorrelation_chunk", self.decorrelation_chunk >= 2, "at least 2")
        if self.aux_k is not None:
            self._require(
                "aux_k", self.aux_k >= 1, "at least 1 (aux_k_coeff = 0 switches AuxK off)"
            )
        self._require("dead_after_tokens", self.dead_after_tokens >= 1, "at least 1")
        self._check_sparsity()

    def _check_identity(self) -> None:
        """Refuse codes without ReLU where latents are chosen, and an L0 to train them for."""
        if self.arch != "relu":
            raise ValueError(
                f"use_relu must be true for arch {self.arch!r}, got False: only with arch relu "
                "can codes be negative"
            )
        if self.target_l0 is not None:
            raise ValueError(
                "target_l0 must be left out without use_relu, where all latents are active, "
                f"got {self.target_l0:g}"
            )

    def _check_sparsity(self) -> None:
        self._require("sparsity_norm_p", 0 < self.sparsity_norm_p <= 1, "above 0 and at most 1")
        for name in _POSITIVE:
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "greater than 0")
        for name in ("sparsity_penalty_coeff", "pre_act_loss_coeff", "jumprelu_init_threshold"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "at least 0")
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
        decoder_norm = self.decoder_norm or self._default_decoder_norm
        if self.decoder_init_norm is not None and decoder_norm == "unit":
            raise ValueError(
                "decoder_init_norm is for decoder_norm = 'free' and must be left out with "
                f"'unit', got {self.decoder_init_norm:g}"
            )

    @property
    def is_end_to_end(self) -> bool:
        """Whether the loss is that of the model behind the reconstruction."""
        return self.loss_fn in ("ce", "kl")

    @property
    def has_signed_codes(self) -> bool:
        """Whether values of a code may be negative."""
        return not self.use_relu or self.activation == "abs_topk"

    @property
    def _default_l1(self) -> float:
        return DEFAULT_L1 * self._variance / self.target_width

    @property
    def error_of_the_mean(self) -> float:
        """Reconstruction error per token of the mean, of normalised data: d_in, or 1 with fvu."""
        return self._variance

    @property
    def _variance(self) -> float:
        """Reconstruction error of the mean, of data that are normalised."""
        return float(self.target_width) if self.loss_fn == "mse" else 1.0

    @property
    def _default_decoder_norm(self) -> str:
        return "free" if self.arch == "relu" else "unit"

    @property
    def is_complete(self) -> bool:
        """Whether the sizes are known, as a model needs them."""
        return self._has_widths and self.d_sae > 0

    @property
    def target_width(self) -> int:
        """Width of what the code models: d_out of a transcoder, otherwise d_in."""
        return self.d_out if self.transcoder else self.d_in

    @property
    def _has_widths(self) -> bool:
        return self.d_in > 0 and self.target_width > 0

    def with_d_in(self: Config, d_in: int, d_out: int = 0) -> Config:
        """The same for activations of width `d_in` and, with a transcoder, targets of `d_out`.

        Raises ValueError if made for another width.
        """
        if self.d_in not in (0, d_in):
            raise ValueError(f"d_in must be {d_in}, the width of the activations, got {self.d_in}")
        if d_out and self.d_out not in (0, d_out):
            raise ValueError(f"d_out must be {d_out}, the width of the targets, got {self.d_out}")
        return dataclasses.replace(self, d_in=d_in, d_out=d_out or self.d_out)


def without_other_size(values: dict[str, Any], stronger: dict[str, Any]) -> dict[str, Any]:
    """Drop d_sae or expansion_factor where the settings that win over them give the other one."""
    outweighed = [
        other
        for one, other in (("d_sae", "expansion_factor"), ("expansion_factor", "d_sae"))
        if stronger.get(one)
    ]
    return {name: value for name, value in values.items() if name not in outweighed}
