"""`RunHealth`: warnings in plain words about a training that collapses or does not learn.

They follow from the logged metrics alone. An error that rises is logged once it has lasted for a
tenth of the run, and from half of the run on a collapse that three successive rows show, each once;
the summary has all warnings that hold at the end. Each warning names the flags that help.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence

from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.metrics import Row
from sae_fast.training.rising_error import DENSER, RISEN, RisingError
from sae_fast.training.schedule import Schedules

logger = logging.getLogger(__name__)

_FEWEST_STEPS = 20  # a shorter run says nothing about its settings
_ROWS_IN_TURN = 3
_NO_FIT = 0.95  # FVU from which a reconstruction explains next to nothing
_OFF = 1.5  # FVU from which more of the same steps will not help
_FAR_L0 = 1.5  # factor to either side of the L0 that was asked for
_LARGE_SHARE = 0.1  # of latents that are silent
_FIRINGS = 20  # of an average latent, without which silence is chance
_NO_FALL = 0.98  # of the first losses that the last ones must be below
_FULL_BATCHES = 0.05  # share of steps in which a selection may compute every score
_OVERFLOWS = 0.05  # share of skipped steps that is not a search for the loss scale
_AFTER_WARM_UP = 8  # the first and the last eighth of the rows are compared


def silent_window(tokens: int, total_tokens: int) -> int:
    """Return after how many silent tokens a latent counts in silent_fraction.

    It is a tenth of the run, or half of the `tokens` trained on where that is less: so the share
    means something at the start too.
    """
    return max(1, min(tokens // 2, total_tokens // 10))


class RunHealth:
    """Watch the metrics of one run.

    Args:
        sae: the model.
        train: its training.
        schedules: of the run; while they raise penalties or lower k nothing is judged.
    """

    def __init__(self, sae: SAEConfig, train: TrainConfig, schedules: Schedules) -> None:
        self._sae, self._train, self._schedules = sae, train, schedules
        self._total_tokens = train.tokens_per_step * schedules.total_steps
        self._recent: deque[Row] = deque(maxlen=_ROWS_IN_TURN)
        self._error = RisingError(schedules.total_steps)
        self._told: set[str] = set()

    def watch(self, row: Row) -> None:
        """Log a collapse that the last rows show, each kind once; an undefined FVU at once."""
        self._tell(_undefined(row), row["step"])
        if "l0" not in row:
            return
        self._tell(self._divergence(row, self._error), row["step"])
        self._recent.append(row)
        if len(self._recent) < _ROWS_IN_TURN or not self._is_judged(self._recent[0]["step"]):
            return
        collapses = [self._collapse(recent) for recent in self._recent]
        lasting = [kind for kind in collapses[-1] if all(kind in each for each in collapses)]
        self._tell({kind: collapses[-1][kind] for kind in lasting}, row["step"])

    def conclude(self, rows: Sequence[Row]) -> list[str]:
        """Return the warnings that hold at the end of the rows of a run; log those not yet told."""
        last: Row = {}
        for row in rows:
            last |= row
        if not last:
            return []
        warnings = _undefined(last)
        last = {name: value for name, value in last.items() if value is not None}
        if self._is_judged(last["step"]):
            warnings |= self._collapse(last) | self._misses(last) | self._stagnation(rows)
            error = RisingError(self._schedules.total_steps)
            diverges: dict[str, str] = {}
            for row in rows:
                diverges = self._divergence(row, error) if "l0" in row else diverges
            for kind, text in (diverges or self._overfit(rows)).items():
                warnings.setdefault(kind, text)
        self._tell(warnings, last["step"])
        return list(warnings.values())

    def _tell(self, warnings: dict[str, str], step: int) -> None:
        for kind, text in warnings.items():
            if kind not in self._told:
                self._told.add(kind)
                logger.warning("step %d: %s", step, text)

    def _is_judged(self, step: int) -> bool:
        half = self._schedules.total_steps // 2
        return step >= max(_FEWEST_STEPS, half) and step >= self._settled_step

    @property
    def _settled_step(self) -> int:
        """The step from which the loss is made of the same terms with the same weights."""
        schedules = self._schedules
        settled = schedules.reconstruction_steps
        if schedules.k is not None:
            settled = max(settled, schedules.k.fall_steps)
        if self._sae.k is None or self._sae.l1_penalty_coeff:
            settled += schedules.sparsity.warmup_steps
        return settled

    def _divergence(self, row: Row, error: RisingError) -> dict[str, str]:
        """Return warnings of an error that has risen for long, or is above the one of the mean.

        Args:
            row: a row with the metrics of a step, the next one of the run.
            error: has taken in those before.
        """
        step, fvu = row["step"], row.get("fvu")
        warm = max(self._settled_step, self._schedules.rate.warmup_steps)
        if fvu is None or not math.isfinite(fvu) or step < warm or not self._trains_reconstruction:
            return {}
        mean, warnings = error.add(step, fvu, row["l0"]), {}
        if step < _FEWEST_STEPS:
            return {}
        if error.lowest is not None:
            low, at = error.lowest
            warnings["rising"] = (
                f"the reconstruction gets worse: FVU is {mean:.3g}, and was {low:.3g} at step "
                f"{at:,}; lower --lr (now {self._schedules.rate.peak:.3g})"
            )
        if error.is_above_mean:
            warnings["fvu"] = (
                f"FVU is {mean:.3g}, and has been above 1 for a tenth of the run: the mean of the "
                f"rows would be a better reconstruction; {self._sparser()}{self._more_steps(mean)}"
            )
        return warnings

    def _overfit(self, rows: Sequence[Row]) -> dict[str, str]:
        """Return a warning where held-out rows are explained worse than at an earlier step."""
        names = ("heldout_fvu", "heldout_l0")
        error = [row for row in rows if all(row.get(name) is not None for name in names)]
        if not error or not self._trains_reconstruction:
            return {}
        fvu, l0 = (error[-1][name] for name in names)
        low, step = min(
            (row["heldout_fvu"], row["step"])
            for row in error
            if row["heldout_l0"] <= DENSER * l0 and row["step"] >= self._settled_step
        )
        if fvu <= RISEN * low:
            return {}
        return {
            "overfit": (
                f"held-out FVU is {fvu:.3g}, and was {low:.3g} at step {step:,}, while the one of "
                "training has not risen: the model learns its rows by heart; give more rows, or "
                "lower --max-steps or --max-epochs"
            )
        }

    def _collapse(self, row: Row) -> dict[str, str]:
        """Return warnings, by kind, of one row that shows a model which has stopped encoding."""
        warnings: dict[str, str] = {}
        sae = self._sae
        l0, fvu = row.get("l0"), row.get("fvu")
        if l0 is not None and l0 < min(1.0, 0.5 * (self._asked_l0 or 2.0)):
            warnings["l0"] = (
                f"L0 is {l0:.2g}: fewer than one latent is active for a token; {self._sparser()}"
            )
        if fvu is not None and fvu > _NO_FIT and self._trains_reconstruction:
            says = "no more than" if fvu >= 1 else "hardly more than"
            warnings["fvu"] = (
                f"FVU is {fvu:.3g}: the reconstruction explains {says} the mean of the rows does; "
                f"{self._sparser()}{self._more_steps(fvu)}"
            )
        silent = row.get("silent_fraction")
        window = silent_window(row["tokens"], self._total_tokens)
        is_telling = window * (l0 or 0.0) >= _FIRINGS * sae.d_sae and (
            sae.slots_mode != "separate_value"
        )
        if silent is not None and silent > _LARGE_SHARE and is_telling:
            warnings["silent"] = (
                f"{round(silent * sae.d_sae):,} of {sae.d_sae:,} latents have fired for none of "
                f"the last {window:,} tokens (they count as dead after "
                f"{sae.kept_dead_after_tokens:,}); {self._reviving(row['tokens'])}"
            )
        skipped = row.get("skipped_steps", 0)
        if skipped > _OVERFLOWS * row["step"]:
            warnings["skipped"] = (
                f"{skipped:,.0f} of {row['step']:,} steps were skipped because gradients "
                "overflowed in fp16, and trained nothing; use --amp bf16 or --amp off"
            )
        full = row.get("full_batches", 0)
        if full > _FULL_BATCHES * row["step"]:
            warnings["full"] = (
                f"{full:,.0f} of {row['step']:,} steps had more candidates than room for them, and "
                f"scored every latent for every row: exact, and many times slower; --arch topk has "
                "no such limit"
            )
        return warnings

    def _misses(self, last: Row) -> dict[str, str]:
        """Return warnings of an L0 far from its target and of held-out rows not explained."""
        warnings: dict[str, str] = {}
        l0, asked = last.get("heldout_l0", last.get("l0")), self._asked_l0
        # Of more than half of the latents ReLU leaves fewer than were selected.
        is_half = self._sae.k is not None and self._sae.k > self._sae.d_sae / 2
        lowest = 0 if is_half else (asked or 0) / _FAR_L0
        if l0 is not None and asked is not None and not lowest <= l0 <= asked * _FAR_L0:
            flag = "--k" if self._sae.k is not None else "--target-l0"
            warnings["target"] = (
                f"L0 is {l0:.3g}, and {flag} asks for {asked:g}; {self._towards(l0 > asked)}"
            )
        heldout, fvu = last.get("heldout_fvu"), last.get("fvu")
        ordinary = last.get("heldout_ordinary_fvu")
        if ordinary is not None and heldout is not None and ordinary > heldout:
            warnings["outliers"] = (
                f"held-out FVU is {heldout:.3g}, and {ordinary:.3g} without the 1 % of rows that "
                "have the largest norms: a few rows decide mean, scale, loss and figures; leave "
                "them out of the shards (first tokens: capture with --exclude-special-tokens)"
            )
        fits = fvu is not None and fvu <= _NO_FIT
        if heldout is not None and heldout > _NO_FIT and fits and self._trains_reconstruction:
            warnings["heldout"] = (
                f"held-out FVU is {heldout:.3g}, in training {fvu:.3g}: the held-out rows may be "
                "of another model or layer, or there are too few rows to train on (--heldout "
                "names others, --max-epochs limits the passes)"
            )
        return warnings

    def _stagnation(self, rows: Sequence[Row]) -> dict[str, str]:
        """Return a warning where the loss has not fallen since its terms had their full weights.

        There is none where they had them for less than half of the run: a loss rises while k falls,
        and for some time after.
        """
        settles_late = self._settled_step > self._schedules.total_steps // 2
        if self._train.start_from is not None or self._is_led or settles_late:
            return {}
        ends = self._first_and_last(rows, "loss")
        if ends is None or _has_fallen(*ends):
            return {}
        # Of batches that differ in variance the loss follows the batch, and FVU does not.
        fvu = self._first_and_last(rows, "fvu")
        if fvu is not None and _has_fallen(*fvu):
            return {}
        first, last = ends
        rate = self._schedules.rate.peak
        remedy = "lower" if last > first / _NO_FALL else "raise"
        text = (
            f"the loss has not fallen: {first:.4g} at first, {last:.4g} at the end; "
            f"{remedy} --lr (now {rate:.3g}) or raise --max-steps "
            f"(now {self._schedules.total_steps:,})"
        )
        return {"loss": text}

    def _first_and_last(self, rows: Sequence[Row], name: str) -> tuple[float, float] | None:
        """Return the means of a metric over the first and over the last of the judged rows."""
        values = [
            row[name]
            for row in rows
            if row.get(name) is not None and row["step"] >= self._settled_step
        ]
        if len(values) < 2:
            return None
        count = max(1, len(values) // _AFTER_WARM_UP)
        return sum(values[:count]) / count, sum(values[-count:]) / count

    @property
    def _trains_reconstruction(self) -> bool:
        sae = self._sae
        is_trained = sae.reconstruction_coeff > 0 and sae.slots_mode != "separate_value"
        return is_trained and not sae.is_end_to_end

    @property
    def _is_led(self) -> bool:
        """Whether a weight of the loss moves all the time, towards target_l0."""
        return self._sae.target_l0 is not None and self._sae.arch != "jumprelu"

    @property
    def _asked_l0(self) -> float | None:
        """The L0 that the settings ask for; None where they leave it to a penalty."""
        sae = self._sae
        if sae.k is not None:
            return None if sae.l1_penalty_coeff else float(sae.k)
        return sae.target_l0

    def _more_steps(self, fvu: float) -> str:
        """Return the advice of a longer run, where a model has not yet left its start."""
        if fvu > _OFF:
            return ""
        return f", or raise --max-steps (now {self._schedules.total_steps:,})"

    def _sparser(self) -> str:
        """Return which flags make codes less sparse."""
        sae, rate = self._sae, self._lower_rate()
        if sae.arch == "jumprelu":
            return f"lower --sparsity-penalty-coeff (now {sae.sparsity_penalty_coeff:g}), or {rate}"
        if sae.l1_penalty_coeff:
            lower = f"lower --l1-penalty-coeff (now {sae.l1_penalty_coeff:g})"
            if sae.k is None and sae.target_l0 is None:
                lower += " or name the wanted L0 with --target-l0"
            return f"{lower}, or {rate}"
        return rate

    def _lower_rate(self) -> str:
        return f"lower --lr (now {self._schedules.rate.peak:.3g})"

    def _reviving(self, tokens: int) -> str:
        """Return which flags make silent latents fire."""
        sae = self._sae
        if sae.takes("pre_act_loss_coeff"):
            raised = f"raise --pre-act-loss-coeff (now {sae.pre_act_loss_coeff:g})"
            return f"{raised}, or {self._lower_rate()}"
        if sae.aux_k_coeff and sae.kept_dead_after_tokens > tokens // 2:
            return (
                f"--dead-after-tokens below the {tokens:,} tokens trained lets AuxK revive them, "
                f"or {self._sparser()}"
            )
        return self._sparser()

    def _towards(self, is_above: bool) -> str:
        """Return which flags bring the L0 nearer to its target."""
        sae, change = self._sae, "raise" if is_above else "lower"
        steps = f"raise --max-steps (now {self._schedules.total_steps:,})"
        if sae.arch == "jumprelu":
            # Thresholds move by steps of the rate, whatever the penalty's weight.
            rate = f"--lr (now {self._schedules.rate.peak:.3g})"
            return f"raise {rate}, which thresholds move with, or {steps}"
        if sae.l1_penalty_coeff:
            return (
                f"{steps} or --target-l0-rate (now {sae.target_l0_rate:g}), or {change} "
                f"--l1-penalty-coeff (now {sae.l1_penalty_coeff:g})"
            )
        return f"{steps}, or {self._sparser()}"


def _has_fallen(first: float, last: float) -> bool:
    return last <= first - (1 - _NO_FALL) * abs(first)


def _undefined(row: Row) -> dict[str, str]:
    """Return a warning for each FVU that is not a number: its rows have no variance."""
    warnings = {}
    for name, where in (("fvu", "of the last batch"), ("heldout_fvu", "held out")):
        value = row.get(name, 0.0)
        if value is None or not math.isfinite(value):
            warnings[name] = (
                f"{name} is not defined: the rows {where} are all equal, or one row only, so that "
                "there is no variance to explain; look at the shards (--shard-dir, --heldout) and "
                "at --batch-size"
            )
    return warnings
