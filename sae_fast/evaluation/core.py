"""Core metrics of a dictionary on rows, out of one pass: reconstruction, sparsity and firing.

definitions.py has the formula of each metric.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import repeat

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.architecture import Engine
from sae_fast.autoencoder.topk import BatchTopK
from sae_fast.evaluation.metrics import is_dead

logger = logging.getLogger(__name__)

EXTREME_SHARE = 0.001  # of the rows, those with the largest norms: `without_largest_norms`
# Edges of the density histogram: log10 of the share of rows on which a latent is active.
LOG_DENSITIES = tuple(number / 4 for number in range(-32, 1))
_ROUNDING = 1e-12  # of Σ|y|²: a float64 variance below this share of it is an error of rounding

Section = dict[str, float]
Watch = Callable[[Tensor, ops.SparseCode], object]  # of rows [n, D] and their code


@dataclass(frozen=True)
class CoreMetrics:
    """Metrics of a dictionary on rows.

    Attributes:
        sections: metrics by name, by the name of their group.
        latents: a number for each latent [F] float64, by name.
        density_histogram: number of latents in each interval of LOG_DENSITIES, ascending; latents
            that are never active are in none.
        rows: how many rows were measured.
    """

    sections: dict[str, Section]
    latents: dict[str, Tensor]
    density_histogram: list[int]
    rows: int


@torch.no_grad()
def core_metrics(
    sae: SparseAutoencoder,
    batches: Iterable[Tensor],
    targets: Iterable[Tensor] | None = None,
    *,
    documents: Iterable[Tensor] | None = None,
    dead_rate: float = 0.0,
    extreme_rows: int = 0,
    watch: Watch | None = None,
) -> CoreMetrics:
    """Return the core metrics of a dictionary, out of one pass over rows.

    Args:
        sae: the dictionary, in evaluation mode.
        batches: rows [n, D] as captured; the dictionary normalises them itself.
        targets: of each batch, [n, d_out], for a transcoder.
        documents: the number of each row's document, [n] for each batch, where documents follow one
            another; None: `consistent_activation_heuristic` is left out.
        dead_rate: the share of rows below which a latent counts as dead in `dead_fraction`.
        extreme_rows: rows with the largest norms that `without_largest_norms` leaves out.
        watch: called with the rows of each batch and their code, in the units of the rows.

    Raises ValueError without rows, and for rows that hold NaN or Inf.
    """
    measuring = CorePass(sae, dead_rate=dead_rate, extreme_rows=extreme_rows, watch=watch)
    sides = (repeat(None) if side is None else side for side in (targets, documents))
    with sae.kept_copies():
        for x, target, document in zip(batches, *sides, strict=False):
            measuring.add(x, target, document)
    return measuring.result()


class CorePass:
    """The pass over rows that `core_metrics` makes, for callers that have the rows in parts.

    Args:
        sae: see `core_metrics`.
        dead_rate: see `core_metrics`.
        extreme_rows: see `core_metrics`.
        watch: see `core_metrics`.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        *,
        dead_rate: float = 0.0,
        extreme_rows: int = 0,
        watch: Watch | None = None,
    ) -> None:
        self._sae = sae
        self._watch = watch
        self._dead_rate = dead_rate
        self._rows = _RowSums(sae.config.target_width, sae.device, extreme_rows)
        self._firing = _Firing(sae)
        self._has_documents = True

    @torch.no_grad()
    def add(
        self,
        x: Tensor,  # [n, D]
        target: Tensor | None = None,  # [n, d_out]
        document: Tensor | None = None,  # [n] integers
    ) -> None:
        """Add rows; raise ValueError where one holds NaN or Inf."""
        sae = self._sae
        x = x.to(sae.device)
        y = x if target is None else target.to(sae.device)
        if len(x) == 0:
            return
        if not bool(x.isfinite().all() & y.isfinite().all()):
            raise ValueError("rows must be finite, got NaN or Inf")
        code = sae.encode(x, units=ops.RAW)
        self._rows.add(y, sae.decode(code, x))
        self._firing.add(code, x, document)
        if self._watch is not None:
            self._watch(x, code)
        self._has_documents &= document is not None

    def result(self) -> CoreMetrics:
        """Return the metrics; raise ValueError where no row was added."""
        rows = self._rows.count
        if rows == 0:
            raise ValueError("there are no rows to measure the dictionary on")
        sections = self._rows.sections()
        if not math.isfinite(sections["reconstruction_quality"]["fvu"]):
            logger.warning(
                "fvu and explained_variance have no value: no variance in the rows measured, %d",
                rows,
            )
        sparsity, misc, latents = self._firing.metrics(rows, self._dead_rate)
        sections |= {"sparsity": sparsity, "misc_metrics": misc}
        if not self._has_documents:
            latents.pop("consistent_activation_heuristic")
        return CoreMetrics(sections, latents, _histogram(latents["feature_density"]), rows)


