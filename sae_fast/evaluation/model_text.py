"""Language models with the texts that they read, for a dictionary at their hook points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_fast.activations import TARGETS
from sae_fast.activations.capture import LanguageModel
from sae_fast.activations.capture.hooks import HookPoint
from sae_fast.activations.capture.image_model import ImageModel
from sae_fast.activations.capture.images import ImageBatches
from sae_fast.activations.capture.language_model import check_reads_once
from sae_fast.activations.capture.plan import Capture, open_capture
from sae_fast.activations.capture.sequences import TokenBatches
from sae_fast.activations.capture.tokens import vocabulary_of
from sae_fast.activations.origin import short_name, vocabulary_difference
from sae_fast.autoencoder import SparseAutoencoder
from sae_fast.config.evaluate import EvaluateConfig
from sae_fast.evaluation.language_model import ModelText, token_columns


def model_text(
    capture: Capture,
    batches: TokenBatches | ImageBatches,
    hooks: tuple[HookPoint, ...],
    widths: tuple[int, ...],
    *,
    seed: int,
    max_tokens: int,
) -> ModelText:
    """Return a model and its text, for a dictionary that reads one hook point.

    Args:
        capture: from the model.
        batches: the text.
        hooks: the hook point that the dictionary reads; of a transcoder also what it writes.
        widths: numbers a row of the dictionary, for each of the hook points.
        seed: of the tokens that a masked model predicts.
        max_tokens: of the text, about.

    Raises ValueError for a model without a head, and a dictionary of another width.
    """
    model = check_predicts(capture.model)
    assert isinstance(batches, TokenBatches)  # which a language model reads
    for hook, width in zip(hooks, widths, strict=True):
        if capture.widths[hook.name] != width:
            raise ValueError(
                f"the dictionary has {width} numbers a row, {hook.name} of {model.name} has "
                f"{capture.widths[hook.name]}"
            )
    masked = None if model.causal else model.tokenizer.mask_token_id
    if masked is None and not model.causal:
        raise ValueError(
            f"{model.name} predicts masked tokens, and its tokenizer has no mask token"
        )
    source, *targets = hooks
    return ModelText(
        model.network,
        source,
        targets[0] if targets else None,
        model.causal,
        lambda: token_columns(batches, masked, seed, max_tokens, model.device),
        model.name,
        batches.config.ctx_len,
    )


def check_predicts(model: LanguageModel | ImageModel) -> LanguageModel:
    """Return a model; raise ValueError where it has no head, or reads images or two texts."""
    if isinstance(model, ImageModel) or model.network.get_output_embeddings() is None:
        raise ValueError(
            "the losses of a model need its head: "
            f"{type(model.network).__name__} predicts no tokens"
        )
    check_reads_once(model.network)
    return model


def model_difference(origin: Mapping[str, Any], name: str) -> str | None:
    """Return in words that a model is of another name than the origin's; None: it may be the same.

    Args:
        origin: of activations or of a dictionary.
        name: of the model that was given, or its folder.
    """
    return _difference("model", short_name(str(origin.get("model") or "")), short_name(name))


def check_same_model(
    origin: Mapping[str, Any], name: str, model: LanguageModel, hook: str | None = None
) -> None:
    """Raise ValueError, naming both values, unless a dictionary may be of a model.

    Args:
        origin: of the dictionary.
        name: of the model, or its folder.
        model: the model.
        hook: the hook point in it; None: it is not compared.
    """
    difference = model_difference(origin, name) or vocabulary_difference(
        origin, vocabulary_of(model.tokenizer)
    )
    if difference is None and hook is not None:
        difference = _difference("hook", origin.get("hook"), hook)
    if difference is not None:
        raise ValueError(f"the dictionary is of {difference}; --force continues all the same")


def _difference(kind: str, known: Any, given: str) -> str | None:
    if not known or str(known) == given:
        return None
    return f"{kind} {known!r}, and the {kind} given is {given!r}"


class EvaluatedModel:
    """The language model that dictionaries are measured in, loaded when one first needs it.

    Args:
        config: names the model, or leaves it to the origin of the dictionary.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._loaded: LanguageModel | None = None
        self._name = ""

    def text_for(self, sae: SparseAutoencoder) -> ModelText:
        """Return the model and its text, for a dictionary at its hook points.

        Raises ValueError where the dictionary is of another model, hook point or width.
        """
        config = self._config
        name, hooks = self._places(sae)
        if self._loaded is not None and name != self._name:
            raise ValueError(f"all dictionaries must be of one model, got {self._name} and {name}")
        capture = open_capture(config.capture_config(name, hooks), model=self._loaded)
        self._loaded, self._name = check_predicts(capture.model), name
        found = {hook.name: hook for hook in capture.hooked.hooks}
        if len(found) != len(set(hooks)):
            raise ValueError(f"hook must name one hook point, got {' '.join(found)}")
        source, *targets = capture.hooked.hooks
        if not config.force:
            check_same_model(sae.origin, name, self._loaded, source.name)
        return model_text(
            *(capture, capture.batches, (source, *targets)),
            (sae.d_in, *(sae.config.target_width for _ in targets)),
            seed=config.shuffle_seed or 0,
            max_tokens=config.max_tokens,
        )._replace(name=name)

    def _places(self, sae: SparseAutoencoder) -> tuple[str, tuple[str, ...]]:
        """Return the name of the model, and the hook points that a dictionary reads and writes."""
        config, origin = self._config, sae.origin
        name, hook = config.model or origin.get("model"), config.hook or origin.get("hook")
        for flag, value in (("model", name), ("hook", hook)):
            if not value:
                raise ValueError(
                    f"--{flag} must be given: the dictionary does not say of which {flag} it is"
                )
        if not sae.config.transcoder:
            if config.target_hook is not None:
                raise ValueError("target_hook belongs to a transcoder, and the dictionary is none")
            return str(name), (str(hook),)
        target = config.target_hook or (origin.get(TARGETS) or {}).get("hook")
        if not target:
            raise ValueError("--target-hook must be given: the transcoder does not say its own")
        return str(name), (str(hook), str(target))
