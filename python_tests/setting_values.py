"""Values of every setting that differ from its default, with other settings that they need.

A setting that is not listed gets values of its type, so that tests try new settings too.
"""

import typing

import torch

from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config import SAEConfig
from sae_fast.config.fields import field_types

ARCHITECTURES = typing.get_args(field_types(SAEConfig)["arch"])
D_IN, D_SAE, D_OUT, N_TOKENS = 12, 40, 7, 30
N_RELATIONS, N_ANSWERS = 3, 5
SIZES = {"d_in": D_IN, "d_sae": D_SAE, "dead_after_tokens": 100}
# The settings of a small model of each architecture.
BASES = {arch: {"arch": arch, **SIZES} for arch in ARCHITECTURES}
for _arch in ("topk", "batch_topk", "matryoshka"):
    BASES[_arch]["k"] = 5
BASES["slots"] |= {"n_relations": N_RELATIONS, "n_answers": N_ANSWERS, "value_hidden": 7}

TRANSCODER = {"transcoder": True, "d_out": D_OUT}
PROBE = {"probe_loss_coeff": 0.8, "probe_labels": "labels/rule", "probe_classes": 3}
SPLIT = {"orthogonality_coeff": 0.7, "correlation_split": 25}
CHUNKED = {"decorrelation_coeff": 2.0, "decorrelation": "chunked_max", "decorrelation_chunk": 9}
FREE = {"decoder_norm": "free", "decoder_init_norm": 0.5}
JUMP_TANH = {"sparsity_penalty": "tanh", "jumprelu_tanh_scale": 2.0}

# By setting, dictionaries with a value and the other settings that it needs.
MODEL_VALUES = {
    "transcoder": [TRANSCODER],
    "d_out": [{"d_out": D_OUT}],
    "skip_connection": [{**TRANSCODER, "skip_connection": True}],
    "expansion_factor": [{"expansion_factor": 2.0}],
    "k": [{"k": 8}],
    "matryoshka_prefixes": [{"matryoshka_prefixes": (7, 20, D_SAE)}],
    "matryoshka_weights": [{"matryoshka_weights": (0.5, 1.0, 2.0, 1.0, 0.5)}],
    "multi_topk_coeff": [{"multi_topk": True, "multi_topk_coeff": 0.4}],
    "loss_fn": [{"loss_fn": "fvu"}, {"loss_fn": "ce"}, {"loss_fn": "kl"}],
    "sparsity_norm_p": [{"sparsity_norm_p": 0.5}],
    "target_l0": [{"target_l0": 6.0}],
    "target_l0_rate": [{"target_l0": 6.0, "target_l0_rate": 0.1}],
    "decorrelation": [{"decorrelation_coeff": 2.0, "decorrelation": "gram_sum"}, CHUNKED],
    "decorrelation_chunk": [CHUNKED],
    "jumprelu_tanh_scale": [JUMP_TANH],
    "dead_after_tokens": [{"dead_after_tokens": 60}],
    "decoder_norm": [FREE, {"decoder_norm": "unit"}],
    "decoder_init_norm": [FREE],
    "probe_loss_coeff": [PROBE],
    "probe_labels": [PROBE],
    "probe_classes": [PROBE],
    "probe_task": [
        {"probe_loss_coeff": 0.8, "probe_labels": "labels/mood", "probe_task": "regression"}
    ],
    "orthogonality_coeff": [{"orthogonality_coeff": 0.7}, SPLIT],
    "correlation_pairs": [{"independence_coeff": 0.4, "correlation_pairs": "sum"}],
    "correlation_split": [SPLIT],
    "n_relations": [{"n_relations": N_RELATIONS + 1}],
    "n_answers": [{"n_answers": N_ANSWERS + 1}],
    "relation_labels": [{"relation_labels": "labels/other_relation"}],
    "answer_labels": [{"answer_labels": "labels/other_answer"}],
    "value_hidden": [{"value_hidden": 9}],
    "alignment_after_relu": [{"alignment_after_relu": True}],
    "slots_l1_mean": [{"slots_l1_mean": True}],
}
TRAIN_VALUES = {
    "grad_acc_steps": [{"grad_acc_steps": 2}],
    "reconstruction_epochs": [{"reconstruction_epochs": 0.5}],
    "learning_rate": [{"learning_rate": 3e-3}],
    "warmup_steps": [{"warmup_steps": 2}],
    "sparsity_warmup_steps": [{"sparsity_warmup_steps": 2}],
    "k_anneal_start": [{"k_anneal_start": 20}],
    "k_anneal_steps": [{"k_anneal_start": 20, "k_anneal_steps": 2}],
    "decay_fraction": [{"decay_fraction": 1.0}],
    "betas": [{"betas": (0.5, 0.9)}],
    "eps": [{"eps": 1e-3}],
    "momentum": [{"momentum": 0.5}, {"momentum": 0.5, "optimizer": "sgd"}],
    "weight_decay": [{"weight_decay": 0.1}, {"weight_decay": 0.1, "optimizer": "adamw"}],
    "grad_clip": [{"grad_clip": 1e-3}],
    "average_decay": [{"average_decay": 0.5}],
    "max_epochs": [{"max_epochs": 2}],
    "seed": [{"seed": 3}],
    "shuffle_seed": [{"shuffle_seed": 3}],
    "dead_percentage_threshold": [{"dead_percentage_threshold": 0.5}],
    "num_threads": [{"num_threads": 1}],
    "pool_rows": [{"pool_rows": 64}],
    "skip_nonfinite": [{"skip_nonfinite": True}],
}


