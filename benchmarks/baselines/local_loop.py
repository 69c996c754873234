"""The plain loop that trains a local contestant in a process of its own, to measure its memory."""

from __future__ import annotations

from benchmarks.contestants import OURS_ON_CUDA, make_local
from benchmarks.worker import Job, Turns


def train(job: Job, turns: Turns) -> None:
    """Step on the job's batches; the first loss is not needed here."""
    if job.contestant in OURS_ON_CUDA:
        from benchmarks.baselines import sae_fast_trainer  # noqa: F401 (import before counting)
    turns.before_model()
    trainer = make_local(job.contestant, job.weights, job.size.k, job.learning_rate)
    turns.ready(float("nan"))
    for x in turns.batches(job):
        trainer.step(x)
