"""`train_from_model`: training on the activations of a model in memory, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from sae_fast.activations.capture import Documents
from sae_fast.activations.capture.language_model import loaded_language_model
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.autoencoder.loss_terms import LossTerm
from sae_fast.config import RunConfig, TrainConfig
from sae_fast.config.fields import reject_unknown_keys
from sae_fast.config.model_text import (
    DEFAULT_K,
    SAE_DEFAULTS,
    TRAIN_DEFAULTS,
    FromModelConfig,
)
from sae_fast.config.setting import rules_of
from sae_fast.training.callbacks import Callback
from sae_fast.training.from_model import open_from_model


def train_from_model(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | str,
    config: RunConfig | None = None,
    *,
    directory: str | Path | None = None,
    loss_terms: Sequence[LossTerm] = (),
    callbacks: Sequence[Callback] = (),
    show_progress: bool = True,
    **settings: Any,
) -> dict[str, SparseAutoencoder]:
    """Train an autoencoder on the activations of each layer asked for; return them by hook point.

    `train_from_model(model, tokenizer, texts, layers=[3])["residual.3"]` is the
    autoencoder of the residual stream after block 3.

    Args:
        model: a transformers model; it is left as it was, and trained on where it is.
        tokenizer: the model's.
        texts: the documents, or the name of a dataset.
        config: of the autoencoders and their training, but for their batches; None: the defaults of
            a training straight from a model.
        directory: where the runs are written, each in a folder of its name; None: nowhere.
        loss_terms: of every training, see `Trainer`.
        callbacks: called by every training with its trainer, see `Trainer`; `trainer.sae.origin`
            says of which hook point it is. `trainer.stop()` ends all trainings.
        show_progress: whether to show a progress bar.
        settings: of FromModelConfig, such as layers, hook_points (of which one may stand by
            itself), max_tokens, batch_size (in sequences), ctx_len and heldout_tokens; seeds and
            max_tokens may be in `config` too.

    Raises:
        ValueError: in one line, naming what does not fit.
    """
    loaded = loaded_language_model(model, tokenizer)
    if config is None:
        config = RunConfig(**SAE_DEFAULTS, **TRAIN_DEFAULTS, k=DEFAULT_K)
    else:
        settings = _of(config.train) | settings
    text = _settings(settings)
    train = replace(
        config.train,
        shuffle_seed=text.shuffle_seed,
        max_tokens=text.max_tokens,
        device=str(loaded.device),
    )
    configs = {"": RunConfig(sae=config.sae, train=train)}
    documents = texts if isinstance(texts, str) else _documents(texts, text)
    place = None if directory is None else Path(directory)
    with _unchanged(model):
        sweep = open_from_model(
            *(loaded, documents, text, configs, place),
            loss_terms=loss_terms,
            callbacks=callbacks,
            show_progress=show_progress,
        )
        return sweep.train()


def _of(train: TrainConfig) -> dict[str, Any]:
    """Return the settings of a training that are settings of the model's text too."""
    shared = {"shuffle_seed": train.order_seed, "init_seeds": (train.seed,)}
    return shared if train.max_tokens is None else {**shared, "max_tokens": train.max_tokens}


def _settings(settings: dict[str, Any]) -> FromModelConfig:
    """Return the settings of the model and its text, with lists and single values as tuples."""
    defaults = FromModelConfig.defaults()
    known = [name for name, rules in rules_of(FromModelConfig).items() if not rules.command_only]
    reject_unknown_keys(settings, sorted(known))
    values: dict[str, Any] = {
        name: _several(value) if isinstance(defaults[name], tuple) else value
        for name, value in settings.items()
    }
    return FromModelConfig(**values)


def _several(value: Any) -> tuple[Any, ...]:
    """Return values as a tuple; a single value as a tuple of one."""
    return tuple(value) if isinstance(value, (list, tuple, range)) else (value,)


def _documents(texts: Sequence[object], settings: FromModelConfig) -> Documents:
    known: list[str | None] = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(f"texts must be strings, text {number} is {kind}")
        known.append(text)
    return Documents(known, "texts", settings.shuffle_seed)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluate a model without gradients, and leave it as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)
