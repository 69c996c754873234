import ast
import dataclasses
import inspect
import itertools
import typing

import pytest

from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.config.model_text import FromModelConfig
from sae_fast.config.setting import Rules, rules_of


def test_d_sae_is_the_default_expansion_of_d_in():
    assert SAEConfig(d_in=384).d_sae == 8 * 384


def test_d_sae_follows_the_expansion_factor():
    assert SAEConfig(d_in=384, expansion_factor=2.5).d_sae == 960


def test_sizes_stay_open_until_d_in_is_known():
    config = SAEConfig(expansion_factor=4)
    assert not config.is_complete
    assert config.with_d_in(16) == SAEConfig(d_in=16, d_sae=64, expansion_factor=4, k=32)
    assert config.with_d_in(16).is_complete


def test_defaults_of_the_selection_are_set_once_the_sizes_are_known():
    assert (SAEConfig().k, SAEConfig().aux_k_coeff) == (None, None)
    config = SAEConfig(d_in=16)
    assert (config.k, config.aux_k_coeff) == (32, 1 / 32)
    assert SAEConfig(d_in=2, d_sae=8).k == 8
    assert SAEConfig(d_in=16, aux_k_coeff=0).aux_k_coeff == 0.0


@pytest.mark.parametrize(
    ("d_sae", "prefixes"), [(64, (4, 8, 16, 32, 64)), (6, (1, 3, 6)), (1, (1,))]
)
def test_nested_dictionaries_double_in_size_by_default(d_sae, prefixes):
    config = SAEConfig(arch="matryoshka", d_in=4, d_sae=d_sae, k=1)
    assert config.matryoshka_prefixes == prefixes
    assert config.matryoshka_weights == (1.0,) * len(prefixes)


def test_relu_has_the_april_2024_recipe_unless_told_otherwise():
    config = SAEConfig(arch="relu", d_in=16)
    assert (config.l1_penalty_coeff, config.decoder_norm) == (5.0, "free")
    assert (config.decoder_init_norm, config.normalize_activations) == (0.1, "mean_scale")
    assert (config.k, config.aux_k_coeff) == (None, 0.0)
    assert SAEConfig(d_in=16).l1_penalty_coeff == 0.0
    assert SAEConfig(arch="relu", d_in=16, decoder_norm="unit").decoder_init_norm is None


def test_jumprelu_has_a_target_and_a_weight_for_its_penalty_unless_told_otherwise():
    config = SAEConfig(arch="jumprelu", d_in=16)
    assert (config.sparsity_penalty, config.target_l0) == ("l0_target", 32.0)
    assert (config.sparsity_penalty_coeff, config.decoder_norm) == (16.0, "unit")
    assert (config.decoder_init_norm, config.l1_penalty_coeff) == (None, 0.0)
    for penalty in ("l0", "tanh"):
        config = SAEConfig(arch="jumprelu", d_in=4000, sparsity_penalty=penalty)
        assert (config.sparsity_penalty_coeff, config.target_l0) == (10.0, None)


def test_default_penalties_weigh_as_much_beside_fvu_as_beside_the_squared_error():
    relu = SAEConfig(arch="relu", d_in=64, loss_fn="fvu")
    assert relu.l1_penalty_coeff == 5 / 64
    jumprelu = SAEConfig(arch="jumprelu", d_in=64, loss_fn="fvu")
    assert jumprelu.sparsity_penalty_coeff == 1
    tanh = SAEConfig(arch="jumprelu", d_in=64, loss_fn="fvu", sparsity_penalty="tanh")
    assert tanh.sparsity_penalty_coeff == 1 / 400


def test_config_of_another_width_is_refused():
    with pytest.raises(ValueError, match="d_in must be 32, the width of the activations, got 16"):
        SAEConfig(d_in=16).with_d_in(32)


def test_d_sae_that_contradicts_the_expansion_factor_is_refused():
    with pytest.raises(
        ValueError, match="expansion_factor must agree with d_sae = 100 at d_in = 16"
    ):
        SAEConfig(d_in=16, d_sae=100, expansion_factor=8)


