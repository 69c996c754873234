"""Training with relation slots: stages, modes and their directories, labels, resume, bad input."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted import D_IN

from sae_fast.activations import write_shard
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig, TrainConfig
from sae_fast.config.presets import preset
from sae_fast.train import main
from sae_fast.training import run_directory
from sae_fast.training.memory_plan import plan_memory
from sae_fast.training.optimizer.row_optimizer import make_optimizer
from sae_fast.training.trainer import Trainer

N_RELATIONS, N_ANSWERS, ROWS = 3, 4, 1200
RUN = TrainConfig(
    batch_size=60,
    max_steps=30,
    learning_rate=1e-2,
    log_every=1,
    eval_every=0,
    pool_rows=600,
    num_threads=1,
)


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    monkeypatch.setattr(run_directory, "plot_run", lambda rows, path, title: path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def labelled(seed, rows=ROWS):
    """Make rows with own directions for relation and answer, some without a label."""
    fixed = torch.Generator().manual_seed(0)
    directions = torch.randn(N_RELATIONS, D_IN, generator=fixed)
    along = torch.randn(N_RELATIONS, D_IN, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    relations = torch.randint(N_RELATIONS, (rows,), generator=generator)
    answers = torch.randint(N_ANSWERS, (rows,), generator=generator)
    x = 3 * directions[relations] + (answers[:, None] - 1.5) * along[relations]
    x = x + 0.1 * torch.randn(rows, D_IN, generator=generator)
    relations[::11] = -1
    answers[::7] = -1
    return x, relations, answers


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bound")
    for number, name in enumerate(("train_00.h5", "train_01.h5", "heldout_00.h5")):
        x, relations, answers = labelled(number, 600)
        labels = {"relation": relations, "answer": answers}
        write_shard(directory / name, x, labels=labels)
    return directory


def slots(**fields):
    return SAEConfig(**{"arch": "slots", "d_sae": 40, "value_hidden": 32, **fields})


def train(shards, sae=None, **changes):
    run = replace(RUN, shard_dir=str(shards), **changes)
    trainer = Trainer(sae or slots(), run, show_progress=False)
    trainer.train()
    return trainer


@pytest.mark.slow
def test_slots_and_heads_learn_their_labels(shards, tmp_path):
    run = {"checkpoint_dir": str(tmp_path), "max_steps": 600, "log_every": 100}
    trainer = train(shards, slots(independence_coeff=0.0), **run)
    assert trainer.sae_config.n_relations == N_RELATIONS
    assert trainer.sae_config.n_answers == N_ANSWERS
    last = trainer.history[-1]
    assert last["heldout_slot_accuracy"] > 0.99
    assert last["heldout_value_accuracy"] > 0.9
    assert last["slot_accuracy"] > 0.99
    assert (tmp_path / "joint" / "training_history.json").exists()
    history = json.loads((tmp_path / "joint" / "training_history.json").read_text())["history"]
    assert {"alignment_loss", "value_loss", "orthogonality_loss"} <= set(history)
    final = SparseAutoencoder.from_pretrained(tmp_path / "joint" / "sae_final")
    assert all(torch.equal(t, final.state_dict()[n]) for n, t in trainer.sae.state_dict().items())


@pytest.mark.slow
def test_sparsity_and_alignment_bind_with_their_default_weights(shards):
    found = [
        train(shards, slots(**fields), max_steps=300, log_every=100).history[-1]
        for fields in ({}, {"slots_l1_mean": True})
    ]
    bound, literal = found
    assert bound["heldout_l0"] < 0.5 * literal["heldout_l0"]
    assert bound["heldout_fvu"] < 0.1
    assert bound["heldout_slot_accuracy"] > 0.99


def test_accuracy_on_held_out_rows_is_that_of_the_model(shards):
    trainer = train(shards)
    x, relations, answers = labelled(2, 600)
    binding = trainer.sae.architecture.measure(
        trainer.sae.weights, trainer.sae.normalize(x), relations, answers
    )
    last = trainer.history[-1]
    assert last["heldout_slot_accuracy"] == int(binding.slots_right) / int(binding.n_relations)
    assert last["heldout_value_accuracy"] == int(binding.answers_right) / int(binding.n_answers)


def test_data_given_as_tensors_train_and_are_evaluated_alike(shards):
    x, relations, answers = labelled(0)
    columns = {"labels/relation": relations, "labels/answer": answers}
    trainer = Trainer(
        slots(), RUN, x, columns=columns, heldout=x, heldout_columns=columns, show_progress=False
    )
    trainer.train()
    assert 0 < trainer.history[-1]["heldout_slot_accuracy"] <= 1
    small = {name: labels.int() for name, labels in columns.items()}
    again = Trainer(
        slots(), RUN, x, columns=small, heldout=x, heldout_columns=small, show_progress=False
    )
    again.train()
    last, first = again.history[-1], trainer.history[-1]
    assert all(last[name] == first[name] for name in first if name.startswith("heldout"))
    short = {**columns, "labels/answer": answers[:5]}
    with pytest.raises(ValueError, match=r"heldout_columns: labels/answer must have shape"):
        Trainer(slots(), RUN, x, columns=columns, heldout=x, heldout_columns=short)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels/relation": 7}, r"held-out rows: labels/relation has the label 7.*n_relations"),
        ({"labels/answer": -2}, r"held-out rows: labels/answer has the label -2"),
        ({"labels/answer": None}, r"held-out rows: labels/answer is missing"),
        ({"labels/answer": 0.5}, r"held-out rows: labels/answer must hold whole numbers"),
    ],
)
def test_held_out_labels_that_do_not_fit_are_one_line(change, message):
    x, relations, answers = labelled(0)
    columns = {"labels/relation": relations, "labels/answer": answers}
    kept = dict(columns)
    for name, value in change.items():
        kept.pop(name)
        if value is not None:
            kept[name] = torch.full((len(x),), value)
    with pytest.raises(ValueError, match=message) as refusal:
        Trainer(slots(), RUN, x, columns=columns, heldout=x, heldout_columns=kept)
    assert "\n" not in str(refusal.value)


def test_a_label_of_held_out_shards_that_training_lacks_is_one_line(tmp_path, capsys):
    for name, relation in (("train_00.h5", 2), ("heldout_00.h5", 99)):
        labels = {"relation": torch.full((80,), relation), "answer": torch.zeros(80).long()}
        write_shard(tmp_path / name, labelled(0, 80)[0], labels=labels)
    run = tmp_path / "run"
    flags = ("--arch", "slots", "--shard-dir", tmp_path, "--checkpoint-dir", run, *SMALL)
    code, _, err = run_command(capsys, *flags)
    assert code == 2
    assert "error: held-out rows: labels/relation has the label 99, but n_relations is 3" in err
    assert not run.exists()


def test_more_relations_than_latents_are_told_by_the_label():
    x, relations, answers = labelled(0)
    columns = {"labels/relation": relations.clamp_min(0) * 20, "labels/answer": answers}
    with pytest.raises(ValueError, match="labels/relation has the label 40, and 41 relation slots"):
        Trainer(slots(), RUN, x, columns=columns)


def test_labels_of_held_out_rows_that_nothing_needs_are_left_alone():
    x, relations, _ = labelled(0)
    labels = {"labels/rule": relations}
    trainer = Trainer(SAEConfig(d_sae=32), RUN, x, heldout=x, heldout_columns=labels)
    trainer.train()
    assert "heldout_slot_accuracy" not in trainer.history[-1]


def test_a_run_of_the_first_stage_alone_is_warned_of(shards, caplog):
    train(shards, reconstruction_epochs=5.0)
    assert "reconstruction_epochs = 5 are 100 steps, and the run has 30" in caplog.text
    caplog.clear()
    train(shards, reconstruction_epochs=0.5)
    assert "reconstruction_epochs" not in caplog.text


def test_the_first_stage_has_reconstruction_alone(shards):
    trainer = train(shards, reconstruction_epochs=0.5)  # 10 steps of 60 rows
    others = ("l1_loss", "alignment_loss", "value_loss", "orthogonality_loss")
    for row in trainer.history:
        assert all((row[name] > 0) == (row["step"] > 10) for name in others)
        assert (row["loss"] == pytest.approx(row["recon_loss"])) == (row["step"] <= 10)
        for name in (
            "slot_accuracy",
            "value_accuracy",
        ):  # no slot is bound yet, so it is not measured
            assert (row[name] is None) == (row["step"] <= 10)


@pytest.mark.parametrize("fused", [True, False])
def test_separate_value_trains_the_heads_of_a_given_model_alone(shards, tmp_path, fused):
    first = train(
        *(shards, slots(slots_mode="separate_activation", value_hidden=None)),
        checkpoint_dir=str(tmp_path / "runs"),
    )
    assert not hasattr(first.sae, "W_value_in")
    run = tmp_path / "runs"
    assert sorted(path.name for path in run.iterdir()) == ["feature_activation"]
    second = train(
        shards,
        slots(slots_mode="separate_value"),
        checkpoint_dir=str(run),
        start_from=str(run / "feature_activation" / "sae_final"),
        optimizer="adamw",
        weight_decay=0.1,
        fused=fused,
    )
    names = sorted(path.name for path in run.iterdir())
    assert names == ["feature_activation", "next_token_prediction"]
    heads = second.sae.architecture.trained()
    for name, tensor in first.sae.named_parameters():
        assert torch.equal(tensor, second.sae.get_parameter(name)), name
    fresh = second.sae.architecture.parameters()
    assert not any(torch.equal(second.sae.get_parameter(name), fresh[name]) for name in heads)
    assert second.history[-1]["value_loss"] < second.history[0]["value_loss"]
    assert torch.equal(first.sae.activation_mean, second.sae.activation_mean)


def test_a_resumed_run_is_bit_equal(shards, tmp_path):
    whole = train(shards, checkpoint_dir=str(tmp_path / "whole"), reconstruction_epochs=0.5)
    settings = {"checkpoint_every": 7, "reconstruction_epochs": 0.5}
    train(shards, checkpoint_dir=str(tmp_path / "parts"), **settings)
    step = tmp_path / "parts" / "joint" / "checkpoints" / "step-00000021"
    resumed = train(
        shards, checkpoint_dir=str(tmp_path / "again"), resume_from=str(step), **settings
    )
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(tensor, resumed.sae.state_dict()[name]), name
    losses = {row["step"]: row["loss"] for row in whole.history}
    assert [row["loss"] for row in resumed.history] == [losses[step] for step in range(22, 31)]


@pytest.mark.slow
def test_a_sweep_of_slots_goes_on_to_the_same_bits(shards, tmp_path, capsys):
    content = [{"name": "slots", "arch": "slots"}, {"name": "topk", "k": 4}]
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    flags = ("--shard-dir", shards, "--d-sae", 40, "--batch-size", 60, "--num-threads", 1)
    flags += ("--lr", 1e-2, "--decay-fraction", 0, "--sweep", tmp_path / "sweep.json")
    for name, parts in (("whole", (8,)), ("parts", (4, 8))):
        directory = ("--checkpoint-dir", tmp_path / name)
        for steps in parts:
            resume = ("--resume-from", "latest") if steps > parts[0] else ()
            code, _, err = run_command(capsys, *flags, *directory, "--max-steps", steps, *resume)
            assert code == 0, err
    for run in ("slots/joint", "topk"):
        whole, parts = (
            SparseAutoencoder.from_pretrained(tmp_path / name / run / "checkpoints" / "latest")
            for name in ("whole", "parts")
        )
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, parts.state_dict()[name]), name


def test_a_directory_of_a_sweep_of_slots_takes_no_other_run(shards, tmp_path, capsys):
    (tmp_path / "sweep.json").write_text('{"arch": ["slots"], "seed": [0, 1]}')
    flags = ("--shard-dir", shards, "--checkpoint-dir", tmp_path / "runs", *SMALL)
    assert run_command(capsys, *flags, "--sweep", tmp_path / "sweep.json")[0] == 0
    for arch in ("slots", "topk"):
        code, _, err = run_command(capsys, *flags, "--arch", arch)
        assert code == 2
        assert "holds the runs arch_slots-seed_0/joint and arch_slots-seed_1/joint" in err
    code, _, err = run_command(capsys, "--resume-from", tmp_path / "runs")
    assert code == 2
    assert "holds the runs arch_slots-seed_0/joint and arch_slots-seed_1/joint" in err


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_heads_alone_need_no_states_of_the_rows(shards, tmp_path, states):
    sae = SparseAutoencoder(
        slots(d_in=8, n_relations=2, n_answers=2, slots_mode="separate_value", value_hidden=4)
    )
    optimizer = make_optimizer(sae, replace(RUN, optimizer_states=states))
    assert set(optimizer.exp_avg) == set(sae.architecture.trained())
    assert not any("W_enc" in name or "W_dec" in name for name in optimizer.state_dict())


def run_command(capsys, *flags):
    code = main([str(flag) for flag in flags])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


SMALL = ("--batch-size", 60, "--max-steps", 4, "--d-sae", 40, "--num-threads", 1)


def test_command_trains_into_the_directory_of_the_mode(shards, tmp_path, capsys):
    flags = ("--arch", "slots", "--shard-dir", shards, "--checkpoint-dir", tmp_path, *SMALL)
    code, out, _ = run_command(capsys, *flags)
    assert code == 0
    assert "heldout_slot_accuracy" in out
    assert "heldout_value_accuracy" in out
    assert f"{tmp_path}/joint" in out
    assert (tmp_path / "joint" / "sae_final" / "sae.safetensors").exists()
    code, out, _ = run_command(
        capsys,
        *("--resume-from", "latest", "--checkpoint-dir", tmp_path / "joint", "--max-steps", 6),
    )
    assert code == 0
    assert "trained 6 steps" in out
    for reference in (("--resume-from", tmp_path), ("--resume-from", "latest", *flags[4:6])):
        code, out, _ = run_command(
            capsys, *reference, "--max-steps", 7
        )  # the only run in that folder
        assert code == 0
        assert "7 steps" in out
    shutil.copytree(tmp_path / "joint", tmp_path / "feature_activation", symlinks=True)
    code, _, err = run_command(capsys, "--resume-from", tmp_path)
    assert code == 2
    assert "holds the runs feature_activation and joint: name one of them" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--relation-labels", "labels/rule"), r"labels/rule.*relation"),
        (("--answer-labels", "labels/word"), r"labels/word.*answer"),
        (("--n-relations", 2), "labels/relation has the label 2, but n_relations is 2"),
        (("--n-answers", 3), "labels/answer has the label 3, but n_answers is 3"),
        (("--slots-mode", "separate_value"), "name the model with trained slots by --start-from"),
        (("--start-from", "nowhere"), "start_from: nowhere is no model, no checkpoint and no run"),
        (("--k", 3), "k belongs to arch"),
    ],
)
def test_bad_input_is_one_line(shards, tmp_path, capsys, flags, message):
    given = ("--arch", "slots", "--shard-dir", shards, "--checkpoint-dir", tmp_path, *SMALL)
    code, _, err = run_command(capsys, *given, *flags)
    assert code == 2
    errors = [line for line in err.splitlines() if "verif" not in line]
    assert len(errors) == 1
    assert re.search(message, errors[0]), err


def test_heads_alone_are_not_trained_on_slots_of_another_target(shards, tmp_path, capsys):
    mode = {"slots_mode": "separate_activation", "slot_target": 1.0}
    latents = SAEConfig(arch="slots", d_sae=40, **mode)
    train(shards, latents, max_steps=2, checkpoint_dir=str(tmp_path))
    flags = ("--arch", "slots", "--slots-mode", "separate_value", "--shard-dir", shards, *SMALL)
    start = ("--start-from", tmp_path / "feature_activation", "--checkpoint-dir", tmp_path)
    code, _, err = run_command(capsys, *flags, *start)
    assert code == 2
    assert "is of a model with slot_target = 1.0, this one has 2.0" in err
    assert run_command(capsys, *flags, *start, "--slot-target", 1)[0] == 0


def test_a_model_of_other_sizes_is_no_start(shards, tmp_path, capsys):
    train(shards, slots(d_sae=30), checkpoint_dir=str(tmp_path))
    start = ("--start-from", tmp_path / "joint")
    given = ("--arch", "slots", "--shard-dir", shards, "--checkpoint-dir", tmp_path / "next")
    code, _, err = run_command(capsys, *given, *SMALL, *start)
    assert code == 2
    assert "is of a model with d_sae = 30, this one has 40" in err


def test_preset_is_the_reference_size():
    sae, config = preset("slots_biography").configs()
    assert (sae.d_in, sae.d_sae, sae.group_split) == (768, 100_006, 100_000)
    assert (config.batch_size, config.learning_rate) == (64, 1e-3)
    assert (config.reconstruction_epochs, config.max_epochs) == (50, 150)


def test_memory_plan_counts_heads_and_correlations():
    fields = {"d_in": 64, "d_sae": 1000, "n_relations": 6, "n_answers": 50}
    run = replace(RUN, batch_size=64)
    sae = SAEConfig(arch="slots", **fields)
    with_all = plan_memory(sae, run, native=True, pool_bytes=0).parts
    alone = replace(sae, independence_coeff=0.0, orthogonality_coeff=0.0)
    without = plan_memory(alone, run, native=True, pool_bytes=0).parts
    assert set(with_all) - set(without) == {"correlations of latents"}
    heads = 6 * (2 * 256 + 256 * 50 + 50) * 4
    base = SAEConfig(arch="relu", d_in=64, d_sae=1000)
    plain = plan_memory(base, run, native=True, pool_bytes=0).parts
    assert without["parameters"] - plain["parameters"] == heads


def test_path_of_a_run_is_left_alone_for_other_architectures():
    config = replace(RUN, checkpoint_dir=str(Path("runs") / "a"))
    sae = SAEConfig(d_in=8)
    assert run_directory.in_mode_directory(sae, config) is config
    inside = run_directory.in_mode_directory(slots(d_in=8, n_relations=2), config)
    assert inside.checkpoint_dir == "runs/a/joint"
    assert run_directory.in_mode_directory(slots(d_in=8, n_relations=2), inside) is inside