def _histogram(density: Tensor) -> list[int]:
    edges = torch.tensor(LOG_DENSITIES, dtype=torch.float64)
    logs = density[density > 0].log10()
    # A density of exactly 1 is in the last interval, and one below the first edge in the first.
    places = (torch.searchsorted(edges, logs, right=True) - 1).clamp(0, len(edges) - 2)
    return torch.bincount(places, minlength=len(edges) - 1).tolist()


# Columns of the numbers of a row that are summed.
_ERROR, _IN, _OUT, _PRODUCT, _NORM_IN, _NORM_OUT, _RATIO, _COSINE, _RELATIVE, _NONZERO = range(10)


class _RowSums:
    """Sums over rows of what reconstruction metrics are made of, also without the largest rows."""

    def __init__(self, width: int, device: torch.device, extreme_rows: int) -> None:
        self.count = 0
        self._sums = torch.zeros(_NONZERO + 1, dtype=torch.float64, device=device)
        self._total = torch.zeros(width, dtype=torch.float64, device=device)
        self._legacy = 0.0  # Σ of the rows' ratios
        self._batch_averaged = 0.0
        self._batched_rows = 0
        self._largest = _LargestRows(extreme_rows, width, device)

    def add(
        self,
        y: Tensor,  # [n, D]
        y_hat: Tensor,  # [n, D]
    ) -> None:
        wide, wide_hat = y.double(), y_hat.double()
        numbers = _row_numbers(wide, wide_hat)
        self.count += len(y)
        self._sums += numbers.sum(0)
        self._total += wide.sum(0)
        self._largest.add(numbers, wide)
        apart = (wide - wide.mean(0)).square().sum(1)
        variance = float(_without_rounding(apart.sum(), numbers[:, _IN].sum()))
        if variance > 0:  # not of a single row, which is its own mean
            self._batch_averaged += len(y) * (1 - float(numbers[:, _ERROR].sum()) / variance)
            legacy = 1 - numbers[:, _ERROR] / apart
            self._legacy += float(torch.where(apart > 0, legacy, 0.0).sum())
            self._batched_rows += len(y)

    def sections(self) -> dict[str, Section]:
        whole = _reconstruction(self._sums, self._total, self.count)
        batched = max(self._batched_rows, 1)
        quality, shrinkage = whole
        quality["explained_variance_batch_averaged"] = self._batch_averaged / batched
        quality["explained_variance_legacy"] = self._legacy / batched
        found: dict[str, Section] = {"reconstruction_quality": quality, "shrinkage": shrinkage}
        left_out = self._largest.count
        if 0 < left_out < self.count:
            sums = self._sums - self._largest.numbers.sum(0)
            total = self._total - self._largest.rows.sum(0)
            ordinary, _ = _reconstruction(sums, total, self.count - left_out)
            found["without_largest_norms"] = {"rows_left_out": left_out, **ordinary}
        found["token_stats"] = {
            "total_tokens_eval_sparsity_variance": self.count,
            "rows_of_norm_0": self.count - round(float(self._sums[_NONZERO])),
        }
        return found