def test_aliases_make_and_read_the_same_fields():
    config = SAEConfig(input_dim=16, num_latents=40)
    assert (config.d_in, config.d_sae, config.input_dim, config.num_latents) == (16, 40, 16, 40)
    assert TrainConfig(lr=1e-3) == TrainConfig(learning_rate=1e-3)


def test_alias_beside_its_field_is_refused():
    with pytest.raises(ValueError, match="input_dim is another name of d_in"):
        SAEConfig(input_dim=16, d_in=16)


@pytest.mark.parametrize(
    ("given", "amp", "precision"),
    [
        ("off", "off", "screened"),
        ("bf16", "bf16", "bf16"),
        ("fp16", "fp16", "fp16"),
        (True, "bf16", "bf16"),
        (False, "off", "screened"),
    ],
)
def test_use_amp_chooses_the_precision(given, amp, precision):
    config = TrainConfig(use_amp=given)
    assert (config.amp, config.precision) == (amp, precision)


def test_default_learning_rate_falls_with_the_root_of_the_dictionary():
    assert TrainConfig().peak_learning_rate(2**14) == pytest.approx(2e-4)
    assert TrainConfig().peak_learning_rate(2**12) == pytest.approx(4e-4)
    assert TrainConfig(lr=1e-3).peak_learning_rate(2**12) == 1e-3


