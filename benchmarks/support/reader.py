"""The rate of reading shards from the page cache beside the rate of training, in rows a second."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines.sae_fast_trainer import SaeFastTrainer
from benchmarks.support.groups import say
from benchmarks.support.problem import Size, learning_rate, make_activations, make_weights
from benchmarks.support.tables import markdown_table, percent
from sae_fast.activations import ActivationStream, ShardWriter

SHARDS = 4
READ_BATCHES = 100
TRAINED_STEPS = 30


def measure_reader(size: Size) -> dict[str, Any]:
    """Measure the stream alone and a training fed by it; return both rates and the share waited."""
    say(f"reader at {size.describe()}")
    with tempfile.TemporaryDirectory() as folder:
        activations = make_activations(size, 16)
        for number, part in enumerate(torch.tensor_split(activations, SHARDS)):
            with ShardWriter(Path(folder) / f"shard_{number:02d}.h5", dtype="float16") as writer:
                writer.append(part)
        del activations
        served = read_alone(folder, size)
        trained, stall = read_and_train(folder, size)
    return {
        "size": size.describe(),
        "rows_per_second_reader": served,
        "rows_per_second_training": trained,
        "stall_share": stall,
    }


def read_alone(folder: str, size: Size) -> float:
    """Return the rows a second of the stream alone; the files are in the page cache."""
    with ActivationStream(folder, batch_size=size.n_tokens, seed=0) as stream:
        for _ in range(READ_BATCHES // 4):  # fills the first windows and the prefetched batches
            stream.next_batch()
        start = time.perf_counter()
        for _ in range(READ_BATCHES):
            stream.next_batch()
        return READ_BATCHES * size.n_tokens / (time.perf_counter() - start)


def read_and_train(folder: str, size: Size) -> tuple[float, float]:
    """Return the rows a second of training from the stream, and the share of time spent waiting."""
    trainer = SaeFastTrainer(make_weights(size), size.k, learning_rate(size))
    with ActivationStream(folder, batch_size=size.n_tokens, seed=0) as stream:
        for _ in range(3):
            trainer.step(stream.next_batch())
        stalled, start = stream.stall_seconds, time.perf_counter()
        for _ in range(TRAINED_STEPS):
            trainer.step(stream.next_batch())
        seconds = time.perf_counter() - start
        return TRAINED_STEPS * size.n_tokens / seconds, (stream.stall_seconds - stalled) / seconds


def reader_section(reader: dict[str, Any]) -> list[str]:
    """Return the heading, explanation and table of the reader."""
    served, trained = reader["rows_per_second_reader"], reader["rows_per_second_training"]
    headings = ["size", "reader rows/s", "training rows/s", "reader / training", "stall"]
    row = [
        reader["size"],
        f"{served:,.0f}",
        f"{trained:,.0f}",
        f"{served / trained:.1f}×",
        percent(reader["stall_share"]),
    ]
    return [
        "## The reader",
        "Shuffled batches from float16 shards in the page cache, widened to float32: the stream "
        "alone, the default training step fed by it, and the share of that step spent waiting.",
        markdown_table(headings, [row]),
    ]
