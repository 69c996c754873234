"""The type in which a capture stores activations, chosen from a sample before anything is written.

float16 keeps more digits than bfloat16, but ends at 65,504 and rounds numbers below 6e-8 to zero.
Some models have a few activations beyond that, which a capture of hours may meet in its last
document.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae_fast.activations.capture.directory import CaptureDirectory
from sae_fast.activations.capture.harvest import Harvester
from sae_fast.activations.capture.plan import AUTO, Capture

logger = logging.getLogger(__name__)

SAMPLED_PLACES = 8  # of the order of the documents, the first and the last among them
SAMPLED_OF_STREAM = 256  # documents, which are read anyway
SAMPLED_SEQUENCES = 4  # at each of them
MARGIN = 4  # by which rows that were not sampled may be louder, or softer, than those that were
FLOAT16 = torch.finfo(torch.float16)


def with_storage_type(capture: Capture, directory: CaptureDirectory) -> Capture:
    """Return the capture with a storage type for auto: the directory's, or by a sample."""
    if capture.config.dtype != AUTO:
        return capture
    chosen: Any = directory.stored_type()
    if chosen is None:
        reason = _against_float16(capture)
        chosen = "float16" if reason is None else "bfloat16"
        if reason is not None:
            logger.warning("storing bfloat16: %s (--dtype float16 or float32 overrides it)", reason)
    return replace(capture, config=replace(capture.config, dtype=chosen))


def _against_float16(capture: Capture) -> str | None:
    """Return why float16 may not hold the activations; None: a sample fits well."""
    for activations in _sample(capture):
        for name, rows in activations.items():
            if rows.dtype == torch.float16:  # stored as they are
                continue
            largest = rows.float().abs().amax(dim=1)
            largest = largest[torch.isfinite(largest) & (largest > 0)]
            if not len(largest):
                continue
            if (loudest := float(largest.max())) > FLOAT16.max / MARGIN:
                return f"{name} reaches {loudest:,.0f} in a sample, and float16 ends at 65,504"
            if (softest := float(largest.min())) < FLOAT16.tiny / MARGIN:
                return (
                    f"rows of {name} reach only {softest:.2g} in a sample, where float16 loses "
                    "precision"
                )
    return None


def _sample(capture: Capture) -> Iterator[dict[str, Tensor]]:
    """Yield activations [n, D] of some sequences, by name of the hook point."""
    batches = capture.batches
    count = batches.documents.count
    last = (SAMPLED_OF_STREAM if count is None else count) - 1
    for place in sorted({n * last // (SAMPLED_PLACES - 1) for n in range(SAMPLED_PLACES)}):
        part = batches.sample(place, SAMPLED_SEQUENCES)
        with closing(Harvester(capture.hooked, part).harvest()) as harvests:
            harvest = next(harvests, None)
        if harvest is not None:
            yield harvest.activations
