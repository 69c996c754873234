"""Activations of 16 numbers: sparse sums of a planted dictionary."""

import torch

D_IN = 16


def planted(rows: int, seed: int) -> torch.Tensor:
    """Return rows [rows, 16], each the sum of three of 48 directions, with a mean."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(48, D_IN, generator=generator), dim=1)
    generator.manual_seed(seed)
    chosen = torch.randint(48, (rows, 3), generator=generator)
    strength = 0.5 + torch.rand(rows, 3, 1, generator=generator)
    noise = 0.01 * torch.randn(rows, D_IN, generator=generator)
    return (directions[chosen] * strength).sum(1) + noise + 0.3
