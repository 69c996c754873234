"""EleutherAI sparsify, trained by its own `Trainer.fit()`.

It trains on a language model's hidden states and accepts no stored activations. Its "model" here is
one layer that looks rows up in an array; all else in the step is sparsify's own code.
"""

from __future__ import annotations

import torch
from sparsify import SaeConfig, TrainConfig, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.worker import Job, WorkerProtocol


class RowTable(nn.Module):
    """A replacement of the transformer: its only layer maps token ids to stored activations."""

    def __init__(self, activations: Tensor) -> None:
        super().__init__()
        self.rows = Lookup(activations)
        self.device = activations.device
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.dummy_inputs = {"input_ids": ids}

    @property
    def base_model(self) -> nn.Module:
        """The module in which sparsify looks for hook points."""
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the activations of the given row numbers."""
        return self.rows(input_ids)


class Lookup(nn.Module):
    """A layer that maps row numbers to rows of stored activations."""

    def __init__(self, activations: Tensor) -> None:
        super().__init__()
        self.activations = activations

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the activations of the given row numbers."""
        return self.activations[input_ids]


class RequestedBatches(Dataset[dict[str, Tensor]]):
    """One item a step: the row numbers of a batch, given out when the parent requests a step."""

    def __init__(self, job: Job, protocol: WorkerProtocol) -> None:
        self.job = job
        self.protocol = protocol

    def __len__(self) -> int:
        return self.job.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        self.protocol.wait()
        first = self.job.first_row(step)
        return {"input_ids": torch.arange(first, first + self.job.size.n_tokens)}


def train(job: Job, protocol: WorkerProtocol) -> None:
    """Run sparsify's trainer with torch's Adam on the job's batches."""
    size, weights = job.size, job.weights
    config = TrainConfig(
        SaeConfig(num_latents=size.d_sae, k=size.k),
        batch_size=1,
        optimizer="adam",
        lr=job.learning_rate,
        lr_warmup_steps=job.rise_steps,
        hookpoints=["rows"],
        save_every=job.steps * 2,
        log_to_wandb=False,
    )
    protocol.before_model()
    trainer = Trainer(config, RequestedBatches(job, protocol), RowTable(job.activations))
    coder = trainer.saes["rows"]
    with torch.no_grad():
        coder.encoder.weight.copy_(weights.W_enc)
        coder.W_dec.copy_(weights.W_dec)
        # Makes the reported fraction a plain sum of squares.
        unit = torch.ones((), device=job.device)
        loss = coder(job.batch(0), total_variance=unit).fvu / size.n_tokens
    protocol.ready(float(loss), lambda x: coder(x).sae_out)
    trainer.fit()
