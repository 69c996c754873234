"""Metrics of a dictionary by its weights alone: how alike its latents are.

A latent's largest cosine with another decoder row is a sign of redundancy: of duplicates, and of
latents that absorb parts of others' features. Blocks of rows are compared with all rows, so that no
matrix of all pairs is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.evaluation.core import Section

ROWS = 128  # whose cosines with all others are in memory at a time
SAMPLED = 1024  # latents whose largest cosines a report shows
_TOP_SHARE = 0.999


@torch.no_grad()
def largest_cosines(
    W: Tensor,  # [F, D]
    chosen: Tensor | None = None,  # [n] int64; None: every row
) -> Tensor:
    """Return the largest cosine of each row with another row, [n].

    Rows of zeros have a cosine of 0 with every other. Without another row it is 0.
    """
    count = len(W)
    chosen = torch.arange(count, device=W.device) if chosen is None else chosen
    if count < 2:
        return W.new_zeros(len(chosen))
    norms = W.norm(dim=1).clamp_min(torch.finfo(W.dtype).tiny)
    largest = []
    for part in torch.split(chosen, ROWS):
        cosines = W[part] @ W.T / norms[part, None] / norms
        cosines[torch.arange(len(part), device=part.device), part] = -1.0
        largest.append(cosines.amax(dim=1))
    return torch.cat(largest).clamp_(-1, 1)  # rounding can be a little above 1


def sampled_cosines(
    W: Tensor,  # [F, D]
) -> Tensor:
    """Return the largest cosine with another row of rows from everywhere, [n]; of few rows, all."""
    count = min(len(W), SAMPLED)
    chosen = torch.linspace(0, len(W) - 1, count, device=W.device).long()
    return largest_cosines(W.detach().float(), chosen).cpu()


@torch.no_grad()
def dictionary_metrics(sae: SparseAutoencoder) -> tuple[Section, dict[str, Tensor]]:
    """Return metrics of a dictionary's weights, and numbers by latent, [F] each.

    definitions.py has the formula of each. Of a transcoder whose outputs have another width the
    cosine of encoder and decoder is left out.
    """
    folded = sae.fold_normalization() if sae.config.has_scale else sae
    encoder, decoder = folded.W_enc.detach().float(), folded.W_dec.detach().float()
    in_encoder, in_decoder = largest_cosines(encoder), largest_cosines(decoder)
    average = float(in_decoder.double().mean())
    section = {
        "average_max_encoder_cosine_sim": float(in_encoder.double().mean()),
        "average_max_decoder_cosine_sim": average,
        "decoder_redundancy": average,
        "max_decoder_cosine_sim_p99_9": float(in_decoder.double().quantile(_TOP_SHARE)),
        "mean_squared_decoder_cosine": float(sae.mean_squared_cosine()),
    }
    latents = {
        "encoder_bias": folded.b_enc.detach(),
        "encoder_norm": encoder.norm(dim=1),
        "max_encoder_cosine_sim": in_encoder,
        "max_decoder_cosine_sim": in_decoder,
    }
    if encoder.shape == decoder.shape:
        cosines = torch.cosine_similarity(encoder, decoder, dim=1).clamp_(-1, 1)
        section["average_encoder_decoder_cosine_sim"] = float(cosines.double().mean())
        latents["encoder_decoder_cosine_sim"] = cosines
    return section, {name: numbers.double().cpu() for name, numbers in latents.items()}
