"""The language model in which a training on shards is measured: eval_metrics.

A training straight from a model has it already, see from_model/.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch

from sae_fast.activations.capture import LanguageModel
from sae_fast.activations.capture.language_model import load_language_model
from sae_fast.activations.capture.plan import open_capture
from sae_fast.activations.capture.tokens import vocabulary_of
from sae_fast.activations.origin import vocabulary_difference
from sae_fast.config import RunConfig, TrainConfig
from sae_fast.config.model_text import CaptureConfig
from sae_fast.evaluation.language_model import SplicedLosses
from sae_fast.evaluation.model_text import model_difference, model_text
from sae_fast.training.downstream import Downstream

logger = logging.getLogger(__name__)

# Models in memory, by name and device: the trainings of a sweep share one.
_loaded: WeakValueDictionary[tuple[str, str], LanguageModel] = WeakValueDictionary()


def with_eval_metrics(
    downstream: Downstream,
    config: RunConfig,
    origin: Mapping[str, Any],
    device: torch.device,
    *,
    is_named: bool,
) -> Downstream:
    """Return the downstream model with the losses that eval_metrics measures.

    Args:
        downstream: the model that continues from the reconstruction, if any.
        config: of the training, with the sizes of the model.
        origin: the place of the activations, as far as it is known.
        device: where this process trains, and the model runs.
        is_named: whether the configuration names the data.

    Raises ValueError, in one line, for what is missing or does not fit.
    """
    train, sae = config.train, config.sae
    if train.eval_dataset is None:
        needs = "--eval-dataset, text for the model of the activations"
        raise ValueError(
            f"eval_metrics = {train.eval_metrics} needs {needs}"
            + ("" if is_named else ", or held-out text of a training straight from a model")
        )
    if sae.transcoder:
        raise ValueError(
            "eval_metrics is not measured in the training of a transcoder: "
            "python -m sae_fast.evaluate does it afterwards"
        )
    name, hook = train.eval_model or origin.get("model"), train.eval_hook or origin.get("hook")
    for flag, value in (("eval_model", name), ("eval_hook", hook)):
        if not value:
            raise ValueError(f"{flag} must be given: the activations do not say of which they are")
    _allow(model_difference(origin, str(name)), train)
    with torch.random.fork_rng(devices=[]):  # models may draw random numbers as they are made
        model = _loaded.get((str(name), str(device)))
        if model is None:
            model = load_language_model(str(name), device=str(device))
            _loaded[str(name), str(device)] = model
        _allow(vocabulary_difference(origin, vocabulary_of(model.tokenizer)), train)
        capture = open_capture(
            CaptureConfig(
                model=str(name),
                dataset=train.eval_dataset,
                hook_points=(str(hook),),
                max_tokens=train.eval_tokens,
                device=str(device),
            ),
            model=model,
        )
        hooks = capture.hooked.hooks
        if len(hooks) != 1:
            found = " ".join(item.name for item in hooks)
            raise ValueError(f"eval_hook must name one hook point, got {found}")
        text = model_text(
            *(capture, capture.batches, hooks, (sae.d_in,)),
            seed=train.order_seed,
            max_tokens=train.eval_tokens,
        )
    return replace(downstream, losses=SplicedLosses(text))


def _allow(difference: str | None, train: TrainConfig) -> None:
    """Warn of a model that is not the one of the activations; refuse it without eval_hook."""
    if difference is None:
        return
    if train.eval_hook is None:
        raise ValueError(
            f"the activations are of {difference}; --eval-hook, the hook point in that model, "
            "continues all the same"
        )
    logger.warning("the activations are of %s", difference)
