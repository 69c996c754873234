"""Presets: each can be trained, also from the command line, and lists its needs."""

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from slow_cases import slow_after

import sae_fast.config
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config.presets import (
    PRESETS,
    gpt2_medium_sae_config,
    gpt2_sae_config,
    preset,
    pythia_1_4b_sae_config,
)
from sae_fast.config.sae import without_other_size
from sae_fast.presets import main, measured_tokens_per_second
from sae_fast.train import main as train
from sae_fast.train import parse_arguments
from sae_fast.training.schedule import make_schedules
from sae_fast.training.trainer import Trainer

SLOTS = "slots_biography"
QUICK = [name for name in PRESETS if name != SLOTS]
EXAMPLES = Path(__file__).parents[1] / "examples/activations"


def write_random_shard(path, d_in, rows=300):
    labels = np.arange(rows) % 6
    rows = np.random.default_rng(0).standard_normal((rows, d_in), dtype=np.float32)
    with h5py.File(path, "w") as file:
        file["activations"] = rows
        file["labels/relation"] = file["labels/answer"] = labels


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_complete_configurations(name):
    sae, config = preset(name).configs()
    assert sae.is_complete
    assert config.peak_learning_rate(sae.d_sae) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after(2, PRESETS))
def test_a_preset_trains_from_the_command_line(name, tmp_path, capsys):
    d_in = preset(name).sae["d_in"]
    write_random_shard(tmp_path / "rows.h5", d_in)
    flags = ["--preset", name, "--shard-dir", str(tmp_path), "--checkpoint-dir"]
    short = ["--batch-size", "64", "--max-steps", "2", "--d-sae", "256"]
    assert train([*flags, str(tmp_path / "run"), *short]) == 0
    printed = capsys.readouterr().out
    assert "trained 2 steps" in printed
    assert f"d_in {d_in}, d_sae 256" in printed


@pytest.mark.parametrize("name", [*QUICK, pytest.param(SLOTS, marks=pytest.mark.slow)])
def test_a_preset_starts_with_less_than_the_error_of_the_mean(name, tmp_path):
    """On real activations, with all sizes of the preset divided by one number."""
    sae, config = preset(name).configs()
    with h5py.File(EXAMPLES / "train_00.h5") as file:
        rows = file["activations"][:512]
    width = min(sae.d_in, rows.shape[1])
    sizes = {"d_in": width, "d_sae": sae.d_sae * width // sae.d_in}
    if sae.k is not None:
        sizes["k"] = sae.k * width // sae.d_in
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["activations"] = rows[:, :width]
        file["labels/relation"] = file["labels/answer"] = np.arange(512) % 6
    given = without_other_size(sae.given, sizes) | sizes
    one_step = {"shard_dir": str(tmp_path), "batch_size": 512, "max_steps": 1, "max_epochs": None}
    run = dataclasses.replace(config, **one_step, warmup_steps=0, log_every=1)
    trainer = Trainer(sae_fast.config.SAEConfig(**given), run, show_progress=False)
    trainer.train()
    assert 0 < trainer.history[0]["fvu"] < 1


@pytest.mark.parametrize("flags", [["--d-sae", "999"], ["--expansion-factor", "4"]])
@pytest.mark.parametrize("name", ["gpt2", "modular_addition"])
def test_either_way_to_give_the_size_wins_over_a_preset(name, flags):
    sae = parse_arguments(["--preset", name, *flags]).sae
    d_in = preset(name).sae["d_in"]
    assert (sae.d_in, sae.d_sae) == (d_in, 999 if flags[0] == "--d-sae" else 4 * d_in)


def test_a_size_on_the_command_line_wins_over_a_file_and_a_file_over_a_preset(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"sae": {"d_sae": 999}, "train": {}}')
    flags = ["--preset", "gpt2", "--config", str(path)]
    assert parse_arguments(flags).sae.d_sae == 999
    assert parse_arguments([*flags, "--expansion-factor", "2"]).sae.d_sae == 2 * 768


def test_the_paper_preset_is_the_recipe_of_its_paper():
    sae, config = preset("deepseek_r1_llama_8b_paper").configs()
    assert (sae.arch, sae.d_in, sae.d_sae, sae.l1_penalty_coeff) == ("relu", 4096, 65536, 5.0)
    assert sae.decoder_norm == "free"  # so that the penalty is weighted by the rows' norms
    assert sae.normalize_activations == "mean_scale"  # to a norm of sqrt(d_in)
    assert (config.learning_rate, config.batch_size, config.grad_clip) == (5e-5, 4096, 1.0)
    assert config.betas == (0.9, 0.999)
    schedules = make_schedules(config, sae, rows_per_epoch=100 * 4096)
    weights = [schedules.at(step).sparsity_weight for step in range(6)]
    assert weights == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])  # 5 % of 100 steps
    rates = [schedules.at(step).rate / 5e-5 for step in (79, 80, 90, 99)]
    assert rates == pytest.approx([1, 20 / 21, 10 / 21, 1 / 21])


