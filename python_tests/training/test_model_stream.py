"""Activations straight from a model: every row once a pass, shuffled, and resumed to the bit."""

import itertools
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import make_network
from small_texts import make_batches, make_texts
from torch import Tensor

from sae_fast.activations import STARTS
from sae_fast.activations.capture import Harvester, HookedModel, resolve_hooks
from sae_fast.training.from_model.model_stream import HookRows, ModelStream

NETWORK = make_network("llama")
HOOKS = ("residual.0", "residual.2", "mlp_out.1")
TOKENS = 16 * 4  # rows of a forward pass


def make_stream(
    *, max_tokens: int = 400, pool_rows: int = 150, texts: list[Any] | None = None, **changes: Any
) -> ModelStream:
    hooked = HookedModel(NETWORK, resolve_hooks(NETWORK, [0, 2], ["mlp_out.1"]))
    harvester = Harvester(hooked, make_batches(texts), max_tokens=max_tokens)
    chosen = {"batch_size": TOKENS, "seed": 1, "identity": {"model": "llama"}, **changes}
    return ModelStream(
        harvester, hooked.widths(), pool_rows=pool_rows, max_tokens=max_tokens, **chosen
    )


def harvested(max_tokens: int | None = None, texts: list[Any] | None = None) -> dict[str, Tensor]:
    """Return the rows in the order in which the model gives them."""
    hooked = HookedModel(NETWORK, resolve_hooks(NETWORK, [0, 2], ["mlp_out.1"]))
    parts = list(Harvester(hooked, make_batches(texts), max_tokens=max_tokens))
    return {name: torch.cat([part.activations[name] for part in parts]) for name in HOOKS}


def together(batches: list[HookRows]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name].x for batch in batches]) for name in HOOKS}


def as_tuples(rows: dict[str, Tensor]) -> list[tuple[float, ...]]:
    """Return the rows of all hook points side by side as tuples, which can be sorted."""
    return [tuple(row) for row in torch.cat([rows[name] for name in HOOKS], 1).tolist()]


def test_every_row_is_served_once_a_pass_and_all_hook_points_go_together() -> None:
    stream = make_stream(max_tokens=5 * TOKENS, pool_rows=2 * TOKENS)
    known = as_tuples(harvested(5 * TOKENS))
    assert len(known) == 5 * TOKENS
    batches = [stream.next_rows() for _ in range(5)]
    served = as_tuples(together(batches))
    assert sorted(served) == sorted(known)
    # Windows have two passes of the model each, and their rows come in the order of the windows.
    assert sorted(served[: 2 * TOKENS]) == sorted(known[: 2 * TOKENS])
    assert served[: 2 * TOKENS] != known[: 2 * TOKENS]
    assert all(rows.x.dtype == torch.float32 for batch in batches for rows in batch.values())


def test_rows_of_batches_are_known_with_their_text() -> None:
    stream = make_stream(max_tokens=12 * TOKENS, pool_rows=100)
    hooked = HookedModel(NETWORK, resolve_hooks(NETWORK, [0, 2], ["mlp_out.1"]))
    known = harvested(12 * TOKENS)[HOOKS[1]]
    tokens = torch.cat([part.token_ids for part in Harvester(hooked, make_batches(None))])
    for number in range(8):
        batch = stream.next_rows()[HOOKS[1]].x
        rows = torch.from_numpy(stream.batch_rows(number * TOKENS))
        assert torch.equal(known[rows], batch)
        inside = rows[rows >= stream.first] - stream.first
        assert len(inside) > 0
        window = stream.window
        assert torch.equal(window.rows_of(HOOKS[1], inside), known[inside + stream.first])
        assert torch.equal(window.text()["token_ids"][inside], tokens[inside + stream.first])
    assert len(stream.batch_rows(0)) == TOKENS
    assert len(stream.batch_rows(7 * TOKENS)) == TOKENS


