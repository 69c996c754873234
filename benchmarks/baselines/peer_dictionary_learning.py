"""saprmarks/dictionary_learning, trained by its own `trainSAE` with its `TopKTrainer`."""

from __future__ import annotations

from typing import Any

import torch
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE

from benchmarks.worker import Job, WorkerProtocol


def train(job: Job, protocol: WorkerProtocol) -> None:
    """Run dictionary_learning's loop on the job's batches."""
    size = job.size

    def build(**settings: Any) -> TopKTrainer:
        protocol.before_model()
        trainer = TopKTrainer(**settings)
        with torch.no_grad():
            trainer.ae.encoder.weight.copy_(job.weights.W_enc)
            trainer.ae.decoder.weight.copy_(job.weights.W_dec.T)
            x = job.batch(0)
            loss = (trainer.ae(x) - x).square().sum(-1).mean()
        protocol.ready(float(loss), trainer.ae)
        return trainer

    settings = {
        "trainer": build,
        "steps": job.steps,
        "activation_dim": size.d_in,
        "dict_size": size.d_sae,
        "k": size.k,
        "lr": job.learning_rate,
        "warmup_steps": job.rise_steps,
        "decay_start": job.length and job.length - job.fall_steps,
        "layer": 0,
        "lm_name": "none",
        "device": str(job.device),
    }
    trainSAE(protocol.batches(job), [settings], steps=job.steps, device=str(job.device))