def test_flags_and_file_win_over_a_preset(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"sae": {"k": 9}, "train": {"batch_size": 5}}')
    flags = ["--preset", "gpt2", "--config", str(path), "--expansion-factor", "4", "--lr", "0.5"]
    config = parse_arguments(flags)
    assert (config.sae.d_in, config.sae.d_sae, config.sae.k) == (768, 4 * 768, 9)
    assert (config.train.batch_size, config.train.learning_rate) == (5, 0.5)


def test_unknown_preset_is_named_with_those_there_are(capsys):
    assert train(["--preset", "gpt5", "--shard-dir", "x"]) == 2
    assert "preset must be one of minilm, gpt2" in capsys.readouterr().err


def test_a_preset_of_another_width_is_refused(tmp_path, capsys):
    write_random_shard(tmp_path / "rows.h5", 32)
    assert train(["--preset", "gpt2", "--shard-dir", str(tmp_path)]) == 2
    assert "d_in must be 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (gpt2_sae_config, "gpt2"),
        (gpt2_medium_sae_config, "gpt2_medium"),
        (pythia_1_4b_sae_config, "pythia_1_4b"),
    ],
)
def test_functions_give_the_training_of_their_preset(make, name):
    sae, train = preset(name).configs()
    config = make()
    assert getattr(sae_fast, make.__name__) is make
    assert getattr(sae_fast.config, make.__name__) is make
    assert config.sae == sae
    assert config.train == dataclasses.replace(train, learning_rate=config.learning_rate)
    assert config.learning_rate == train.peak_learning_rate(sae.d_sae)
    assert (config.reconstruction_coeff, config.aux_k_coeff) == (1, 1 / 32)


def test_functions_give_the_sizes_of_their_models():
    assert (gpt2_sae_config().d_in, gpt2_sae_config().d_sae) == (768, 6144)
    assert gpt2_sae_config(expansion_factor=2).d_sae == gpt2_sae_config(2).d_sae == 1536
    assert (gpt2_medium_sae_config().d_in, gpt2_medium_sae_config().d_sae) == (1024, 4096)
    assert (pythia_1_4b_sae_config().d_in, pythia_1_4b_sae_config().d_sae) == (2048, 8192)
    assert pythia_1_4b_sae_config().batch_size == 8 * 2048


def test_functions_take_any_setting_in_place_of_their_own():
    config = gpt2_sae_config(num_latents=999, lr=0.5, l1_penalty_coeff=0.1, batch_size=32)
    assert (config.d_sae, config.learning_rate, config.l1_penalty_coeff) == (999, 0.5, 0.1)
    assert (config.batch_size, config.k) == (32, 32)
    with pytest.raises(ValueError, match="lr is another name of learning_rate"):
        gpt2_sae_config(lr=0.5, learning_rate=0.5)


def test_model_and_trainer_take_what_a_function_gives():
    config = gpt2_sae_config(num_latents=64, k=4, max_steps=1, batch_size=32)
    assert SparseAutoencoder(config).config == config.sae
    trainer = Trainer(config, data=torch.randn(64, 768), show_progress=False)
    assert trainer.train().config.k == 4


def test_the_preset_for_modular_addition_has_its_recipe():
    config = preset("modular_addition").configs()[1]
    assert (config.learning_rate, config.batch_size) == (3e-4, 4096)


def test_a_flag_that_names_a_model_points_to_the_presets(capsys):
    assert train(["--model", "gpt2", "--shard-dir", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown flag --model: --preset NAME takes the settings")
    assert error.count("\n") == 1


def test_listing_names_every_preset_with_its_memory(capsys):
    assert main([]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all("GiB" in line for line in lines)
    assert len({line.index("GiB") for line in lines}) == 1
    assert last.endswith("python -m sae_fast.presets --measure NAME")


def test_measuring_trains_the_preset_itself(monkeypatch):
    made = []
    steps = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: made.append(self) or steps(self))
    assert measured_tokens_per_second("modular_addition", steps=1) > 0
    assert (made[0].sae_config.d_sae, made[0].step) == (1024, 2)


def test_wrong_usage_is_one_line(capsys):
    assert main(["--measure"]) == 2
    assert main(["--measure", "gpt5"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