BAD_SAE_VALUES = [
    (
        {"arch": "dense"},
        "arch must be one of 'topk', 'batch_topk', 'matryoshka', .*, got 'dense'",
    ),
    (
        {"arch": "relu", "k": 8},
        "k belongs to arch topk or batch_topk or matryoshka and .* arch relu, got 8",
    ),
    (
        {"arch": "relu", "aux_k_coeff": 0.1},
        "aux_k_coeff belongs to arch topk .* arch relu, got 0.1",
    ),
    ({"target_l0": 8.0}, "target_l0 belongs to arch relu .* with arch topk, got 8.0"),
    ({"arch": "jumprelu", "k": 8}, "k belongs to arch topk .* arch jumprelu, got 8"),
    (
        {"arch": "jumprelu", "l1_penalty_coeff": 2},
        "l1_penalty_coeff belongs to .* with arch jumprelu, got 2",
    ),
    (
        {"arch": "jumprelu", "sparsity_penalty": "tanh", "target_l0": 8},
        "target_l0 is for sparsity_penalty = 'l0_target' .* 'tanh', got 8",
    ),
    (
        {"arch": "jumprelu", "decoder_init_norm": 0.1},
        "decoder_init_norm is for decoder_norm = 'free'",
    ),
    ({"arch": "jumprelu", "jumprelu_bandwidth": 0}, "jumprelu_bandwidth must be greater than 0"),
    (
        {"arch": "jumprelu", "jumprelu_init_threshold": -0.1},
        "jumprelu_init_threshold must be at least 0, got -0.1",
    ),
    ({"arch": "jumprelu", "sparsity_penalty": "l2"}, "sparsity_penalty must be one of"),
    ({"arch": "gated", "sparsity_norm_p": 0.5}, "sparsity_norm_p belongs to arch relu"),
    ({"arch": "gated", "aux_k": 4}, "aux_k belongs to arch topk or batch_topk .* gated, got 4"),
    ({"arch": "relu", "sparsity_penalty": "l0"}, "sparsity_penalty belongs to arch jumprelu"),
    ({"decoder_norm": "free"}, "decoder_norm belongs to .* with arch topk, got 'free'"),
    ({"arch": "relu", "decoder_norm": "l2"}, "decoder_norm must be one of 'unit', 'free'"),
    (
        {"arch": "relu", "decoder_norm": "unit", "decoder_init_norm": 0.1},
        "decoder_init_norm is for decoder_norm = 'free' .* got 0.1",
    ),
    ({"arch": "relu", "decoder_init_norm": 0}, "decoder_init_norm must be greater than 0, got 0"),
    ({"arch": "relu", "sparsity_norm_p": 1.5}, "sparsity_norm_p must be above 0 and at most 1"),
    ({"arch": "relu", "target_l0": 0}, "target_l0 must be greater than 0, got 0"),
    ({"arch": "relu", "target_l0_rate": 0}, "target_l0_rate must be greater than 0, got 0"),
    (
        {"arch": "relu", "target_l0": 9, "d_sae": 8},
        "target_l0 must be at most d_sae = 8, got 9",
    ),
    (
        {"arch": "relu", "target_l0": 4, "l1_penalty_coeff": 0},
        "target_l0 leads l1_penalty_coeff, which must be greater than 0",
    ),
    ({"d_in": -1}, "d_in must be at least 1"),
    ({"d_in": "384"}, "d_in must be a whole number, got '384'"),
    ({"d_in": True}, "d_in must be a whole number, got True"),
    ({"d_sae": -5}, "d_sae must be at least 1"),
    ({"expansion_factor": 0}, "expansion_factor must be greater than 0, got 0"),
    (
        {"d_in": 16, "expansion_factor": 1e308},
        r"expansion_factor must be a factor of d_in to latents, got 1e\+308",
    ),
    ({"dead_after_tokens": 2**63}, "dead_after_tokens must be at most 9223372036854775807, got"),
    (
        {"expansion_factor": float("nan")},
        "expansion_factor must be a finite number or null, got nan",
    ),
    ({"d_in": 4, "expansion_factor": 0.01, "k": 1}, "expansion_factor must be large enough"),
    ({"k": 0}, "k must be at least 1, got 0"),
    ({"k": 65, "d_in": 8, "d_sae": 64}, "k must be at most d_sae = 64, got 65"),
    ({"k": 65, "d_sae": 64}, "k must be at most d_sae = 64, got 65"),
    ({"use_relu": False}, "use_relu must be true for arch 'topk', got False"),
    ({"use_relu": False, "arch": "slots"}, "use_relu must be true for arch 'slots', got False"),
    (
        {"use_relu": False, "arch": "relu", "target_l0": 4},
        "target_l0 must be left out without use_relu, where all latents are active, got 4",
    ),
    (
        {"subtract_b_dec": False, "transcoder": True},
        "subtract_b_dec must be left out with a transcoder, which subtracts nothing, got False",
    ),
    ({"reconstruction_coeff": -1}, "reconstruction_coeff must be at least 0, got -1"),
    ({"l1_penalty_coeff": -1}, "l1_penalty_coeff must be at least 0"),
    ({"decorrelation": "max"}, "decorrelation must be one of 'gram_scaled', 'gram_mean'"),
    ({"decorrelation_chunk": 1}, "decorrelation_chunk must be at least 2, got 1"),
    (
        {"decorrelation": "gram_sum"},
        "decorrelation = 'gram_sum' needs a decorrelation_coeff above 0",
    ),
    ({"decorrelation_coeff": float("inf")}, "decorrelation_coeff must be a finite number, got inf"),
    ({"probe_loss_coeff": -0.1}, "probe_loss_coeff must be at least 0, got -0.1"),
    ({"probe_labels": "labels/rule"}, "probe_labels = 'labels/rule' needs a probe_loss_coeff"),
    ({"probe_labels": ""}, "probe_labels must be a name, not an empty string, got ''"),
    ({"probe_task": "ranking"}, "probe_task must be one of 'classification', 'regression'"),
    ({"probe_classes": 1}, "probe_classes must be at least 2, got 1"),
    (
        {"probe_classes": 3, "probe_task": "regression"},
        "probe_classes must be left out with probe_task regression, got 3",
    ),
    ({"temporal_smoothness_coeff": -1}, "temporal_smoothness_coeff must be at least 0"),
    ({"aux_k_coeff": -1}, "aux_k_coeff must be at least 0"),
    ({"aux_k": 0}, "aux_k must be at least 1"),
    (
        {"matryoshka_prefixes": (4, 8)},
        "matryoshka_prefixes belongs to arch matryoshka and must be left out with arch topk",
    ),
    ({"arch": "matryoshka", "matryoshka_prefixes": ()}, "matryoshka_prefixes must be ascending"),
    (
        {"arch": "matryoshka", "matryoshka_prefixes": (0, 8)},
        r"matryoshka_prefixes must be ascending, from 1, got \(0, 8\)",
    ),
    (
        {"arch": "matryoshka", "matryoshka_prefixes": (4, 4, 8)},
        r"matryoshka_prefixes must be ascending, from 1, got \(4, 4, 8\)",
    ),
    (
        {"arch": "matryoshka", "matryoshka_prefixes": (4, 16), "d_sae": 8, "d_in": 2},
        r"matryoshka_prefixes must be sizes of which the last is d_sae = 8, got \(4, 16\)",
    ),
    (
        {"arch": "matryoshka", "matryoshka_prefixes": (2, 4), "d_sae": 8},
        r"matryoshka_prefixes must be sizes of which the last is d_sae = 8, got \(2, 4\)",
    ),
    (
        {"arch": "matryoshka", "matryoshka_prefixes": [4.0, 8]},
        "matryoshka_prefixes must be a list of values, each a whole number or null",
    ),
    (
        {"arch": "matryoshka", "matryoshka_prefixes": (4, 8), "matryoshka_weights": (1.0,)},
        r"matryoshka_weights must be 2 numbers of at least 0, got \(1.0,\)",
    ),
    (
        {"arch": "matryoshka", "matryoshka_prefixes": (4, 8), "matryoshka_weights": (1, -1)},
        "matryoshka_weights must be 2 numbers of at least 0",
    ),
    (
        {"arch": "batch_topk", "activation": "groupmax"},
        "activation belongs to arch topk and must be left out with arch batch_topk",
    ),
    (
        {"arch": "matryoshka", "multi_topk": True},
        "multi_topk belongs to arch topk and must be left out with arch matryoshka, got True",
    ),
    ({"activation": "relu"}, "activation must be one of 'topk', 'abs_topk', 'groupmax'"),
    (
        {"activation": "groupmax", "d_in": 4, "d_sae": 10, "k": 4},
        "k must be a divisor of d_sae = 10 with groupmax, got 4",
    ),
    (
        {"activation": "groupmax", "multi_topk": True},
        "multi_topk must be left out with activation groupmax",
    ),
    ({"multi_topk": True, "multi_topk_coeff": -1}, "multi_topk_coeff must be at least 0"),
    ({"dead_after_tokens": 0}, "dead_after_tokens must be at least 1, got 0"),
    (
        {"normalize_activations": "layer"},
        "normalize_activations must be one of 'mean_scale', 'none', 'layer_norm', 'constant_norm'",
    ),
    ({"decoder_init": "x"}, "decoder_init must be one of"),
    ({"b_dec_init": "x"}, "b_dec_init must be one of"),
]


