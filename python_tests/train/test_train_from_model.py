"""`python -m sae_fast.train MODEL DATASET`: its trainings, its output, and resuming."""

import json
from pathlib import Path

import pytest
from train_runs import Run, assert_same, killed_at, metrics

from sae_fast.config import RunConfig
from sae_fast.train import main
from sae_fast.training.fitted_rates import fitted_rates
from sae_fast.training.sweep import Sweep
from sae_fast.training.trainer import Trainer


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_one_autoencoder_for_each_layer_and_seed(run_on_model: Run, model: str) -> None:
    flags = ("--layers", "0", "2", "--init_seeds", "1", "2", "--run_name", "all")
    code, out, _ = run_on_model(*flags, model=model)
    assert code == 0
    names = [f"residual.{layer}/seed_{seed}" for layer in (0, 2) for seed in (1, 2)]
    summary = json.loads(Path("output/all/sweep.json").read_text())["runs"]
    assert list(summary) == names
    for name in names:
        assert f"{name}: trained 10 steps, 640 tokens" in out
        config = RunConfig.load(f"output/all/{name}/config.json")
        assert (config.sae.d_in, config.sae.d_sae, config.sae.k) == (16, 32, 4)
        assert (config.train.seed, config.train.order_seed) == (int(name[-1]), 42)
        assert 0 < summary[name]["final_heldout_fvu"] < 2
    # One training alone has equal bits.
    seed = ("--init_seeds", "2", "--run_name", "one")
    assert run_on_model("--layers", "2", *seed, model=model)[0] == 0
    assert_same("output/all/residual.2/seed_2", "output/one/residual.2")
    assert metrics("output/all/residual.2/seed_2") == metrics("output/one/residual.2")


def test_defaults_are_those_that_users_of_such_trainers_know(
    run_on_model: Run, inputs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Trainer] = []

    def no_steps(sweep: Sweep) -> None:
        made.extend(sweep.trainers.values())
        raise ValueError("enough")

    monkeypatch.setattr(Sweep, "train", no_steps)
    command = [f"{inputs[0]}/gpt2", inputs[1], "--d-sae", "512", "--heldout-tokens", "64"]
    assert main([*command, "--arch", "relu"]) == main(command) == 2
    for trainer in made:
        assert trainer.train_config.learning_rate is None
        rates = fitted_rates(trainer.train_config, trainer.sae_config, trainer.total_steps)
        assert trainer.schedules.rate.peak == rates.peak
    sae, train = trainer.sae_config, trainer.train_config
    assert (sae.arch, sae.k, sae.d_sae, sae.loss_fn) == ("topk", 192, 512, "mse")
    assert train.batch_size == 4 * 32  # the context of this model is shorter than 512
    assert trainer.total_steps == 1_000_000 // train.batch_size
    assert (train.optimizer, train.learning_rate, train.weight_decay) == ("adam", None, 0.0)
    assert (train.grad_acc_steps, train.dead_percentage_threshold) == (1, 0.0005)
    assert (train.seed, train.order_seed) == (42, 42)
    assert (train.checkpoint_every, train.wandb_log_every) == (1000, 100)
    assert train.checkpoint_dir == "output/topk-k192-1/residual.0"
    assert train.wandb_project is None


def test_other_architectures_hooks_and_settings(
    inputs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        *(f"{inputs[0]}/gpt2", inputs[1], "--ctx_len", "16", "--max_tokens", "640"),
        *("--arch", "relu", "--l1_penalty_coeff", "0.1", "--lr", "1e-2", "--loss_fn", "fvu"),
        *("--hook_points", "mlp_out.1", "attn_out.*", "--log_to_wandb", "false"),
        *("--num_latents", "40", "--dead_feature_threshold", "123", "--run_name", "r"),
        *("--heldout_tokens", "0", "--num_threads", "1"),
    ]
    assert main(command) == 0
    hooks = ["mlp_out.1", *(f"attn_out.{layer}" for layer in range(3))]
    assert sorted(path.name for path in Path("output/r").iterdir()) == sorted(
        [*hooks, "sweep.json"]
    )
    config = RunConfig.load("output/r/attn_out.2/config.json")
    assert (config.sae.arch, config.sae.d_sae, config.sae.dead_after_tokens) == ("relu", 40, 123)
    assert (config.sae.loss_fn, config.train.learning_rate) == ("fvu", 1e-2)
    assert "heldout_fvu" not in capsys.readouterr().out


