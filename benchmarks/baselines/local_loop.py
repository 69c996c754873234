"""The loop that trains a local implementation in a process of its own."""

from __future__ import annotations

from benchmarks.implementations import (
    ALL_DEAD,
    OURS,
    OURS_ON_CUDA,
    PRECISIONS,
    StepTrainer,
    make_local,
)
from benchmarks.worker import Job, WorkerProtocol


def make(job: Job) -> StepTrainer:
    """Build the implementation, sae_fast with its defaults for the length of the run if known."""
    arguments = job.weights, job.size.k, job.learning_rate
    if job.length is None:
        return make_local(job.implementation, *arguments)
    from benchmarks.baselines.sae_fast_trainer import FittedTrainer

    if job.implementation not in OURS:
        raise ValueError(f"{job.implementation} has no schedule of the learning rate")
    precision = PRECISIONS[job.implementation]
    run = {"n_tokens": job.size.n_tokens, "steps": job.length}
    return FittedTrainer(*arguments, precision=precision, **run)


def train(job: Job, protocol: WorkerProtocol) -> None:
    """Train on the job's batches; report NaN for the first loss, which is compared elsewhere."""
    if job.implementation in (*OURS_ON_CUDA, ALL_DEAD):
        from benchmarks.baselines import sae_fast_trainer  # noqa: F401 (import before counting)
    protocol.before_model()
    trainer = make(job)
    protocol.ready(float("nan"), trainer.reconstruct)
    for x in protocol.batches(job):
        trainer.step(x)