def test_order_is_that_of_the_seed() -> None:
    one, same, other = make_stream(), make_stream(), make_stream(seed=2)
    first = one.next_rows()[HOOKS[0]].x
    assert torch.equal(first, same.next_rows()[HOOKS[0]].x)
    assert not torch.equal(first, other.next_rows()[HOOKS[0]].x)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 11), st.sampled_from([1, 60, 64, 150, 400]), st.booleans())
def test_a_position_goes_on_with_the_same_bits(before: int, pool: int, whole: bool) -> None:
    texts = make_texts(30)  # fewer rows than needed: several passes
    options: dict[str, Any] = {"pool_rows": pool, "texts": texts, "max_tokens": 12 * TOKENS}
    options["whole_sequences"] = whole
    stream = make_stream(**options)
    for _ in range(before):
        stream.next_rows()
    state = stream.state_dict()
    expected = [stream.next_rows() for _ in range(12 - before)]
    again = make_stream(**options)
    again.next_rows()
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert again.tokens_served == before * TOKENS
    for batch in expected:
        found = again.next_rows()
        for name in HOOKS:
            assert torch.equal(found[name].x, batch[name].x)
            for column, values in batch[name].columns.items():
                assert torch.equal(found[name].columns[column], values)
    assert again.state_dict() == stream.state_dict()


def test_documents_that_end_are_read_again_and_that_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = make_texts(12)
    known = as_tuples(harvested(texts=texts))
    size = len(known)
    assert TOKENS < size < 3 * TOKENS
    with caplog.at_level(logging.WARNING):
        stream = make_stream(texts=texts, max_tokens=6 * TOKENS, pool_rows=1000)
        served = as_tuples(together([stream.next_rows() for _ in range(6)]))
    first, second = served[:size], served[size : 2 * size]
    assert sorted(first) == sorted(second) == sorted(known)
    assert first != second
    (line,) = caplog.messages
    assert line.startswith(f"all documents together have {size} tokens, of 384 to train on")


def test_the_model_reads_nothing_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    activations = HookedModel.activations

    def counted(self: HookedModel, *tokens: Any, **others: Any) -> dict[str, Tensor]:
        passes.append(tokens)
        return activations(self, *tokens, **others)

    monkeypatch.setattr(HookedModel, "activations", counted)
    stream = make_stream(max_tokens=5 * TOKENS, pool_rows=2 * TOKENS)
    passes.clear()  # drops the pass that measured the widths
    for _ in range(5):
        stream.next_rows()
    assert len(passes) == 5


def test_whole_sequences_stay_together_and_in_order() -> None:
    stream = make_stream(max_tokens=5 * TOKENS, pool_rows=2 * TOKENS, whole_sequences=True)
    known = as_tuples(harvested(5 * TOKENS))
    longest = 0
    for _ in range(5):
        batch = stream.next_rows()
        begins = batch[HOOKS[0]].columns[STARTS]
        assert begins[0]
        rows = as_tuples({name: batch[name].x for name in HOOKS})
        edges = [*begins.nonzero()[:, 0].tolist(), len(rows)]
        for start, stop in itertools.pairwise(edges):
            run = rows[start:stop]
            assert any(
                known[place : place + len(run)] == run
                for place, row in enumerate(known)
                if row == run[0]
            )
            longest = max(longest, len(run))
    assert longest > 20


def test_a_position_of_other_activations_is_refused() -> None:
    state = make_stream().state_dict()
    for changes, message in (
        ({"seed": 2}, "seed is 2, but the checkpoint was made with 1"),
        ({"pool_rows": 7}, "pool_rows is 7"),
        ({"whole_sequences": True}, "whole_sequences is True"),
        ({"identity": {"model": "gpt2", "dataset": 1}}, "model, dataset changed"),
    ):
        with pytest.raises(ValueError, match=message):
            make_stream(**changes).load_state_dict(state)


def test_documents_without_a_token_are_refused() -> None:
    stream = make_stream(texts=["", "  ", None])
    with pytest.raises(ValueError, match="no document has a token"):
        stream.next_rows()


@pytest.mark.parametrize("name", ["batch_size", "pool_rows"])
def test_sizes_begin_at_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make_stream(**{name: 0})