@pytest.mark.parametrize(("values", "message"), BAD_SAE_VALUES)
def test_bad_model_value_names_field_and_value(values, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig(**values)


BAD_TRAIN_VALUES = [
    ({"shard_dir": ""}, "shard_dir must be a name"),
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"batch_size": 1.5}, "batch_size must be a whole number or null, got 1.5"),
    ({"grad_acc_steps": 0}, "grad_acc_steps must be at least 1"),
    ({"max_epochs": 0}, "max_epochs must be at least 1"),
    ({"max_steps": 0}, "max_steps must be at least 1"),
    ({"max_tokens": -1}, "max_tokens must be at least 1"),
    ({"learning_rate": 0}, "learning_rate must be greater than 0"),
    ({"lr": "fast"}, "learning_rate must be a finite number or null, got 'fast'"),
    ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
    ({"k_anneal_start": 0}, "k_anneal_start must be at least 1, got 0"),
    ({"k_anneal_start": 9, "k_anneal_steps": -1}, "k_anneal_steps must be at least 0, got -1"),
    ({"k_anneal_steps": 9}, "k_anneal_steps = 9 needs k_anneal_start"),
    ({"decay_fraction": 1.5}, "decay_fraction must be between 0 and 1, got 1.5"),
    ({"betas": (0.9, 1.0)}, "betas must be two numbers from 0 to below 1"),
    ({"betas": (0.9,)}, "betas must be 2 values, each a finite number"),
    ({"eps": 0}, "eps must be greater than 0"),
    ({"weight_decay": -1}, "weight_decay must be at least 0"),
    ({"weight_decay": 0.1}, "weight_decay = 0.1 needs optimizer = 'adamw'"),
    (
        {"optimizer": "lion"},
        "optimizer must be one of 'adam', .*, 'signum', 'schedule_free_signum', got 'lion'",
    ),
    (
        {"momentum": 0.5},
        "momentum = 0.5 needs optimizer = 'sgd', 'signum' or 'schedule_free_signum'",
    ),
    (
        {"optimizer": "schedule_free_signum", "momentum": 0},
        "momentum must be above 0 where optimizer is 'schedule_free_signum': .*, got 0",
    ),
    (
        {"optimizer": "schedule_free_signum", "average_decay": 0.9},
        "average_decay = 0.9 needs another optimizer than 'schedule_free_signum'",
    ),
    (
        {"optimizer": "schedule_free_signum", "betas": (0.8, 0.9)},
        r"betas = .0.8, 0.9. needs optimizer = 'adam' or 'adamw'",
    ),
    ({"optimizer": "sgd", "momentum": 1}, "momentum must be from 0 to below 1, got 1"),
    ({"optimizer": "sgd", "betas": (0.8, 0.9)}, "betas = .* needs optimizer = 'adam' or 'adamw'"),
    ({"optimizer": "signum", "eps": 1e-6}, "eps = 1e-06 needs optimizer = 'adam' or 'adamw'"),
    ({"grad_clip": -1}, "grad_clip must be at least 0"),
    ({"amp": "int8"}, "amp must be one of 'off', 'bf16', 'fp16', got 'int8'"),
    ({"seed": -1}, "seed must be at least 0"),
    ({"pool_rows": 0}, "pool_rows must be at least 1"),
    ({"log_every": 0}, "log_every must be at least 1"),
    ({"eval_every": -1}, "eval_every must be at least 0"),
    ({"checkpoint_every": -1}, "checkpoint_every must be at least 0"),
    ({"seed": 10**400}, "seed must be at most 9223372036854775807, got a number of 1,329 bits"),
    ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
    ({"num_threads": 0}, "num_threads must be between 1 and 4096, got 0"),
    ({"num_threads": 10**9}, "num_threads must be between 1 and 4096, got 1000000000"),
    ({"no_wandb": 1}, "no_wandb must be true or false, got 1"),
]


