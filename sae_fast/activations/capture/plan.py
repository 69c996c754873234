"""A capture before it runs: the model with its hooks, the documents in two parts, and the recipe.

The last documents of the order can be held out, of a stream the first. They are captured first, and
no document is in both parts.
"""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sae_fast.activations.capture.conversations import check_roles, open_chat_template
from sae_fast.activations.capture.documents import Documents, Kind
from sae_fast.activations.capture.hooks import resolve_hooks
from sae_fast.activations.capture.image_model import ImageModel, load_image_model
from sae_fast.activations.capture.images import ImageBatches, open_images
from sae_fast.activations.capture.language_model import (
    HookedModel,
    LanguageModel,
    load_language_model,
)
from sae_fast.activations.capture.loading import Placement
from sae_fast.activations.capture.opening import load_documents
from sae_fast.activations.capture.probe import probe_tokens
from sae_fast.activations.capture.sequences import SequenceConfig, TokenBatches
from sae_fast.activations.capture.stream_check import checked_hooks
from sae_fast.activations.capture.tokens import (
    CHUNK,
    PairEncoder,
    Tokenisation,
    decoder_tokens,
    special_tokens,
    vocabulary_of,
)
from sae_fast.activations.storage import STORAGES
from sae_fast.activations.writer import chunk_rows_of, padded_rows
from sae_fast.config.model_text import DEFAULT_CONTEXT, CaptureConfig
from sae_fast.config.setting import rules_of

AUTO = "auto"  # as the type of storage, see storage_type.py
# The number of tokens of a dataset is estimated from at most this many documents or rows.
SAMPLED_DOCUMENTS, SAMPLED_ROWS = 512, 1 << 18
COLUMN_BYTES = 3 * 4  # token_ids, doc_id and position of a row
PACKAGES = ("sae_fast", "torch", "transformers", "tokenizers", "datasets", "numpy", "h5py")


@dataclass(frozen=True)
class Capture:
    """A capture that is ready to run.

    Attributes:
        config: the settings.
        model: the language model with its tokenizer, or what reads images.
        hooked: the same network with its hook points.
        widths: width of a row, by name of the hook point.
        batches: what is captured.
        heldout: what is held out; None: nothing.
    """

    config: CaptureConfig
    model: LanguageModel | ImageModel
    hooked: HookedModel
    widths: dict[str, int]
    batches: TokenBatches | ImageBatches
    heldout: TokenBatches | ImageBatches | None

    def stored_bytes(self, rows: int) -> int:
        """Return the bytes of `rows` rows of every hook point, uncompressed, in whole chunks."""
        shards, last = divmod(rows, self.config.shard_tokens)
        total = 0
        for width in self.widths.values():
            size = width * STORAGES[self.config.dtype].itemsize
            stored = shards * padded_rows(self.config.shard_tokens, size) + padded_rows(last, size)
            if self.config.heldout_tokens:
                stored += chunk_rows_of(size)  # they end in a chunk of their own
            total += stored * (size + COLUMN_BYTES)
        return total

    def expected_rows(self) -> tuple[int, bool]:
        """Return the rows to capture at each hook point, and whether they are an estimate."""
        rows, is_estimate = self.estimated_rows()
        limit = self.config.max_tokens
        if limit is not None and rows >= limit:
            return limit, False
        return rows, is_estimate

    def estimated_rows(self) -> tuple[int, bool]:
        """Return the rows of all documents not held out, and whether they are an estimate.

        Of a stream they are the rows that are asked for.
        """
        batches = self.batches
        if batches.documents.count is None:
            return self.config.max_tokens or 0, True
        sample, count = 0, 0
        while count < min(SAMPLED_DOCUMENTS, batches.stop) and sample < SAMPLED_ROWS:
            end = min(count + CHUNK, batches.stop)
            sample += sum(batches.rows_by_document(count, end))
            count = end
        return sample * batches.stop // max(1, count), count < batches.stop

    def recipe(self, world_size: int) -> dict[str, Any]:
        """Return origin and settings of the activations; a capture by them gives the same."""
        config, sequences = self.config, self.batches.config
        documents, batches = self.batches.documents, self.batches
        chat = batches.tokenisation.chat if isinstance(batches, TokenBatches) else None
        resolved = {
            "ctx_len": sequences.ctx_len,
            "pack": sequences.pack,
            "exclude_special_tokens": sequences.exclude_special_tokens,
            "world_size": world_size,
        }
        settings = {
            name: getattr(config, name)
            for name, rules in rules_of(config).items()
            if rules.recipe and name not in resolved
        }
        return {
            "model": {
                "name": config.model,
                "class": type(self.model.network).__name__,
                "revision": self.model.revision or config.revision,
                "weights": self.model.weights_digest(),
                "tokenizer": self.model.tokenizer_digest(),
                **(
                    {"vocabulary": vocabulary_of(self.model.tokenizer)}
                    if isinstance(self.model, LanguageModel)
                    else {}
                ),
            },
            "dataset": {
                "name": config.dataset,
                "config": config.dataset_config,
                "split": config.split,
                "text_column": documents.column,
                "text_split": config.text_split,
                **({"is_tokenised": True} if documents.kind is Kind.TOKENS else {}),
                **({} if chat is None else {"chat": chat.recorded()}),
                **({"target_column": config.target_column} if documents.kind is Kind.PAIRS else {}),
                **({"has_images": True} if documents.kind is Kind.IMAGES else {}),
                "documents": documents.count,
                "fingerprint": documents.fingerprint(),
            },
            "hooks": [
                {**hook.recorded(), "d_in": self.widths[hook.name]} for hook in self.hooked.hooks
            ],
            "settings": {**settings, **resolved},
        }


