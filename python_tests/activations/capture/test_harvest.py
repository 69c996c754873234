"""Harvests: the rows of each batch, in one pass, from the middle, and over ranks."""

import threading

import pytest
import torch
from small_models import CAUSAL, make_network
from small_texts import make_batches, make_texts, rows_of

from sae_fast.activations.background import THREADS
from sae_fast.activations.capture import Harvester, HookedModel, resolve_hooks


def make_harvester(name="llama", *, max_tokens=None, rank=0, world_size=1, **batches):
    network = make_network(name)
    model = HookedModel(network, resolve_hooks(network, [0, 2]))
    made = make_batches(causal=name in CAUSAL, **batches)
    return Harvester(model, made, max_tokens=max_tokens, rank=rank, world_size=world_size)


def everything(harvests):
    """Return the rows and activations of some harvests."""
    harvests = list(harvests)
    keys = [
        tuple(row)
        for harvest in harvests
        for row in zip(
            harvest.doc_id.tolist(),
            harvest.position.tolist(),
            harvest.token_ids.tolist(),
            strict=True,
        )
    ]
    names = harvests[0].activations
    return keys, {name: torch.cat([h.activations[name] for h in harvests]) for name in names}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_rows_are_the_hidden_states_of_their_tokens(name):
    harvester = make_harvester(name)
    network = harvester.model.network
    seen = 0
    for harvest in harvester:
        batch = harvest.batch
        mask = None if batch.mask is None else batch.mask.long()
        with torch.no_grad():
            result = network(batch.tokens, attention_mask=mask, output_hidden_states=True)
        assert torch.equal(harvest.activations["residual.0"], result.hidden_states[1][batch.kept])
        assert torch.equal(harvest.token_ids.long(), batch.tokens[batch.kept])
        assert {rows.shape for rows in harvest.activations.values()} == {(len(harvest), 16)}
        seen += len(harvest)
    assert seen == len(rows_of(harvester.batches.iterate()))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_from_any_batch_on_the_same_bits_come_again(name):
    harvester = make_harvester(name, texts=make_texts(80))
    every = list(harvester)
    for number in (1, len(every) // 2, len(every) - 1):
        again = everything(harvester.harvest(every[number].batch.cursor))
        keys, rows = everything(every[number:])
        assert again[0] == keys
        assert all(torch.equal(again[1][name], rows[name]) for name in rows)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("max_tokens", [None, 333])
def test_ranks_together_have_the_rows_of_one_to_the_bit(name, max_tokens):
    keys, rows = everything(make_harvester(name, max_tokens=max_tokens))
    whole = {key: rows["residual.2"][place] for place, key in enumerate(keys)}
    assert len(whole) == len(keys) == (max_tokens or len(keys))
    parts = [
        everything(make_harvester(name, max_tokens=max_tokens, rank=rank, world_size=3))
        for rank in range(3)
    ]
    assert sorted(key for keys, _ in parts for key in keys) == sorted(whole)
    for keys, rows in parts:
        assert all(
            torch.equal(rows["residual.2"][place], whole[key]) for place, key in enumerate(keys)
        )


def test_max_tokens_ends_within_a_batch_without_reading_on():
    harvester = make_harvester(max_tokens=100)
    sizes = [len(harvest) for harvest in harvester]
    assert sizes == [64, 36]
    assert harvester.reached.batch == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to 1, got 2"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_harvester(**options)


def test_a_token_that_the_model_does_not_know_is_told():
    harvester = make_harvester()
    harvester.model.network.resize_token_embeddings(12)
    with pytest.raises(ValueError, match=r"vocabulary has 12 tokens, the tokenizer gave token 17"):
        list(Harvester(harvester.model, harvester.batches))


def test_a_thread_that_gets_no_memory_to_begin_ends_the_harvest(monkeypatch):
    run = threading.Thread.run

    def fails(thread):
        if thread.name.startswith(THREADS):
            raise MemoryError
        return run(thread)

    harvester = make_harvester()
    monkeypatch.setattr(threading.Thread, "run", fails)
    with pytest.raises(MemoryError, match="the thread that tokenises the documents has ended"):
        next(harvester.harvest())
