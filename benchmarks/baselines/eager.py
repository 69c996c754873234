"""One TopK training step in ordinary PyTorch, as the packaged trainers write it.

Dense encode, topk, scatter, dense decode. It has the parts of sae_fast's step in the same order:
reconstruction loss, AuxK over dead latents (none before 10 M silent tokens), backward, projection
off the decoder rows, clip by the global norm, Adam, unit decoder rows, counters of silent tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.support.problem import Weights

AUX_COEFFICIENT = 1 / 32
DEAD_AFTER_TOKENS = 10_000_000
GRADIENT_CLIP = 1.0


class EagerTrainer:
    """Trains a TopK autoencoder; subclasses replace how a code is selected and decoded."""

    fused_adam = False

    def __init__(
        self,
        weights: Weights,
        k: int,
        lr: float,
        *,
        autocast: bool = False,
        compiled: bool = False,
        dead_after_tokens: int = DEAD_AFTER_TOKENS,
    ) -> None:
        self.device = weights.W_enc.device
        self.W_enc = nn.Parameter(weights.W_enc.clone())  # [F, D]
        self.b_enc = nn.Parameter(weights.b_enc.clone())  # [F]
        self.W_dec = nn.Parameter(weights.W_dec.clone())  # [F, D]
        self.b_dec = nn.Parameter(weights.b_dec.clone())  # [D]
        self.parameters = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        self.k = k
        self.autocast = autocast
        self.dead_after_tokens = dead_after_tokens
        self.tokens_seen = 0
        self.tokens_since_fired = torch.zeros_like(self.b_enc, dtype=torch.int64)
        # fused=None is PyTorch's default: on a CPU, a loop over the parameters.
        fused = True if self.fused_adam or self.device.type == "cuda" else None
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=fused)
        self.objective: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
        self.objective = torch.compile(self.compute_loss) if compiled else self.compute_loss

    def select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Select the k largest of (x − b_dec) W_encᵀ + b_enc after ReLU; return values, indices."""
        pre_acts = F.linear(x - self.b_dec, self.W_enc, self.b_enc)
        values, indices = torch.relu(pre_acts).topk(self.k, dim=-1, sorted=False)
        return values, indices

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Return Σ value · W_dec[index], without b_dec, [N, D]."""
        dense = values.new_zeros(len(values), len(self.W_dec))
        return dense.scatter(-1, indices, values) @ self.W_dec

    def compute_loss(self, x: Tensor, dead: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss to minimise and the selected values and indices [N, K].

        `dead` [F] marks the dead latents; None leaves AuxK out.
        """
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            values, indices = self.select(x)
            residual = x - (self.decode(values, indices) + self.b_dec)  # [N, D]
            loss = residual.float().square().sum(-1).mean()
            if dead is not None:
                loss = loss + AUX_COEFFICIENT * self.aux_loss(x, residual.detach().float(), dead)
        return loss, values, indices

    def aux_loss(self, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """Return AuxK: the error of the strongest dead latents' model of the residual.

        It is relative to the residual's variance, and D where nothing of it is modelled. Its
        gradient goes straight through ReLU.
        """
        chosen = dead.nonzero().flatten()
        full_k_aux = max(1, min(2 * self.k, residual.shape[1] // 2))
        n_dead = len(chosen)
        centred = x - self.b_dec.detach()  # dead latents must not move b_dec
        pre_acts = F.linear(centred, self.W_enc[chosen], self.b_enc[chosen])
        values, places = pre_acts.topk(min(full_k_aux, n_dead), dim=-1, sorted=False)
        indices = chosen[places]
        acts = values + (torch.relu(values) - values).detach()
        error = self.decode(acts, indices) - residual
        variance = (residual - residual.mean(0)).square().sum(-1).mean()
        share = min(n_dead / full_k_aux, 1.0) * residual.shape[1]
        return torch.nan_to_num(share * error.square().sum(-1).mean() / variance)

    def step(self, x: Tensor) -> Tensor:
        """Take one whole training step on x [N, D]; return the loss."""
        loss, values, indices = self.objective(x, self.dead_latents())
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.project_decoder_gradient()
            torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))
            self.count_fired(values, indices)
        return loss.detach()

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the reconstruction [N, D] of x [N, D]."""
        return self.decode(*self.select(x)) + self.b_dec

    def dead_latents(self) -> Tensor | None:
        """Return a mask [F] of the dead latents, None without any.

        A GPU is not synchronised before the first latent can be dead.
        """
        if self.tokens_seen < self.dead_after_tokens:
            return None
        dead = self.tokens_since_fired >= self.dead_after_tokens
        return dead if bool(dead.any()) else None

    def count_fired(self, values: Tensor, indices: Tensor) -> None:
        """Count the silent tokens of every latent, without synchronising a GPU."""
        self.tokens_seen += len(values)
        self.tokens_since_fired += len(values)
        fired = torch.zeros_like(self.tokens_since_fired)
        fired.index_add_(0, indices.flatten(), (values > 0).long().flatten())
        self.tokens_since_fired.masked_fill_(fired > 0, 0)

    def project_decoder_gradient(self) -> None:
        """Remove from each decoder row's gradient the part along the row."""
        grad = self.W_dec.grad
        assert grad is not None
        grad -= (grad * self.W_dec).sum(1, keepdim=True) * self.W_dec