@pytest.mark.parametrize(("values", "message"), BAD_TRAIN_VALUES)
def test_bad_training_value_names_field_and_value(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "adam"}])
@pytest.mark.parametrize("make", [TrainConfig.from_dict, lambda values: TrainConfig(**values)])
def test_weight_decay_needs_an_optimizer_that_has_it_in_files_and_keywords(optimizer, make):
    with pytest.raises(ValueError, match=r"weight_decay = 0\.1 needs optimizer = 'adamw'"):
        make({"weight_decay": 0.1, **optimizer})


def test_weight_decay_of_a_run_from_before_there_was_a_choice_is_that_of_adamw():
    assert TrainConfig.from_saved({"weight_decay": 0.1}).optimizer == "adamw"
    assert TrainConfig.from_saved({"weight_decay": 0.0}).optimizer == "adam"


IDLE = [
    ({"multi_topk_coeff": 0.4}, "multi_topk_coeff = 0.4 needs multi_topk"),
    ({"multi_topk": True, "multi_topk_coeff": 0}, "multi_topk = True needs a multi_topk_coeff abo"),
    ({"arch": "relu", "target_l0_rate": 0.1}, "target_l0_rate = 0.1 needs target_l0"),
    (
        {"arch": "relu", "l1_penalty_coeff": 0, "sparsity_norm_p": 0.5},
        "sparsity_norm_p = 0.5 needs an l1_penalty_coeff above 0",
    ),
    ({"decorrelation": "gram_mean"}, "decorrelation = 'gram_mean' needs a decorrelation_coeff"),
    ({"decorrelation_chunk": 9}, "decorrelation_chunk = 9 needs decorrelation = 'chunked_max'"),
    (
        {"decorrelation_chunk": 9, "decorrelation_coeff": 1, "decorrelation": "gram_sum"},
        "decorrelation_chunk = 9 needs decorrelation = 'chunked_max'",
    ),
    ({"correlation_pairs": "sum"}, "correlation_pairs = 'sum' needs an independence_coeff or"),
    ({"probe_task": "regression"}, "probe_task = 'regression' needs a probe_loss_coeff above 0"),
    ({"probe_classes": 3}, "probe_classes = 3 needs a probe_loss_coeff above 0"),
    ({"aux_k": 3, "aux_k_coeff": 0}, "aux_k = 3 needs an aux_k_coeff above 0"),
    (
        {"arch": "jumprelu", "jumprelu_tanh_scale": 2.0},
        "jumprelu_tanh_scale = 2.0 needs sparsity_penalty = 'tanh'",
    ),
    (
        {"arch": "jumprelu", "sparsity_penalty": "l0", "sparsity_penalty_coeff": 0},
        "sparsity_penalty = 'l0' needs a sparsity_penalty_coeff above 0",
    ),
    (
        {"arch": "jumprelu", "target_l0": 3, "sparsity_penalty_coeff": 0},
        "target_l0 = 3.0 needs a sparsity_penalty_coeff above 0",
    ),
    (
        {"arch": "slots", "slots_mode": "separate_activation", "value_hidden": 9},
        "value_hidden = 9 needs slots_mode = 'joint' or 'separate_value'",
    ),
    (
        {"arch": "slots", "slots_mode": "separate_value", "alignment_after_relu": True},
        "alignment_after_relu = True needs an alignment_coeff above 0",
    ),
    (
        {"arch": "slots", "slots_mode": "separate_value", "reconstruction_coeff": 2.0},
        "reconstruction_coeff = 2.0 needs slots_mode = 'joint' or 'separate_activation'",
    ),
    ({"pin": True}, "pin = True needs keep_in_memory"),
    ({"start_from_elsewhere": True}, "start_from_elsewhere = True needs start_from"),
]


