"""Settings for well-known models by name: `--preset NAME` of the command line.

Where the numbers of modular_addition come from: learning_rate 3e-4 and batch_size 4096 were
specified with the preset. d_sae, k and tokens were chosen here, and the warm-up, of which no number
was recorded, is the default of every training, 5 % of the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from sae_fast.config.run import RunConfig
from sae_fast.config.sae import SAEConfig, without_other_size
from sae_fast.config.train import TrainConfig


@dataclass(frozen=True)
class Preset:
    """Settings by name; all others have their defaults.

    Attributes:
        about: the model it is for, in one line.
        tokens: the number of tokens that such a model is usually trained on.
        sae: settings of SAEConfig.
        train: settings of TrainConfig.
        text: settings of FromModelConfig, for a training straight from the model.
    """

    about: str
    tokens: int
    sae: dict[str, Any]
    train: dict[str, Any]
    text: dict[str, Any] = field(default_factory=dict)

    def configs(self) -> tuple[SAEConfig, TrainConfig]:
        """Return the configurations of the preset."""
        return SAEConfig(**self.sae), TrainConfig(**self.train)


def gpt2_sae_config(expansion_factor: float | None = None, **settings: Any) -> RunConfig:
    """Return the preset gpt2 as a RunConfig, with `settings` in place of its own."""
    return _complete("gpt2", expansion_factor, settings)


def gpt2_medium_sae_config(expansion_factor: float | None = None, **settings: Any) -> RunConfig:
    """Return the preset gpt2_medium as a RunConfig, with `settings` in place of its own."""
    return _complete("gpt2_medium", expansion_factor, settings)


def pythia_1_4b_sae_config(expansion_factor: float | None = None, **settings: Any) -> RunConfig:
    """Return the preset pythia_1_4b as a RunConfig, with `settings` in place of its own."""
    return _complete("pythia_1_4b", expansion_factor, settings)


def _complete(name: str, expansion_factor: float | None, settings: dict[str, Any]) -> RunConfig:
    """Return a preset with other settings in place of its own, and its learning rate filled in."""
    if expansion_factor is not None:
        settings = {**settings, "expansion_factor": expansion_factor}
    chosen = preset(name)
    aliases = {**SAEConfig.aliases, **TrainConfig.aliases}
    given = {aliases.get(key, key): value for key, value in settings.items()}
    defaults = without_other_size({**chosen.sae, **chosen.train}, given)
    config = RunConfig(**{key: defaults[key] for key in defaults.keys() - given.keys()}, **settings)
    rate = config.train.peak_learning_rate(config.sae.d_sae)
    return replace(config, train=replace(config.train, learning_rate=rate))


PRESETS = {
    "minilm": Preset(
        "MiniLM-L6's hidden states, as in the demo",
        tokens=10_000_000,
        sae={"d_in": 384, "expansion_factor": 8, "k": 32},
        train={"batch_size": 4096, "learning_rate": 1e-3},
    ),
    "gpt2": Preset(
        "GPT-2 small's residual stream, 8 latents a dimension",
        tokens=300_000_000,
        sae={"d_in": 768, "expansion_factor": 8.0, "k": 32},
        train={"batch_size": 4096},
        text={"batch_size": 4, "ctx_len": 1024},
    ),
    "gpt2_medium": Preset(
        "GPT-2 medium's residual stream, 4 latents a dimension",
        tokens=300_000_000,
        sae={"d_in": 1024, "expansion_factor": 4.0, "k": 32},
        train={"batch_size": 4096},
        text={"batch_size": 4, "ctx_len": 1024},
    ),
    "pythia_1_4b": Preset(
        "Pythia-1.4B's residual stream, 4 latents a dimension",
        tokens=500_000_000,
        sae={"d_in": 2048, "expansion_factor": 4.0, "k": 32},
        train={"batch_size": 8 * 2048},
        text={"batch_size": 8, "ctx_len": 2048},
    ),
    "llama_3_1_8b": Preset(
        "Llama-3.1-8B's residual stream, the size of Llama Scope's 8x dictionaries",
        tokens=1_000_000_000,
        sae={"d_in": 4096, "expansion_factor": 8, "k": 50},
        train={"batch_size": 4096},
    ),
    "deepseek_r1_llama_8b_paper": Preset(
        "the recipe of arXiv:2503.18878: ReLU with an L1 penalty weighted by the decoder's norms",
        tokens=1_000_000_000,
        sae={"arch": "relu", "d_in": 4096, "d_sae": 65536, "l1_penalty_coeff": 5.0},
        train={
            "batch_size": 4096,
            "learning_rate": 5e-5,
            "betas": (0.9, 0.999),
            "decay_fraction": 0.2,
            "grad_clip": 1.0,
        },
    ),
    "bert_base_topk": Preset(
        "BERT-base's hidden states, a wide dictionary with many active latents",
        tokens=100_000_000,
        sae={"d_in": 768, "expansion_factor": 32, "k": 192},
        train={"batch_size": 2048},
    ),
    "modular_addition": Preset(
        "the hidden layer of a small transformer that adds modulo a prime",
        tokens=5_000_000,
        sae={"d_in": 128, "d_sae": 1024, "k": 32},
        train={"batch_size": 4096, "learning_rate": 3e-4},
    ),
    "slots_biography": Preset(
        "AlignSAE, arXiv:2512.02004: 100,000 free slots and one for each of 6 relations, on GPT-2",
        tokens=150 * 24_000,
        sae={"arch": "slots", "d_in": 768, "d_sae": 100_006, "n_relations": 6},
        train={
            "batch_size": 64,
            "learning_rate": 1e-3,
            "optimizer": "adamw",
            "weight_decay": 0.01,
            "warmup_steps": 0,
            "sparsity_warmup_steps": 0,
            "decay_fraction": 0.0,
            "reconstruction_epochs": 50.0,
            "max_epochs": 150,
        },
    ),
}


def preset(name: str) -> Preset:
    """Return the preset of this name; raise ValueError with the names that there are."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