def test_a_sweep_is_trained_on_every_layer(run_on_model: Run) -> None:
    Path("sweep.json").write_text(json.dumps({"k": [1, 3]}))
    flags = ("--layers", "0", "1", "--sweep", "sweep.json", "--run_name", "s")
    assert run_on_model(*flags)[0] == 0
    found = {
        str(path.parent.relative_to("output/s")): RunConfig.load(path).sae.k
        for path in Path("output/s").rglob("config.json")
        if "checkpoints" not in path.parts
    }
    assert found == {f"residual.{layer}/k_{k}": k for layer in (0, 1) for k in (1, 3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [(), ("--amp", "bf16", "--grad_acc_steps", "2"), ("--streaming", "always")]
)
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(
    run_on_model: Run, more: tuple[str, ...]
) -> None:
    flags = ("--layers", "0", "1", "--save_every", "2", *more)
    assert run_on_model(*flags, "--run_name", "whole")[0] == 0
    with killed_at(3):
        assert run_on_model(*flags, "--run_name", "parts")[0] == 130
    assert run_on_model(*flags, "--run_name", "parts")[0] == 2  # it is not started again by mistake
    assert run_on_model(*flags, "--run_name", "parts", "--resume_from", "latest")[0] == 0
    for layer in (0, 1):
        assert_same(f"output/whole/residual.{layer}", f"output/parts/residual.{layer}")
        assert metrics(f"output/whole/residual.{layer}") == metrics(
            f"output/parts/residual.{layer}"
        )


def test_sequences_are_whole_where_a_loss_needs_them(run_on_model: Run) -> None:
    code, _, _ = run_on_model("--temporal_smoothness_coeff", "0.5", "--run_name", "t")
    assert code == 0
    rows = [row for row in metrics("output/t/residual.0") if "loss" in row]
    assert len(rows) == 5
    assert all(row["temporal_loss"] > 0 for row in rows)


@pytest.mark.slow
def test_log_to_wandb_true_works_as_written(
    run_on_model: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MODE": "offline", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for number, words in enumerate((("true",), ())):
        assert run_on_model("--log_to_wandb", *words, "--run_name", str(number))[0] == 0
        logs = list(Path(f"output/{number}/residual.0/wandb").glob("offline-run-*/*.wandb"))
        assert len(logs) == 1


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_epoch_counts_passes_over_the_documents(
    run_on_model: Run, inputs: tuple[str, str], loss: str
) -> None:
    texts = [json.loads(line)["text"] for line in Path(inputs[1]).read_text().splitlines()][:12]
    Path("few.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokens = sum(1 + len(text.split()) for text in texts if text and text.strip())
    flags = ["--ctx_len", "16", "--batch_size", "4", "--k", "4", "--d_sae", "32"]
    flags += ["--max_tokens", "640", "--log_every", "1", "--heldout_tokens", "0"]
    assert (
        main([f"{inputs[0]}/gpt2", "few.jsonl", *flags, "--loss_fn", loss, "--run_name", "e"]) == 0
    )
    epochs = [row["epoch"] for row in metrics("output/e/residual.0") if "loss" in row]
    assert len(epochs) == 10
    assert epochs == sorted(epochs)
    if loss == "mse":
        assert epochs == pytest.approx([64 * step / tokens for step in range(1, 11)], abs=1e-9)
    else:  # whole batches of sequences; the last batch of a pass is shorter
        assert 3 <= epochs[-1] <= 10
        assert epochs[0] == pytest.approx(64 / tokens)


def test_how_near_latents_come_to_each_other_is_logged_with_the_interval_of_wandb(
    run_on_model: Run,
) -> None:
    flags = ("--wandb_log_frequency", "4", "--run_name", "r")
    assert run_on_model(*flags)[0] == 0
    rows = {row["step"]: row for row in metrics("output/r/residual.0")}
    assert [step for step, row in rows.items() if "max_decoder_cosine" in row] == [4, 8, 10]
    assert all("dead_fraction" in rows[step] for step in (4, 8, 10))
    assert 0 < rows[10]["max_decoder_cosine"] < 1