def values_of(config, name):
    """Return dictionaries with a value other than the default, and the settings it needs."""
    listed = {**MODEL_VALUES, **TRAIN_VALUES}
    if name in listed:
        return listed[name]
    default = getattr(config, name, None)
    return [{name: value} for value in _values(field_types(config)[name], default)]


def _values(kind, default):
    """Return values of a type other than the default."""
    arms = [arm for arm in typing.get_args(kind) or (kind,) if arm is not type(None)]
    if typing.get_origin(kind) is typing.Literal:
        return [value for value in arms if value != default]
    kind = arms[0]
    if typing.get_origin(kind) is typing.Literal:
        return [value for value in typing.get_args(kind) if value != default]
    if kind is bool:
        return [not default]
    if kind is float:
        return [0.6]
    return [3] if kind is int else []


def with_all(*dictionaries):
    """Return the settings of all dictionaries, or None if two of them contradict each other."""
    joined = {}
    for settings in dictionaries:
        for name, value in settings.items():
            if joined.setdefault(name, value) != value:
                return None
    return joined


def over_base(arch, settings):
    """Return a small model's settings, updated by the given ones."""
    base = dict(BASES[arch])
    if "expansion_factor" in settings:
        base.pop("d_sae")
    return {**base, **settings}


def columns_of(sae, n_tokens=N_TOKENS):
    """Return the further arguments of training_loss that a model's terms need."""
    generator = torch.Generator().manual_seed(5)

    def whole(top, lowest=-1):
        return torch.randint(lowest, top, (n_tokens,), generator=generator)

    config, columns = sae.config, {}
    if config.has_probe:
        is_regression = config.probe_task == "regression"
        columns["labels"] = whole(3).float() if is_regression else whole(3)
    if config.temporal_smoothness_coeff > 0:
        columns["starts"] = whole(4, 0) == 0
    if config.arch == "slots":
        columns |= {"relations": whole(N_RELATIONS), "answers": whole(N_ANSWERS)}
    return columns


def make_model(fields, dead=()):
    """Make a small model without zero parameters, whose latents `dead` have long been silent."""
    sae = SparseAutoencoder(SAEConfig(**fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        if sae.architecture.unit_norm:
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.clamp_parameters_()
    sae.tokens_since_fired[list(dead)] = 1000
    return sae
