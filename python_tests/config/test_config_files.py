import copy
import json
import pickle

import pytest
import torch

from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.training.trainer import Trainer

CONFIGS = [
    SAEConfig(),
    SAEConfig(d_in=384, expansion_factor=7.3, l1_penalty_coeff=0.1 + 0.2, aux_k=7),
    SAEConfig(arch="matryoshka", d_in=4, matryoshka_prefixes=(3, 32), matryoshka_weights=(0.5, 2)),
    TrainConfig(),
    TrainConfig(lr=1 / 3, betas=(0.9, 0.99), shard_dir="données", amp="fp16", max_tokens=10**12),
    RunConfig(sae=SAEConfig(d_in=16, k=4), train=TrainConfig(seed=7)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_file_round_trip_is_exact(config, tmp_path):
    config.save(tmp_path / "config.json")
    assert type(config).load(tmp_path / "config.json") == config


def test_model_config_is_read_from_the_file_of_a_run(tmp_path):
    run = RunConfig(sae=SAEConfig(d_in=16, k=4))
    run.save(tmp_path / "config.json")
    assert SAEConfig.load(tmp_path / "config.json") == run.sae


def test_run_config_accepts_flat_fields_and_aliases(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"expansion_factor": 4, "input_dim": 16, "lr": 0.001, "use_amp": true}')
    expected = RunConfig(
        sae=SAEConfig(expansion_factor=4, d_in=16),
        train=TrainConfig(learning_rate=0.001, amp="bf16"),
    )
    assert RunConfig.load(path) == expected


def test_section_left_out_takes_its_defaults():
    assert RunConfig.from_dict({"sae": {"k": 8}}) == RunConfig(sae=SAEConfig(k=8))


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (
            SAEConfig,
            {"k": 8, "expansion_facto": 4},
            "'expansion_facto' .did you mean 'expansion_factor'",
        ),
        (SAEConfig, {"zzz": 8, "qqq": 4}, "unknown keys 'zzz', 'qqq'"),
        (TrainConfig, {"sae": {}}, "unknown key 'sae'"),
        (RunConfig, {"learningrate": 1}, "'learningrate' .did you mean 'learning_rate'"),
        (RunConfig, {"sae": {}, "k": 1}, "unknown key 'k'"),
        (RunConfig, {"sae": {"kk": 1}}, "unknown key 'kk'"),
        (RunConfig, {"sae": 1}, "section 'sae' must be a JSON object, got 1"),
        (SAEConfig, {"format_version": 99}, "format_version must be 1, got 99"),
        (SAEConfig, [1], "must hold a JSON object, got list"),
        (SAEConfig, {"k": 0}, "k must be at least 1, got 0"),
    ],
)
def test_bad_file_is_refused_by_name_and_key(config, values, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as caught:
        config.load(path)
    assert str(path) in str(caught.value)


def test_file_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"k": ')
    with pytest.raises(ValueError, match=r"config\.json: not a JSON file"):
        SAEConfig.load(path)


FLAT = {
    "input_dim": 16,
    "expansion_factor": 4,
    "learning_rate": 1e-4,
    "batch_size": 32,
    "l1_penalty_coeff": 0.1,
    "decorrelation_coeff": 0.2,
    "use_amp": True,
    "wandb_project": "planted",
}


def test_run_config_takes_and_gives_all_settings_flat(tmp_path):
    config = RunConfig(**FLAT)
    sae = SAEConfig(d_in=16, expansion_factor=4, l1_penalty_coeff=0.1, decorrelation_coeff=0.2)
    train = TrainConfig(lr=1e-4, batch_size=32, amp="bf16", wandb_project="planted")
    assert (config.sae, config.train) == (sae, train)
    assert (config.input_dim, config.d_sae, config.lr, config.amp) == (16, 64, 1e-4, "bf16")
    config.save(tmp_path / "run.json")
    assert RunConfig.load(tmp_path / "run.json") == config
    assert pickle.loads(pickle.dumps(copy.deepcopy(config))) == config


def test_run_config_takes_one_configuration_with_flat_settings_of_the_other():
    sae = SAEConfig(k=4)
    assert RunConfig(sae=sae, lr=0.1) == RunConfig(sae=sae, train=TrainConfig(lr=0.1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RunConfig(learnin_rate=1), ValueError, "'learnin_rate' .did you mean"),
        (lambda: RunConfig(sae=SAEConfig(), k=4), ValueError, "k: give settings of sae in it"),
        (lambda: RunConfig(lr=1, learning_rate=1), ValueError, "lr is another name"),
        (lambda: RunConfig(k=0), ValueError, "k must be at least 1, got 0"),
        (lambda: RunConfig().kk, AttributeError, "no attribute 'kk'"),
        (lambda: SAEConfig(lr=1), TypeError, "lr is a setting of TrainConfig.*RunConfig takes"),
        (lambda: TrainConfig(k=1), TypeError, "k is a setting of SAEConfig.*RunConfig takes"),
        (lambda: SAEConfig(kk=1), TypeError, "SAEConfig has no setting 'kk'"),
    ],
)
def test_a_setting_in_the_wrong_place_is_named_with_the_right_one(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_trainer_takes_a_run_config_alone():
    rows = torch.randn(64, 16)
    settings = FLAT | {"max_steps": 2, "no_wandb": True}
    trainer = Trainer(RunConfig(**settings), data=rows, show_progress=False)
    trainer.train()
    assert (trainer.step, trainer.sae.config.decorrelation_coeff) == (2, 0.2)
    with pytest.raises(ValueError, match="train_config must be left out beside a RunConfig"):
        Trainer(RunConfig(), TrainConfig(), data=rows)
    with pytest.raises(ValueError, match="train_config is missing"):
        Trainer(SAEConfig(), data=rows)
