"""One training step of sae_fast, made of the calls that its own trainer makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.problem import Weights
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.cuda_graph import GraphRecorder
from sae_fast.training.optimizer.row_optimizer import RowOptimizer, SparseOptimizer, make_optimizer
from sae_fast.training.schedule import make_schedule


class SaeFastTrainer:
    """Trains a TopK autoencoder with sae_fast; it has the interface of the baselines.

    With `all_dead` every latent counts as dead in every step, so that AuxK does the most it can.
    With the number of `tokens` of the run AuxK begins when it does in such a run.
    """

    def __init__(
        self,
        weights: Weights,
        k: int,
        lr: float,
        *,
        precision: str = "screened",
        all_dead: bool = False,
        tokens: int | None = None,
    ) -> None:
        d_sae, d_in = weights.W_enc.shape
        config = SAEConfig(d_in=d_in, d_sae=d_sae, k=k, normalize_activations="none")
        if tokens is not None:
            config = config.for_run(tokens)
        device = weights.W_enc.device
        with device:
            self.sae = SparseAutoencoder(config)
        self.sae.load_state_dict(vars(weights), strict=False)
        self.precision = precision
        self.learning_rate: float | Tensor = lr
        # On a GPU the trainer passes k_aux=0 while, by its last log row, no latent can be dead yet.
        self.options: dict[str, Any] = {}
        self.all_dead = all_dead
        if device.type == "cuda":
            self.learning_rate = torch.tensor(lr, dtype=torch.float64, device=device)
            self.options = {"k_aux": config.kept_aux_k if all_dead else 0}
        self.optimizer: SparseOptimizer = RowOptimizer(self.sae, grad_clip=1.0, precision=precision)
        self._copy_session = object()

    def step(self, x: Tensor) -> Tensor:
        """Take one whole training step on x [N, D]; return the loss without AuxK."""
        with self.sae.kept_copies(session=self._copy_session):
            return self._step(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction [N, D] of x [N, D]."""
        x_hat: Tensor = self.sae(x)
        return x_hat

    def _step(self, x: Tensor) -> Tensor:
        if self.all_dead:
            self.sae.tokens_since_fired.fill_(self.sae.config.kept_dead_after_tokens)
        loss = self.sae.training_loss(x, precision=self.precision, dense_grad=False, **self.options)
        loss.total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(self.learning_rate)
        self.optimizer.zero_grad()
        self.sae.update_fired_(loss.fired, len(x))
        return loss.total.detach() - loss.components["aux_loss"]


class FittedTrainer(SaeFastTrainer):
    """A SaeFastTrainer with all that sae_fast's defaults derive from the length of a run.

    These are warm-up and fall of the learning rate, of which `lr` is the largest, Adam's betas, and
    when a latent counts as dead.
    """

    def __init__(
        self, weights: Weights, k: int, lr: float, *, precision: str, n_tokens: int, steps: int
    ) -> None:
        super().__init__(weights, k, lr, precision=precision, tokens=steps * n_tokens)
        amp = "bf16" if precision == "bf16" else "off"
        config = TrainConfig(lr=lr, batch_size=n_tokens, max_steps=steps, amp=amp)
        self.schedule = make_schedule(config, self.sae.config, steps)
        self.optimizer = make_optimizer(self.sae, config, steps)
        self.steps_done = 0

    def step(self, x: Tensor) -> Tensor:
        """Take one whole training step on x [N, D]; return the loss without AuxK."""
        self.learning_rate = self.schedule(self.steps_done)
        self.steps_done += 1
        return super().step(x)


class CapturedTrainer:
    """A SaeFastTrainer whose step is captured in a CUDA graph at its second call, then replayed.

    It is captured as `sae_fast.training` captures its steps.
    """

    def __init__(self, trainer: SaeFastTrainer) -> None:
        self.trainer = trainer
        self.recorder = GraphRecorder(trainer.sae.W_enc.device)
        self.replay: Callable[[], None] | None = None
        self.x: Tensor | None = None
        self.loss: Tensor | None = None

    def step(self, x: Tensor) -> Tensor:
        """Take one whole training step on x [N, D]; return the loss."""
        if self.x is None:  # the first step creates the tensors that later steps reuse
            self.x = x.clone()
            with self.recorder.side_stream():
                return self.trainer.step(self.x)
        self.x.copy_(x)
        if self.replay is None:
            self.replay = self.recorder.record(self._step)
        self.replay()
        assert self.loss is not None
        return self.loss

    def _step(self) -> None:
        assert self.x is not None
        self.loss = self.trainer.step(self.x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction [N, D] of x [N, D]."""
        return self.trainer.reconstruct(x)
