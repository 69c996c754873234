"""The loop that trains a local implementation in its own process, to measure its memory."""

from __future__ import annotations

from benchmarks.implementations import ALL_DEAD, OURS_ON_CUDA, make_local
from benchmarks.worker import Job, WorkerProtocol


def train(job: Job, protocol: WorkerProtocol) -> None:
    """Train on the job's batches; report NaN for the first loss, which is compared elsewhere."""
    if job.implementation in (*OURS_ON_CUDA, ALL_DEAD):
        from benchmarks.baselines import sae_fast_trainer  # noqa: F401 (import before counting)
    protocol.before_model()
    trainer = make_local(job.implementation, job.weights, job.size.k, job.learning_rate)
    protocol.ready(float("nan"), trainer.reconstruct)
    for x in protocol.batches(job):
        trainer.step(x)
