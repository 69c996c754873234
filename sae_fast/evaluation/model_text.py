"""Language models with the texts that they read, for a dictionary at their hook points."""

from __future__ import annotations

from sae_fast.activations.capture import LanguageModel
from sae_fast.activations.capture.hooks import HookPoint
from sae_fast.activations.capture.image_model import ImageModel
from sae_fast.activations.capture.images import ImageBatches
from sae_fast.activations.capture.language_model import check_reads_once
from sae_fast.activations.capture.plan import Capture
from sae_fast.activations.capture.sequences import TokenBatches
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
