"""Schedule-free Signum: trained, evaluated and saved weights, and resuming."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_optimizer import PlainSteps
from plain_sae import PARAMETERS, make_batch, make_sae
from safetensors.torch import load_file

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.evaluation.metrics import evaluate
from sae_fast.train import main
from sae_fast.training.memory_plan import plan_memory
from sae_fast.training.optimizer.row_optimizer import DenseOptimizer, RowOptimizer
from sae_fast.training.optimizer.schedule_free import ScheduleFreeWeights
from sae_fast.training.optimizer.signum import ScheduleFreeSignum
from sae_fast.training.schedule import make_schedule
from sae_fast.training.trainer import Trainer

RULE: Any = "schedule_free_signum"
EXAMPLES = Path(__file__).parents[2] / "examples" / "activations"
SAE = SAEConfig(d_sae=64, k=3)
RUN = {"batch_size": 64, "max_steps": 24, "lr": 5e-3, "optimizer": RULE, "eval_every": 8}


def test_torch_optimizer_is_the_published_algorithm() -> None:
    """The optimiser is compared with z, x and y in float64, in separate arrays."""
    generator = torch.Generator().manual_seed(0)
    y = torch.nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64))
    optimizer = ScheduleFreeSignum([y], lr=0.0, momentum=0.8, weight_decay=0.1)
    optimizer.step()  # without a gradient there is nothing to do
    z = x = own = y.detach().clone()
    weights = 0.0
    for step in range(40):
        y.grad = torch.randn(50, generator=generator, dtype=torch.float64)
        lr = 1e-2 * min(1.0, (step + 1) / 5)
        weights += lr**2
        share = lr**2 / weights
        z = z - lr * (y.grad.sign() + 0.1 * own)
        x = (1 - share) * x + share * z
        own = 0.2 * z + 0.8 * x
        optimizer.param_groups[0].update(lr=lr, average_share=share)
        optimizer.step()
        torch.testing.assert_close(y.detach(), own)
        difference = optimizer.state[y]["z_minus_y"]
        torch.testing.assert_close(y.detach() + difference, z)
        torch.testing.assert_close(y.detach() - 0.2 / 0.8 * difference, x)


@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
@pytest.mark.parametrize("momentum", [0.5, 0.95])
def test_evaluated_weights_are_the_average_kept_on_its_own(kind: Any, momentum: float) -> None:
    sae = make_sae()
    other = copy.deepcopy(sae)
    settings = {"momentum": momentum, "weight_decay": 0.01, "grad_clip": 0.5}
    optimizer = kind(sae, rule=RULE, **settings)
    plain = PlainSteps(other, RULE, **settings)
    for step in range(6):
        x = make_batch(sae, seed=step)
        optimizer.zero_grad()
        sae.training_loss(x, dense_grad=kind.dense_grad).total.backward()
        rate = 1e-2 / (6 - step)
        optimizer.step(rate)
        plain.step(rate, [x])
    model = ScheduleFreeWeights(optimizer).model()
    for name, average in zip(PARAMETERS, plain.optimizer.averages, strict=True):
        wanted = torch.nn.functional.normalize(average, dim=1) if name == "W_dec" else average
        found = model.get_parameter(name).detach()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)
        assert (found - sae.get_parameter(name)).abs().max() > 1e-4
    torch.testing.assert_close(model.W_dec.norm(dim=1).detach(), torch.ones(sae.config.d_sae))


def test_evaluated_weights_of_16_bit_states_are_near_those_of_32() -> None:
    models, trained = [], []
    for states in ("fp32", "bf16"):
        sae = make_sae(d_in=300)
        optimizer = RowOptimizer(sae, rule=RULE, states=states, momentum=0.5)
        for step in range(4):
            optimizer.zero_grad()
            x = make_batch(sae, seed=step)
            sae.training_loss(x, dense_grad=False).total.backward()
            optimizer.step(1e-4)
        models.append(ScheduleFreeWeights(optimizer).model())
        trained.append(sae)
    moved = (models[0].W_dec - trained[0].W_dec).abs().max()
    assert (models[1].W_dec - models[0].W_dec).abs().max() < 0.3 * moved


def _run(shard_dir: Path, directory: Path, **changes: Any) -> Trainer:
    values = {"shard_dir": str(shard_dir), "checkpoint_dir": str(directory), **RUN, **changes}
    trainer = Trainer(SAE, TrainConfig.from_dict(values), show_progress=False)
    trainer.train()
    return trainer


def test_average_is_evaluated_saved_and_returned(shard_dir: Path, tmp_path: Path) -> None:
    trainer = _run(shard_dir, tmp_path / "run")
    latest = tmp_path / "run" / "checkpoints" / "latest"
    saved = SparseAutoencoder.from_pretrained(latest)
    tensors = load_file(latest / "trainer.safetensors")
    share = (1 - 0.95) / 0.95
    for name in PARAMETERS:
        y, difference = tensors[f"trained.{name}"], tensors[f"optimizer.{name}.z_minus_y"]
        assert torch.equal(y, trainer.sae.get_parameter(name))
        x = y - share * difference
        if name == "W_dec":
            x = torch.nn.functional.normalize(x, dim=1)
        torch.testing.assert_close(saved.get_parameter(name).detach(), x)
        assert torch.equal(saved.get_parameter(name), trainer.model().get_parameter(name))
        assert not torch.equal(saved.get_parameter(name), y)
    assert trainer.data.heldout is not None
    rows = list(trainer.data.heldout)
    measured = evaluate(saved, rows)["heldout_fvu"]
    assert trainer.history[-1]["heldout_fvu"] == pytest.approx(measured, rel=1e-6)
    assert trainer.history[-1]["heldout_fvu"] != evaluate(trainer.sae, rows)["heldout_fvu"]


def test_other_optimizers_evaluate_what_they_train(shard_dir: Path, tmp_path: Path) -> None:
    trainer = _run(shard_dir, tmp_path / "run", optimizer="signum")
    assert trainer.model() is trainer.sae
    tensors = load_file(tmp_path / "run" / "checkpoints" / "latest" / "trainer.safetensors")
    assert not [name for name in tensors if name.startswith("trained.")]


def test_threshold_of_the_average_is_not_negative() -> None:
    sae = SparseAutoencoder(SAEConfig(d_in=8, d_sae=16, arch="jumprelu", target_l0=3))
    optimizer = RowOptimizer(sae, rule=RULE, momentum=0.5)
    with torch.no_grad():
        sae.get_parameter("threshold").fill_(0.25)
        optimizer.exp_avg["threshold"][::2] = 0.75  # x is y − (z − y)
    threshold = ScheduleFreeWeights(optimizer).model().get_parameter("threshold")
    assert threshold.tolist() == [0.0, 0.25] * 8


def test_learning_rate_stays_after_the_warm_up() -> None:
    run = TrainConfig(optimizer=RULE, lr=1.0, warmup_steps=4)
    rates = [make_schedule(run, SAEConfig(d_sae=64), 50)(step) for step in range(50)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert set(rates[4:]) == {1.0}
    chosen = TrainConfig(optimizer=RULE, lr=1.0, warmup_steps=4, decay_fraction=0.2)
    assert make_schedule(chosen, SAEConfig(d_sae=64), 50)(49) < 0.1
    assert TrainConfig().kept_decay_fraction == TrainConfig(optimizer="signum").kept_decay_fraction
    assert TrainConfig().kept_decay_fraction == 0.2


def test_memory_plan_counts_the_evaluated_model() -> None:
    sae = SAEConfig(d_in=100, d_sae=1000)
    plans = [
        plan_memory(sae, TrainConfig(optimizer=rule), native=True, pool_bytes=0).parts
        for rule in (RULE, "signum")
    ]
    name = "averaged model, while it is evaluated"
    parameters = 2 * 1000 * 100 + 1000 + 100
    assert plans[0].pop(name) == parameters * 4 + 1000 * 100 * 2
    assert plans[0] == plans[1]


def test_command_trains_resumes_and_saves(tmp_path: Path, capsys: Any) -> None:
    def train(directory: Path, *more: str) -> dict[str, torch.Tensor]:
        arguments = ["--shard-dir", str(EXAMPLES), "--optimizer", RULE, "--d-sae", "128"]
        arguments += ["--k", "8", "--batch-size", "128", "--max-steps", "12", "--lr", "5e-3"]
        arguments += ["--checkpoint-every", "5", "--keep-checkpoints", "9", "--eval-every", "0"]
        assert main([*arguments, "--checkpoint-dir", str(directory), *more]) == 0
        latest = directory / "checkpoints" / "latest"
        return load_file(latest / "sae.safetensors") | load_file(latest / "trainer.safetensors")

    straight = train(tmp_path / "straight")
    middle = tmp_path / "straight" / "checkpoints" / "step-00000005"
    resumed = train(tmp_path / "resumed", "--resume-from", str(middle))
    assert straight.keys() == resumed.keys()
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name
    assert float(straight["optimizer.lr_squares"]) == pytest.approx(
        sum(min(5e-3, 5e-3 * (step + 1) / 2) ** 2 for step in range(12))
    )
    capsys.readouterr()
    bad = ["--shard-dir", str(EXAMPLES), "--optimizer", RULE, "--momentum", "0"]
    assert main([*bad, "--checkpoint-dir", str(tmp_path / "bad")]) == 2
    assert "momentum must be above 0" in capsys.readouterr().err


def test_state_without_the_sum_of_rates_is_refused() -> None:
    optimizer = RowOptimizer(make_sae(), rule=RULE)
    state = dict(optimizer.state_dict())
    del state["lr_squares"]
    with pytest.raises(ValueError, match="has no tensor lr_squares"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("kind", [RowOptimizer, DenseOptimizer])
def test_step_that_is_not_finite_counts_in_no_average(kind: Any) -> None:
    sae = make_sae()
    optimizer = kind(sae, rule=RULE, skip_overflow=True)
    for factor in (1.0, math.inf):
        optimizer.zero_grad()
        loss = sae.training_loss(make_batch(sae), dense_grad=kind.dense_grad)
        (loss.total * factor).backward()
        optimizer.step(1e-2)
        assert float(optimizer.lr_squares) == pytest.approx(1e-4)


def test_average_is_not_kept_in_8_bits() -> None:
    message = "states must be 'fp32' or 'bf16' .*, got '8bit'"
    with pytest.raises(ValueError, match="optimizer_" + message):
        TrainConfig(optimizer=RULE, optimizer_states="8bit")
    with pytest.raises(ValueError, match=message):
        RowOptimizer(make_sae(), rule=RULE, states="8bit")
