"""The inference threshold of batch_topk and matryoshka follows a model that still changes."""

from typing import Any

import pytest
import torch

from sae_fast import SAEConfig, TrainConfig, Trainer


@pytest.fixture(scope="module", name="rows")
def sparse_sums() -> torch.Tensor:
    """Return rows [20000, 64], sums of about 12 of 256 directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(256, 64, generator=generator), dim=1)
    is_on = torch.rand(20_000, 256, generator=generator) < 12 / 256
    return (is_on * torch.rand(20_000, 256, generator=generator)) @ directions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "steps", "more"),
    [
        ("batch_topk", 50, {}),
        ("batch_topk", 100, {}),
        ("batch_topk", 100, {"k_anneal_start": 64, "k_anneal_steps": 80}),
        ("matryoshka", 50, {}),
    ],
)
def test_heldout_l0_is_near_k_from_the_start(
    rows: torch.Tensor, arch: Any, steps: int, more: dict[str, int]
) -> None:
    prefixes = (128, 512) if arch == "matryoshka" else None
    sae = SAEConfig(arch=arch, d_sae=512, k=8, matryoshka_prefixes=prefixes)
    train = TrainConfig(lr=3e-3, batch_size=512, max_steps=steps, **more)
    trainer = Trainer(sae, train, rows[2000:], heldout=rows[:2000], show_progress=False)
    trainer.train()
    summary = trainer.summary
    assert 7 < summary["final_heldout_l0"] < 9
    assert summary["final_heldout_fvu"] < 1.1 * summary["final_fvu"]
