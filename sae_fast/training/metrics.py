"""The rows of a run's metrics, and metrics.jsonl, which has one row a step.

Names: step, tokens, epoch, loss, recon_loss, l1_loss, decorr_loss, aux_loss, terms that only some
architectures have (multi_topk_loss), fvu, l0, explained_variance (1 - fvu), activation_fraction,
dead_fraction, silent_fraction, learning_rate, grad_norm, tokens_per_second, time_per_step_ms,
reader_stall_fraction; with a probe probe_loss and probe_accuracy or probe_r2, with temporal
smoothness temporal_loss; at an evaluation objective, see `BestRule`, where there is a sparsity
penalty or a threshold of inference, and gram_mean, the mean squared cosine of two decoder rows,
heldout_fvu, heldout_ordinary_fvu where 1 % of the rows make it another one,
heldout_explained_variance and, by one variance of all numbers, heldout_explained_variance_overall,
heldout_l0, heldout_dead_fraction; with fp16 loss_scale and skipped_steps; with k_anneal_start k;
with skip_nonfinite skipped_rows; on a GPU, with batch_topk and matryoshka, full_batches, see
`ops.full_batches`; with target_l0 sparsity_coeff; with jumprelu sparsity_loss,
pre_act_loss, mean_threshold; with loss_fn ce heldout_ce and the model's own,
heldout_ce_model, with kl heldout_kl; where eval_metrics is due heldout_ce, heldout_ce_model,
heldout_ce_increase and heldout_ce_score, see `SplicedLosses`; with wandb_log_every, at that
interval, max_decoder_cosine, a latent's largest one, a mean over latents; with mesh
exchanged_bytes and communication_fraction, see `Ranks.take_traffic`. Where a model reads
documents epoch counts passes over these, by an estimate of their tokens where they are many.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sae_fast.json_files import JSONError, is_integer, is_number, parse_json, shown

Row = dict[str, Any]

STEP = "step"
# Names that rows have beside the terms of the loss and the metrics of the architecture.
ROW_NAMES = (
    *("step", "tokens", "epoch", "loss", "fvu", "l0", "explained_variance", "activation_fraction"),
    *("dead_fraction", "silent_fraction", "learning_rate", "grad_norm", "variance"),
    *("tokens_per_second", "time_per_step_ms", "reader_stall_fraction", "gram_mean"),
    *("probe_accuracy", "probe_r2", "loss_scale", "skipped_steps", "k", "skipped_rows"),
    "full_batches",
    *("sparsity_coeff", "max_decoder_cosine", "exchanged_bytes", "communication_fraction"),
)
_LONGEST_ROW = 1 << 20  # bytes


def fetch(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the values of 0-d tensors, in one transfer from the device."""
    if not metrics:
        return {}
    values = torch.stack([value.detach().to(torch.float64) for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


class MetricsLog:
    """The rows of a run: in the metrics.jsonl of its directory, or in memory where it has none.

    A row is flushed when it is written, so that a kill loses no row up to the last checkpoint.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._in_memory: list[Row] = []

    @property
    def rows(self) -> list[Row]:
        """All rows so far, in order."""
        if self.path is None:
            return list(self._in_memory)
        return [row for row, _ in self._lines()]

    def rewind(self, step: int) -> None:
        """Keep the rows up to `step`, which a run resumed there will not write again."""
        if self.path is None or not self.path.exists():
            return
        kept = 0
        for row, end in self._lines():
            if row["step"] > step:
                break
            kept = end
        os.truncate(self.path, kept)

    def write(self, row: Row) -> None:
        """Append one row; a number that is not finite becomes null, as JSON has no other word."""
        row = {name: _finite(value) for name, value in row.items()}
        if self.path is None:
            self._in_memory.append(row)
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # of which a full disk does not name the file
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _lines(self) -> Iterator[tuple[Row, int]]:
        """Yield each row of the file and the byte at which it ends.

        A row that cannot be read ends them where no other follows it, as a kill or a power cut in
        the middle of a row leaves it; else it is damage, and a ValueError names it.
        """
        if self.path is None or not self.path.exists():
            return
        if not self.path.is_file():  # a pipe would never end
            raise JSONError(f"{self.path}: is no regular file")
        end, damage = 0, None
        with self.path.open("rb") as file:
            number = 0
            while line := file.readline(_LONGEST_ROW):
                number, row = number + 1, None
                try:
                    row = _parse(line)
                    check_row(row)
                except JSONError as error:
                    damage = damage or f"{self.path}: line {number}: {error}"
                    if row is None:
                        continue
                if damage is not None:
                    raise JSONError(damage)
                end = file.tell()
                yield row, end

    def flush(self) -> None:
        """Flush the rows to the disk, so that no checkpoint outlives a row before it."""
        if self.path is not None and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def _parse(line: bytes) -> Row:
    """Return the object on a line; raise JSONError where it is none, or half of one."""
    row = parse_json(line)
    if not line.endswith(b"\n") or not isinstance(row, dict):
        raise JSONError(f"must be a row of metrics, got {shown(row)}")
    return row


def check_row(row: Row, needed: Sequence[str] = ("step",)) -> None:
    """Raise JSONError, naming the metric, unless a row has these and nothing but numbers."""
    if not row.keys() >= set(needed):
        raise JSONError(f"a row lacks {' or '.join(needed)}")
    for name, value in row.items():
        is_known = value is None or is_number(value)
        if not (is_integer(value) if name in ("step", "tokens") else is_known):
            raise JSONError(f"{name if len(name) < 60 else shown(name)} is {shown(value)}")


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
