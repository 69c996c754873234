"""The usual weight of a penalty lowers its metric in a short training and hardly raises FVU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_fast.autoencoder.penalties import correlation_losses
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.training.checkpoint import CheckpointError
from sae_fast.training.trainer import Trainer

EXAMPLES = Path(__file__).parents[2] / "examples" / "activations"
RUN = TrainConfig(batch_size=256, max_steps=120, learning_rate=1e-2, eval_every=0)


def _trained(data: Any, sae: SAEConfig, run: TrainConfig, **more: Any) -> Trainer:
    trainer = Trainer(sae, run, data, show_progress=False, **more)
    trainer.train()
    return trainer


@pytest.mark.slow
def test_decorrelation_of_a_tenth_lowers_the_cosines_for_little_fvu() -> None:
    run = replace(RUN, shard_dir=str(EXAMPLES), batch_size=256, max_steps=50, learning_rate=5e-3)
    sae = SAEConfig(k=32, d_sae=768)
    free, led = (
        _trained(None, replace(sae, decorrelation_coeff=weight), run).summary for weight in (0, 0.1)
    )
    assert led["final_gram_mean"] < 0.85 * free["final_gram_mean"]
    assert led["final_fvu"] < 1.03 * free["final_fvu"]
    assert led["final_heldout_fvu"] < 1.03 * free["final_heldout_fvu"]


@pytest.fixture(scope="module", name="groups")
def latents_in_groups() -> torch.Tensor:
    """Return rows [6000, 32] of 64 directions, of which groups of four are active together."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    is_on = (torch.rand(6000, 16, generator=generator) < 1.5 / 16).repeat_interleave(4, 1)
    return (is_on * (0.5 + torch.rand(6000, 64, generator=generator))) @ directions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("coefficient", "figure"), [("independence_coeff", 0), ("orthogonality_coeff", 1)]
)
@pytest.mark.parametrize("settings", [{"arch": "relu", "decoder_norm": "unit"}, {"k": 8}])
def test_a_hundredth_lowers_the_correlations_for_little_fvu(
    groups: torch.Tensor, coefficient: str, figure: int, settings: dict[str, Any]
) -> None:
    if "arch" in settings:
        settings = {**settings, "l1_penalty_coeff": 0.3}
    correlations, errors = [], []
    for more in ({}, {coefficient: 0.01, "correlation_split": 32}):
        trainer = _trained(groups, SAEConfig(d_sae=64, **settings, **more), RUN)
        code = trainer.sae.encode(groups[:500]).dense().detach()
        correlations.append(float(correlation_losses(code, 32)[figure]))
        errors.append(trainer.summary["final_fvu"])
    assert correlations[1] < 0.8 * correlations[0]
    assert errors[1] < errors[0] + 0.005


def test_a_resumed_run_keeps_the_form_it_began_with(
    activations: torch.Tensor, tmp_path: Path
) -> None:
    began = SAEConfig(d_sae=64, k=3, decorrelation_coeff=0.1, decorrelation="gram_mean")
    run = replace(RUN, max_steps=2, checkpoint_dir=str(tmp_path))
    _trained(activations, began, run)
    run = replace(run, max_steps=4, resume_from="latest")
    resumed = _trained(activations, replace(began, decorrelation=None), run)
    assert resumed.sae_config.decorrelation == "gram_mean"
    with pytest.raises(CheckpointError, match="decorrelation = gram_mean"):
        Trainer(replace(began, decorrelation="gram_sum"), run, activations, show_progress=False)


def test_a_form_left_open_is_the_scaled_one() -> None:
    config = SAEConfig(d_in=16, d_sae=64, k=3, decorrelation_coeff=0.1)
    assert (config.decorrelation, config.correlation_pairs) == ("gram_scaled", "scaled")