def _row_numbers(
    y: Tensor,  # [n, D] float64
    y_hat: Tensor,  # [n, D] float64
) -> Tensor:
    """Return the numbers of each row that are summed, [n, 10] float64."""
    error = (y_hat - y).square().sum(1)
    squared_in, squared_out = y.square().sum(1), y_hat.square().sum(1)
    product = (y * y_hat).sum(1)
    norm_in, norm_out = squared_in.sqrt(), squared_out.sqrt()
    nonzero = norm_in > 0
    both = norm_in * norm_out
    return torch.stack(
        [
            *(error, squared_in, squared_out, product, norm_in, norm_out),
            torch.where(nonzero, norm_out / norm_in, 0.0),
            torch.where(both > 0, product / both, 0.0),
            torch.where(nonzero, error.sqrt() / norm_in, 0.0),
            nonzero.double(),
        ],
        dim=1,
    )


def _reconstruction(
    sums: Tensor,  # [10] float64
    total: Tensor,  # [D] float64, Σ of the rows
    rows: int,
) -> tuple[Section, Section]:
    """Return the metrics of reconstruction quality and of shrinkage that sums over rows give."""
    numbers = rows * len(total)
    variance = _without_rounding(sums[_IN] - total.square().sum() / rows, sums[_IN])
    apart = _without_rounding(sums[_IN] - total.sum().square() / numbers, sums[_IN])
    overall = apart / max(numbers - 1, 1)
    nonzero = sums[_NONZERO].clamp_min(1)
    fvu = sums[_ERROR] / variance
    quality = {
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "explained_variance_overall": 1 - sums[_ERROR] / numbers / overall,
        "mse": sums[_ERROR] / rows,
        "mse_per_number": sums[_ERROR] / numbers,
        "relative_error": (sums[_ERROR] / sums[_IN]).sqrt(),
        "relative_error_mean": sums[_RELATIVE] / nonzero,
        "cossim": sums[_COSINE] / nonzero,
    }
    shrinkage = {
        "l2_norm_in": sums[_NORM_IN] / rows,
        "l2_norm_out": sums[_NORM_OUT] / rows,
        "l2_ratio": sums[_RATIO] / nonzero,
        "relative_reconstruction_bias": sums[_OUT] / sums[_PRODUCT],
    }
    first, second = (
        {name: float(value) for name, value in section.items()} for section in (quality, shrinkage)
    )
    return first, second


def _without_rounding(
    squares: Tensor,  # [] float64, of distances from a mean
    total: Tensor,  # [] float64, Σ|y|²
) -> Tensor:
    """Return a sum of squared distances; 0 where it is no more than an error of rounding."""
    return torch.where(squares > _ROUNDING * total, squares, 0.0)


class _LargestRows:
    """The rows with the largest norms so far, with their numbers."""

    def __init__(self, limit: int, width: int, device: torch.device) -> None:
        self._limit = limit
        self.numbers = torch.zeros(0, _NONZERO + 1, dtype=torch.float64, device=device)
        self.rows = torch.zeros(0, width, dtype=torch.float64, device=device)

    @property
    def count(self) -> int:
        return len(self.rows)

    def add(
        self,
        numbers: Tensor,  # [n, 10]
        rows: Tensor,  # [n, D] float64
    ) -> None:
        if not self._limit:
            return
        if len(rows) > self._limit:
            chosen = numbers[:, _IN].topk(self._limit).indices
            numbers, rows = numbers[chosen], rows[chosen]
        self.numbers, self.rows = torch.cat([self.numbers, numbers]), torch.cat([self.rows, rows])
        if self.count > self._limit:
            chosen = self.numbers[:, _IN].topk(self._limit).indices
            self.numbers, self.rows = self.numbers[chosen], self.rows[chosen]