def made_with(device: str) -> dict[str, str]:
    """Return versions and device, which are recorded and may differ when a capture is continued."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # sae_fast from its source folder
            continue
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {"python": platform.python_version(), **versions, "device": device, "hardware": name}


def open_capture(
    config: CaptureConfig,
    local_rank: int | None = None,
    *,
    model: LanguageModel | ImageModel | None = None,
    documents: Documents | None = None,
) -> Capture:
    """Load what a capture needs; raise ValueError or OSError in one line for what is wrong.

    Args:
        config: what is captured.
        local_rank: under torchrun, which process of this machine it is.
        model: a model in memory; None: the one that `config` names is loaded.
        documents: texts in memory; None: the dataset that `config` names is opened.
    """
    if config.model is None or config.dataset is None:
        raise ValueError("model and dataset must be given: MODEL DATASET")
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = config.device
    if device == "cuda" and local_rank is not None:
        device = f"cuda:{local_rank}"
    if documents is None:
        documents = load_documents(
            config.dataset,
            config=config.dataset_config,
            split=config.split,
            text_column=config.text_column,
            text_split=config.text_split,
            shuffle_seed=config.shuffle_seed,
            tokens_column=config.tokens_column,
            conversations=config.chat_template is not None,
            target_column=config.target_column,
            image_column=config.image_column,
            streaming="never" if config.max_tokens is None else config.streaming,
        )
    placement = Placement(device, config.device_map, config.quantization)
    if documents.kind is Kind.IMAGES:
        return _of_images(config, documents, placement, model)
    return _of_texts(config, documents, placement, model)


def _of_texts(
    config: CaptureConfig,
    documents: Documents,
    placement: Placement,
    model: LanguageModel | ImageModel | None,
) -> Capture:
    """Open a capture of texts, see `open_capture`."""
    if model is None:
        model = load_language_model(
            str(config.model),
            revision=config.revision,
            dtype=config.model_dtype,
            device=placement.device,
            device_map=placement.device_map,
            quantization=placement.quantization,
            trust_remote_code=config.trust_remote_code,
        )
    if isinstance(model, ImageModel):
        raise ValueError(f"{model.name} reads images, and {documents.name} holds none")
    hooks = resolve_hooks(model.network, config.layers, config.hook_points, config.layer_stride)
    some = probe_tokens(model.network, model.tokenizer, model.context)
    if some is not None:
        hooks = checked_hooks(model.network, hooks, some.to(model.device))
    hooked = HookedModel(model.network, hooks)
    _check_target(config, hooked)
    sequences = SequenceConfig(
        _context(config, model),
        config.batch_size,
        config.pack and model.causal,
        model.reads_proteins
        if config.exclude_special_tokens is None
        else config.exclude_special_tokens,
    )
    tokens = _tokenisation(config, model, documents, sequences.ctx_len)
    batches, heldout = _split(TokenBatches(documents, tokens, sequences), config.heldout_tokens)
    return Capture(config, model, hooked, hooked.widths(), batches, heldout)


def _of_images(
    config: CaptureConfig,
    documents: Documents,
    placement: Placement,
    model: LanguageModel | ImageModel | None,
) -> Capture:
    """Open a capture of images, see `open_capture`."""
    if config.ctx_len is not None:
        raise ValueError(
            f"ctx_len = {config.ctx_len} is for texts: an image has as many tokens as its model "
            "makes of it"
        )
    if model is None:
        model = load_image_model(
            str(config.model),
            revision=config.revision,
            dtype=config.model_dtype,
            placement=placement,
            trust_remote_code=config.trust_remote_code,
        )
    if not isinstance(model, ImageModel):
        raise ValueError(f"{model.name} reads texts, and {documents.name} holds images")
    images = open_images(
        documents,
        model,
        config.batch_size,
        keep_all=config.exclude_special_tokens is False,
        threads=config.num_proc,
    )
    network, rows = model.network, len(images.shape.kinds)
    pixels = torch.randn(1, *images.shape.pixels, generator=torch.Generator().manual_seed(0))
    hooks = resolve_hooks(network, config.layers, config.hook_points, config.layer_stride)
    hooks = checked_hooks(network, hooks, torch.zeros(1, rows, dtype=torch.int64), pixels)
    hooked = HookedModel(network, hooks)
    batches, heldout = _split(images, config.heldout_tokens)
    return Capture(config, model, hooked, hooked.widths(pixels, rows), batches, heldout)


Batches = TypeVar("Batches", TokenBatches, ImageBatches)


def _split(batches: Batches, heldout_rows: int) -> tuple[Batches, Batches | None]:
    """Return the batches to train on and, where rows are held out, the batches of these."""
    if not heldout_rows:
        return batches, None
    if batches.documents.count is None:
        place = _first_place(batches, heldout_rows)
        return batches.between(place), batches.between(0, place)
    place = _heldout_place(batches, heldout_rows)
    return batches.between(0, place), batches.between(place)


def _tokenisation(
    config: CaptureConfig, model: LanguageModel, documents: Documents, ctx_len: int
) -> Tokenisation:
    special = special_tokens(model.tokenizer, causal=model.causal)
    chat, pairs = None, None
    if documents.kind is Kind.PAIRS:
        pairs = PairEncoder(model.tokenizer, special, ctx_len)
        special = decoder_tokens(special, _decoder_start(model.network))
    if config.chat_template is not None:
        chat = open_chat_template(model.tokenizer, config.chat_template, config.roles)
        check_roles(chat.roles, documents)
        special = special.without_surroundings()  # the template writes them itself
    vocabulary = model.network.get_input_embeddings().num_embeddings
    return Tokenisation(model.tokenizer, special, config.num_proc, vocabulary, chat, pairs)


def _check_target(config: CaptureConfig, hooked: HookedModel) -> None:
    """Raise ValueError unless there is a text for the decoder just where one is read."""
    first = hooked.hooks[0].name
    if hooked.decodes and config.target_column is None:
        raise ValueError(
            f"hook_points: {first} is in the decoder, which reads a text of its own: name the "
            "column of these texts with --target-column"
        )
    if not hooked.decodes and config.target_column is not None:
        raise ValueError(
            f"target_column = {config.target_column!r} is read by a decoder beside an encoder, and "
            f"{first} is in none: hook points such as decoder.residual.0 are"
        )


def _decoder_start(network: Any) -> int:
    """Return the token with which a decoder begins; raise ValueError where the model has none."""
    places = (network.config, getattr(network, "generation_config", None))
    start = next(
        (
            token
            for place in places
            if isinstance(token := getattr(place, "decoder_start_token_id", None), int)
        ),
        None,
    )
    if start is None:
        raise ValueError(
            f"{type(network).__name__} does not say with which token its decoder begins "
            "(decoder_start_token_id)"
        )
    return start


def _context(config: CaptureConfig, model: LanguageModel) -> int:
    limit = model.context
    if config.ctx_len is None:
        return DEFAULT_CONTEXT if limit is None else min(DEFAULT_CONTEXT, limit)
    if limit is not None and config.ctx_len > limit:
        raise ValueError(
            f"ctx_len must be at most {limit}, the context of {config.model}, got {config.ctx_len}"
        )
    return config.ctx_len


def _heldout_place(batches: TokenBatches | ImageBatches, rows: int) -> int:
    """Return the place in the order of documents after which there are `rows` rows."""
    counted, stop = 0, batches.stop
    while stop > 0:
        start = max(0, stop - CHUNK)
        counts = batches.rows_by_document(start, stop)
        for place in range(stop - 1, start - 1, -1):
            counted += counts[place - start]
            if counted >= rows and place > 0:
                return place
        stop = start
    raise ValueError(
        f"heldout_tokens must leave documents to train on, got {rows:,}: "
        f"{batches.documents.name} has {counted:,} tokens in {batches.stop:,} documents (fewer "
        "held-out tokens, or 0 for none, leave some)"
    )


def _first_place(batches: TokenBatches | ImageBatches, rows: int) -> int:
    """Return the place in the order of documents before which there are `rows` rows."""
    counted = 0
    for begin in range(0, batches.stop, CHUNK):
        counts = batches.rows_by_document(begin, min(begin + CHUNK, batches.stop))
        for place, count in enumerate(counts, begin + 1):
            counted += count
            if counted >= rows:
                return place
        if not counts:
            break
    raise ValueError(
        f"heldout_tokens must leave documents to train on, got {rows:,}: "
        f"{batches.documents.name} has {counted:,} tokens"
    )
