"""Errors of runs that cannot continue, in one line; the checkpoints written before are intact."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from sae_fast.training.memory_plan import MemoryPlan
from sae_fast.training.step import GRAD_NORM, LOSS, Reading

RECON_LOSS = "recon_loss"


class TrainingError(ValueError):
    """A training that cannot continue; the checkpoints written before are intact."""


def divergence(
    reading: Reading,
    step: int,
    shards: list[Path],
    bad_rows: int | None,
    newest_checkpoint: Path | None,
    term_names: Sequence[str] = (),
) -> TrainingError:
    """Return the error of a step whose loss or gradient norm is not finite.

    No parameter has changed since before that step.

    Args:
        reading: the metrics that were read from the device.
        step: the bad step, counted from 1.
        shards: what it may have read.
        bad_rows: how many rows of its batches are not finite, None where it is not known any more.
        newest_checkpoint: the last one written.
        term_names: the terms of the loss, among the metrics.
    """
    metrics = reading.metrics
    what, value = "loss", metrics[LOSS]
    if math.isfinite(value):
        what, value = "gradient's norm", metrics[GRAD_NORM]
    origin = f", reading {', '.join(str(shard) for shard in shards)}" if shards else ""
    terms = ", ".join(f"{n} {v:g}" for n, v in metrics.items() if n not in (LOSS, GRAD_NORM))
    found = f"step {step}{origin}: the {what} is {value} ({terms})"
    bad_terms = [name for name in term_names if not math.isfinite(metrics[name])]
    cause = _cause(reading.variance, bad_rows, bad_terms)
    return TrainingError(f"{found}; {cause}{intact(newest_checkpoint)}")


def out_of_memory(
    step: int, error: BaseException, plan: MemoryPlan, newest_checkpoint: Path | None
) -> TrainingError:
    """Return the error of a run that has filled the memory."""
    told = [str(link) for link in _chain(error) if isinstance(link, torch.OutOfMemoryError)]
    reason = (told or [str(error)])[0].partition("\n")[0].partition(". ")[0].rstrip(".")
    told_by = f" ({reason})" if reason else ""
    return TrainingError(
        f"step {step}: out of memory{told_by}; {plan.summary()}; lower batch_size, "
        f"expansion_factor or d_sae, or pool_rows where the host's memory is full"
        f"{intact(newest_checkpoint)}"
    )


def is_out_of_memory(error: BaseException, device: torch.device) -> bool:
    """Return whether an error comes from memory that could not be allocated.

    Where an op of ours asks torch for memory, the error that comes back is of no type and says only
    which call failed; then the allocator's count of refusals decides.
    """
    for link in _chain(error):
        if isinstance(link, torch.OutOfMemoryError | MemoryError):
            return True
        text = str(link)
        if isinstance(link, RuntimeError) and (
            "out of memory" in text or "can't allocate memory" in text
        ):
            return True
    if device.type != "cuda" or "API call failed" not in str(error):
        return False
    return int(torch.cuda.memory_stats(device).get("num_ooms", 0)) > 0


def _cause(variance: float, bad_rows: int | None, bad_terms: Sequence[str]) -> str:
    if bad_rows or (bad_rows is None and math.isnan(variance)):
        return "rows hold NaN or Inf" if bad_rows is None else f"{bad_rows} rows hold NaN or Inf"
    if math.isinf(variance):
        return "rows hold numbers too large to square"
    if bad_terms and RECON_LOSS not in bad_terms:
        return f"of the terms of the loss only {', '.join(bad_terms)} is not finite"
    return "a lower learning rate may help"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, then the one that was being handled when it was raised, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def intact(checkpoint: Path | None) -> str:
    """Return the end of an error's line, which names the checkpoint written last, if any."""
    return f"; {checkpoint} is intact" if checkpoint else ""