@dataclass
class _Firing:
    """On how many rows each latent is active, and how strongly."""

    sae: SparseAutoencoder
    active: float = 0.0
    magnitude: float = 0.0
    in_training: float = 0.0  # active by the rule of training
    silent_shares: float = 0.0
    batches: int = 0
    last_document: int | None = None
    counts: Tensor = field(init=False)  # [F] int64, rows on which a latent is active
    sums: Tensor = field(init=False)  # [F] float64, of |f|
    largest: Tensor = field(init=False)  # [F] float64, of |f|
    spans: Tensor = field(init=False)  # [F] int64, documents in which a latent is active
    in_last: Tensor = field(init=False)  # [F] bool, active in the last document so far

    def __post_init__(self) -> None:
        d_sae, device = self.sae.config.d_sae, self.sae.device
        self.counts, self.spans = torch.zeros(2, d_sae, dtype=torch.int64, device=device)
        self.sums, self.largest = torch.zeros(2, d_sae, dtype=torch.float64, device=device)
        self.in_last = torch.zeros(d_sae, dtype=torch.bool, device=device)

    def add(
        self,
        code: ops.SparseCode,  # of n rows, in their units
        x: Tensor,  # [n, D]
        document: Tensor | None,  # [n]
    ) -> None:
        fires, d_sae = code.fires(), len(self.counts)
        latents, values = code.indices[fires].long(), code.values[fires].abs().double()
        in_batch = torch.bincount(latents, minlength=d_sae)
        self.counts += in_batch
        self.sums.index_add_(0, latents, values)
        self.largest.scatter_reduce_(0, latents, values, "amax")
        self.active += len(latents)
        self.magnitude += float(values.sum())
        self.silent_shares += float((in_batch == 0).double().mean())
        self.batches += 1
        self.in_training += self._active_in_training(x, len(latents))
        if document is not None:
            rows = torch.arange(code.n_rows, device=latents.device)
            of_entries = rows[:, None].expand_as(fires) if fires.ndim == 2 else code.entry_rows()
            self._add_documents(latents, of_entries[fires], document.to(latents.device).long())

    def _active_in_training(self, x: Tensor, found: int) -> float:
        """Return how many latents the training's own rule makes active in a batch."""
        architecture = self.sae.architecture
        if not isinstance(architecture, BatchTopK):
            return found
        rows = self.sae.normalize(x.to(self.sae.W_enc.dtype))
        return float(architecture.encode(self.sae.weights, rows, Engine()).n_active())

    def _add_documents(
        self,
        latents: Tensor,  # [entries] int64
        rows: Tensor,  # [entries] int64
        document: Tensor,  # [n] int64
    ) -> None:
        """Count the documents in which latents are active; one may have begun a batch before."""
        d_sae = len(self.counts)
        begins = torch.ones_like(document, dtype=torch.bool)
        begins[1:] = document[1:] != document[:-1]
        goes_on = self.last_document is not None and int(document[0]) == self.last_document
        number = begins.cumsum(0) - 1  # of the document within the batch
        pairs = torch.unique(number[rows] * d_sae + latents)
        places, which = pairs // d_sae, pairs % d_sae
        self.spans += torch.bincount(which, minlength=d_sae)
        before = self.in_last.clone() if goes_on else torch.zeros_like(self.in_last)
        first = torch.zeros_like(before)
        first[which[places == 0]] = True
        self.spans -= (first & before).long()
        last = torch.zeros_like(before)
        last[which[places == number[-1]]] = True
        self.in_last = last | before if int(number[-1]) == 0 else last
        self.last_document = int(document[-1])

    def metrics(self, rows: int, dead_rate: float) -> tuple[Section, Section, dict[str, Tensor]]:
        """Return the metrics of sparsity, the other ones of firing, and the numbers by latent."""
        density = self.counts.double() / rows
        whole = density.sum().clamp_min(torch.finfo(torch.float64).tiny)
        over = {"1": density > 0.01, "10": density > 0.1}
        sparsity = {
            "l0": self.active / rows,
            "l1": self.magnitude / rows,
            "l0_training_rule": self.in_training / rows,
        }
        misc = {
            **{f"freq_over_{n}_percent": float(o.double().mean()) for n, o in over.items()},
            **{
                f"normalized_freq_over_{n}_percent": float(density[o].sum() / whole)
                for n, o in over.items()
            },
            "frac_alive": float((self.counts > 0).double().mean()),
            "never_active_fraction": float((self.counts == 0).double().mean()),
            "dead_fraction": float(is_dead(self.counts, rows, dead_rate).double().mean()),
            "dead_rate": dead_rate,
            "silent_in_batch_fraction": self.silent_shares / max(self.batches, 1),
        }
        active = self.counts.clamp_min(1)
        latents = {
            "feature_density": density,
            "mean_activation": self.sums / active,
            "max_activation": self.largest,
            "consistent_activation_heuristic": self.counts.double() / self.spans.clamp_min(1),
        }
        return sparsity, misc, {name: numbers.cpu() for name, numbers in latents.items()}
