"""Capturing activations: from a model and a text to batches of rows, and to shards.

model = load_language_model("folder or hub name")
documents = load_documents("texts.jsonl", shuffle_seed=42)
tokens = Tokenisation(model.tokenizer, special_tokens(model.tokenizer, causal=model.causal))
batches = TokenBatches(documents, tokens, SequenceConfig(ctx_len=512, batch_size=32, pack=True))
for harvest in Harvester(HookedModel(model.network, hooks), batches): ...
"""

from typing import TYPE_CHECKING

from sae_fast.lazy_names import lazy_names

if TYPE_CHECKING:
    from sae_fast.activations.capture.documents import Documents
    from sae_fast.activations.capture.harvest import Harvest, Harvester
    from sae_fast.activations.capture.hooks import HookPoint, find_blocks, resolve_hooks
    from sae_fast.activations.capture.language_model import (
        HookedModel,
        LanguageModel,
        load_language_model,
    )
    from sae_fast.activations.capture.opening import load_documents
    from sae_fast.activations.capture.sequences import (
        SequenceConfig,
        TokenBatch,
        TokenBatches,
        TokenCursor,
    )
    from sae_fast.activations.capture.tokens import Tokenisation, special_tokens

__all__ = [
    "Documents",
    "Harvest",
    "Harvester",
    "HookPoint",
    "HookedModel",
    "LanguageModel",
    "SequenceConfig",
    "TokenBatch",
    "TokenBatches",
    "TokenCursor",
    "Tokenisation",
    "find_blocks",
    "load_documents",
    "load_language_model",
    "resolve_hooks",
    "special_tokens",
]

# Imported when first asked for, so that processes that tokenise need no torch.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "sae_fast.activations.capture.documents": ("Documents",),
        "sae_fast.activations.capture.harvest": ("Harvest", "Harvester"),
        "sae_fast.activations.capture.hooks": ("HookPoint", "find_blocks", "resolve_hooks"),
        "sae_fast.activations.capture.language_model": (
            "HookedModel",
            "LanguageModel",
            "load_language_model",
        ),
        "sae_fast.activations.capture.opening": ("load_documents",),
        "sae_fast.activations.capture.sequences": (
            "SequenceConfig",
            "TokenBatch",
            "TokenBatches",
            "TokenCursor",
        ),
        "sae_fast.activations.capture.tokens": ("Tokenisation", "special_tokens"),
    },
)