@pytest.mark.parametrize("sizes", [{}, {"d_in": 16}, {"d_in": 16, "d_sae": 64}])
@pytest.mark.parametrize(("given", "message"), IDLE)
def test_a_setting_without_effect_is_refused_with_what_it_needs(given, message, sizes):
    for make in (lambda values: RunConfig(**values), RunConfig.from_dict):
        with pytest.raises(ValueError, match=message):
            make({**sizes, **given})


@pytest.mark.parametrize(("given", "message"), IDLE)
def test_a_saved_configuration_is_read_without_what_has_no_effect(given, message):
    name = message.partition(" ")[0]
    config = RunConfig.from_saved({"d_in": 16, **given})
    assert getattr(config, name) != given[name]
    assert RunConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("mode", [None, "joint", "separate_activation", "separate_value"])
@pytest.mark.parametrize("sizes", [{}, {"d_in": 16}, {"d_in": 2, "d_sae": 5}])
@pytest.mark.parametrize("arch", ["topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated"])
def test_what_is_filled_in_is_read_again_also_where_sizes_are_open(arch, sizes, mode):
    changes = {"arch": arch} if mode is None else {"arch": "slots", "slots_mode": mode}
    for off in ({}, {"decorrelation_coeff": 0.0}, {"l1_penalty_coeff": 0.0}):
        if arch == "jumprelu" and mode is None:
            off = {"sparsity_penalty_coeff": 0.0} if off else {}
        config = RunConfig(**sizes, **changes, **off)
        values = config.to_dict()
        assert RunConfig.from_dict(values) == config
        values["sae"]["d_in"] = 0  # a resumed run takes it from the data
        RunConfig.from_dict(values)


