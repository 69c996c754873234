"""Settings for well-known models: `--preset NAME`, and `python -m sae_fast.presets`.

The command lists them with the memory that each needs; `--measure NAME` makes a few steps of one on
random activations and tells from them how long its training takes on this machine.

Where the numbers of modular_addition come from: learning_rate 3e-4 and batch_size 4096 were
specified with the preset. d_sae, k and tokens were chosen here, and the warm-up, of which no number
was recorded, is the default of every training, 5 % of the run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sae_fast.command_line import EXIT_BAD_INPUT, refusal
from sae_fast.config import RunConfig, SAEConfig, TrainConfig
from sae_fast.dictionary_config import without_other_size
from sae_fast.output_streams import run_command

if TYPE_CHECKING:
    from sae_fast.training.trainer import Trainer

MEASURED_STEPS = 3


@dataclass(frozen=True)
class Preset:
    """Settings by name; what is not among them has its default.

    Attributes:
        about: what it is for, one line.
        tokens: what such a model is usually trained on.
        sae: of SAEConfig.
        train: of TrainConfig.
        text: of FromModelConfig, in a training straight from the model.
    """

    about: str
    tokens: int
    sae: dict[str, Any]
    train: dict[str, Any]
    text: dict[str, Any] = field(default_factory=dict)

    def configs(self) -> tuple[SAEConfig, TrainConfig]:
        """The configurations of the preset."""
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
    """The preset of a name with other settings in place of its own, and its learning rate."""
    if expansion_factor is not None:
        settings = {**settings, "expansion_factor": expansion_factor}
    chosen = preset(name)
    aliases = {**SAEConfig.aliases, **TrainConfig.aliases}
    given = {aliases.get(key, key): value for key, value in settings.items()}
    own = without_other_size({**chosen.sae, **chosen.train}, given)
    config = RunConfig(**{key: own[key] for key in own.keys() - given.keys()}, **settings)
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
        train={"batch_size": 4096, "learning_rate": 5e-5, "grad_clip": 1.0},
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
    """The preset of this name; raises ValueError with the names that there are."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def first_steps(name: str, steps: int) -> Trainer:
    """A trainer that makes so many steps of a preset's training, on random rows."""
    from sae_fast.training.trainer import Trainer

    sae, train = preset(name).configs()
    train = replace(train, max_steps=steps, log_every=1, eval_every=0, checkpoint_every=0)
    rows = torch.randn(train.batch_size, sae.d_in)
    columns = {}
    if sae.arch == "slots":  # the reconstruction alone would not be the whole step
        train = replace(train, reconstruction_epochs=0.0)
        relations = torch.arange(train.batch_size) % (sae.n_relations or 1)
        columns = {str(sae.relation_labels): relations, str(sae.answer_labels): relations}
    return Trainer(sae, train, data=rows, columns=columns, show_progress=False)


def measured_tokens_per_second(name: str, steps: int = MEASURED_STEPS) -> float:
    """Tokens a second in `steps` steps of a preset's training on random rows, after one more."""
    trainer = first_steps(name, steps + 1)
    trainer.train()
    milliseconds = [float(row["time_per_step_ms"]) for row in trainer.history[1:]]
    return 1000 * trainer.train_config.batch_size * len(milliseconds) / sum(milliseconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if not arguments:
            print(_listing())
        elif len(arguments) == 2 and arguments[0] == "--measure":
            print(_duration(arguments[1]))
        else:
            raise ValueError("usage: python -m sae_fast.presets [--measure NAME]")
    except Exception as error:
        print(refusal(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _listing() -> str:
    from sae_fast.ops.native import build_info
    from sae_fast.training.memory_plan import plan_memory

    native = build_info()["backend"] == "native"
    lines, width = [], max(map(len, PRESETS))
    for name, settings in PRESETS.items():
        sae, train = settings.configs()
        plan = plan_memory(sae, train, native=native, pool_bytes=0)
        needed = sum(plan.parts.values()) / 2**30
        sizes = f"{sae.arch}, {sae.d_in} to {sae.d_sae:,}"
        memory = f"{needed:6.2f} GiB beside the data"
        lines.append(f"{name:<{width}} {sizes:<24} {memory}  {settings.about}")
    lines.append("How long one takes on this machine: python -m sae_fast.presets --measure NAME")
    return "\n".join(lines)


def _duration(name: str) -> str:
    rate = measured_tokens_per_second(name)
    tokens = preset(name).tokens
    hours = tokens / rate / 3600
    return f"{name}: {rate:,.0f} tokens/s here; {tokens:,} tokens take {hours:,.1f} hours"


if __name__ == "__main__":
    sys.exit(run_command(main))
