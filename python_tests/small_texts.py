"""Documents of a few words, some of them empty, and batches of their tokens."""

import numpy as np
from small_models import WORDS, make_tokenizer

from sae_fast.activations.capture import (
    Documents,
    SequenceConfig,
    TokenBatches,
    Tokenisation,
    special_tokens,
)


def make_texts(count=40, longest=30, seed=0):
    """Make documents of up to `longest` words; every seventh is empty or white space."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    texts = [" ".join(generator.choice(WORDS, length)) for length in lengths]
    return [(" \n", "", None)[n % 3] if n % 7 == 3 else text for n, text in enumerate(texts)]


def make_batches(
    texts=None,
    *,
    causal=True,
    pack=None,
    ctx_len=16,
    batch_size=4,
    exclude=False,
    processes=1,
    seed=None,
    tokenizer=None,
    **part,
):
    tokenizer = tokenizer or make_tokenizer(causal)
    tokens = Tokenisation(tokenizer, special_tokens(tokenizer, causal=causal), processes)
    config = SequenceConfig(ctx_len, batch_size, causal if pack is None else pack, exclude)
    documents = Documents(make_texts() if texts is None else texts, shuffle_seed=seed)
    return TokenBatches(documents, tokens, config, **part)


def rows_of(batches):
    """Return (doc_id, position, token) of every kept token, in order."""
    found = []
    for batch in batches:
        columns = (batch.doc_id[batch.kept], batch.position[batch.kept], batch.tokens[batch.kept])
        found += list(zip(*(column.tolist() for column in columns), strict=True))
    return found


def expected_rows(texts, tokenizer, before, after):
    """Return the expected rows from each document by itself: packed, or one row a document."""
    found = []
    for number, text in enumerate(texts):
        if text and text.strip():
            content = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = [*before, *content, *after]
            found += [(number, position, token) for position, token in enumerate(tokens)]
    return found