def test_switching_off_what_there_is_not_is_no_mistake():
    RunConfig(no_wandb=True, cuda_graph=False, aux_k_coeff=0.0, multi_topk_coeff=0.0, pin=False)
    RunConfig(arch="relu", aux_k_coeff=0.0, probe_loss_coeff=0.0, weight_decay=0.0)


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        ("adam", 4e-4),
        ("adamw", 4e-4),
        ("signum", 2e-4),
        ("sgd", 0.1),
        ("schedule_free_signum", 2e-3),
    ],
)
def test_default_learning_rate_is_that_of_the_optimizer(optimizer, rate):
    assert TrainConfig(optimizer=optimizer).peak_learning_rate(2**12) == pytest.approx(rate)
    assert TrainConfig(optimizer=optimizer, lr=0.5).peak_learning_rate(2**12) == 0.5


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SAEConfig().k = 3


@pytest.mark.parametrize("config", [SAEConfig, TrainConfig, RunConfig])
def test_every_field_has_a_help_text(config):
    sources = [base for base in config.__mro__ if dataclasses.is_dataclass(base)]
    bodies = [ast.parse(inspect.getsource(source)).body[0].body for source in sources]
    documented = {
        node.target.id
        for body in bodies
        for node, following in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(getattr(following, "value", None), ast.Constant)
    }
    assert {item.name for item in dataclasses.fields(config)} <= documented


def test_no_field_name_occurs_in_both_sections():
    names = [
        {item.name for item in dataclasses.fields(config)} | set(config.aliases)
        for config in (SAEConfig, TrainConfig)
    ]
    assert not names[0] & names[1]


def test_a_configuration_knows_what_was_asked_for_beside_what_follows_from_it():
    config = SAEConfig(arch="jumprelu", input_dim=16)
    assert config.given == {"arch": "jumprelu", "d_in": 16}
    assert (config.d_sae, config.target_l0) == (128, 32.0)
    asked = SAEConfig(arch="slots", n_relations=3)
    sized = asked.resolve(d_in=16, labels={"n_answers": 5})
    assert (asked.d_sae, asked.slots_mode, asked.n_answers) == (0, None, None)
    assert (sized.d_sae, sized.slots_mode, sized.n_answers) == (128, "joint", 5)
    assert sized == SAEConfig(arch="slots", n_relations=3, d_in=16, n_answers=5)
    assert asked.resolve(labels={"n_answers": 5}) == SAEConfig(
        arch="slots", n_relations=3, n_answers=5
    )


def test_resolving_again_starts_from_what_was_asked_for():
    config = SAEConfig(d_in=16, k=4)
    assert config.resolve(16) == config.resolve(16).resolve(16) == config
    assert config.resolve(16).resolve().given == {"d_in": 16, "k": 4, "d_out": 0}


RANGES = [
    (Rules(at_least=1), (1, 2.5, None, True), (0, -1)),
    (Rules(above=0), (0.5,), (0, -1.0)),
    (Rules(above=0, at_most=1), (0.5, 1), (0, 1.5)),
    (Rules(at_least=0, below=1), (0, 0.9, (0.0, 0.5)), (1, -0.1, (0.5, 1.0))),
    (Rules(nonempty=True), ("x", None), ("",)),
    (Rules(), ("", -1, (-1,)), ()),
]


@pytest.mark.parametrize(("rules", "inside", "outside"), RANGES)
def test_rules_admit_what_lies_in_their_range(rules, inside, outside):
    assert all(map(rules.admits, inside))
    assert not any(map(rules.admits, outside))


@pytest.mark.parametrize("config", [SAEConfig, TrainConfig])
def test_rules_name_architectures_and_settings_that_there_are(config):
    architectures = typing.get_args(typing.get_type_hints(SAEConfig)["arch"])
    decided = {item.name for item in dataclasses.fields(FromModelConfig)}
    for name, rules in rules_of(config).items():
        assert set(rules.arch) <= set(architectures), name
        assert {rules.decided_by} - {""} <= decided, name
        assert not (rules.shards_only and rules.decided_by), name
