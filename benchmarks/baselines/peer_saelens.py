"""SAELens, trained by its own `SAETrainer.fit()` on an iterator of batches."""

from __future__ import annotations

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.worker import Job, WorkerProtocol


def train(job: Job, protocol: WorkerProtocol) -> None:
    """Run SAELens's trainer, with its defaults, on the job's batches."""
    size, weights = job.size, job.weights
    config = SAETrainerConfig(
        total_training_samples=job.steps * size.n_tokens,
        train_batch_size_samples=size.n_tokens,
        lr=job.learning_rate,
        lr_warm_up_steps=job.rise_steps,
        lr_decay_steps=job.fall_steps,
        lr_end=job.learning_rate,
        autocast=job.autocast,
        device=str(job.device),
        logger=LoggingConfig(log_to_wandb=False),
    )
    protocol.before_model()
    shape = {"d_in": size.d_in, "d_sae": size.d_sae, "k": size.k}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shape, device=str(job.device)))
    with torch.no_grad():
        sae.W_enc.copy_(weights.W_enc.T)
        sae.W_dec.copy_(weights.W_dec)
        x = job.batch(0)
        loss = (sae(x) - x).square().sum(-1).mean()
    trainer = SAETrainer(config, sae, data_provider=protocol.batches(job))
    protocol.ready(float(loss), sae)
    trainer.fit()
