"""Sequences: every token of every document once, with its document and its position."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import warm_python
from small_models import VOCABULARY, make_tokenizer
from small_texts import expected_rows, make_batches, make_texts, rows_of

from sae_fast.activations.capture import SequenceConfig, sequences, tokens

BOS, EOS, CLS, SEP = (VOCABULARY[name] for name in ("<s>", "</s>", "[CLS]", "[SEP]"))


def test_packed_rows_are_full_and_hold_every_token_once_in_order():
    batches = make_batches()
    every = list(batches.iterate())
    for batch in every[:-1]:
        assert batch.tokens.shape == (4, 16)
        assert batch.mask is None
        assert batch.kept.all()
    assert rows_of(every) == expected_rows(make_texts(), make_tokenizer(True), [BOS], [])


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize(
    ("causal", "pack", "bos"),
    [(True, True, "<s>"), (True, True, None), (True, False, "<s>"), (False, False, "<s>")],
)
def test_how_much_is_kept_of_a_text_is_known_before(causal, pack, bos, exclude):
    tokenizer = make_tokenizer(causal, bos=bos) if causal else make_tokenizer(causal)
    batches = make_batches(
        causal=causal, pack=pack, ctx_len=7, exclude=exclude, tokenizer=tokenizer
    )
    kept = Counter(number for number, *_ in rows_of(batches.iterate()))
    for _, number, text in batches.tokenisation.iterate(batches.documents, 0, batches.stop):
        assert batches.kept_of(text) == kept[number]
    assert kept


def test_without_bos_documents_end_with_eos():
    tokenizer = make_tokenizer(True, bos=None)
    rows = rows_of(make_batches(tokenizer=tokenizer).iterate())
    assert rows == expected_rows(make_texts(), tokenizer, [], [EOS])


def test_without_either_nothing_is_between_documents():
    tokenizer = make_tokenizer(True, bos=None, eos=None)
    rows = rows_of(make_batches(tokenizer=tokenizer).iterate())
    assert rows == expected_rows(make_texts(), tokenizer, [], [])


def test_the_last_packed_row_is_padded_and_its_padding_is_not_kept():
    batches = make_batches(["the cat sat"] * 3, ctx_len=5, batch_size=2)
    first, last = batches.iterate()
    assert last.tokens.shape == (1, 2)
    assert first.mask is None
    assert last.mask is None
    (only,) = make_batches(["the cat sat"] * 3, ctx_len=5, batch_size=3).iterate()
    assert only.mask.tolist() == [[True] * 5, [True] * 5, [True] * 2 + [False] * 3]
    assert torch.equal(only.kept, only.mask)


def test_unpacked_rows_hold_one_document_or_a_part_with_special_tokens_round_it():
    texts = ["the cat", "the cat sat on a mat", "dog"]
    batches = list(make_batches(texts, causal=False, ctx_len=5).iterate())
    rows = {}
    for batch in batches:
        for line in range(len(batch.tokens)):
            kept = batch.kept[line]
            document, start = int(batch.doc_id[line, 0]), int(batch.position[line, 0])
            rows[document, start] = batch.tokens[line][kept].tolist()
            steps = batch.position[line][kept]
            assert steps.tolist() == list(range(start, start + len(steps)))
    word = VOCABULARY.__getitem__
    assert rows == {
        (0, 0): [CLS, word("the"), word("cat"), SEP],
        (1, 0): [CLS, word("the"), word("cat"), word("sat"), SEP],
        (1, 3): [CLS, word("on"), word("a"), word("mat"), SEP],
        (2, 0): [CLS, word("dog"), SEP],
    }


@pytest.mark.parametrize("ends", ["bos", "eos"])
def test_unpacked_documents_of_a_causal_model_end_once(ends):
    tokenizer = make_tokenizer(True, bos="<s>" if ends == "bos" else None)
    texts = ["the cat sat on", "a mat"]
    rows = rows_of(make_batches(texts, pack=False, ctx_len=3, tokenizer=tokenizer).iterate())
    words = [VOCABULARY[word] for word in texts[0].split()]
    found = {(number, place): token for number, place, token in sorted(rows) if number == 0}
    if ends == "eos":
        assert found == dict(zip([(0, place) for place in range(5)], [*words, EOS], strict=True))
    else:  # each part begins with BOS, at the position before its first token
        assert sorted(rows)[:6] == sorted(
            [
                *[(0, 0, BOS), (0, 1, words[0]), (0, 2, words[1])],
                *[(0, 2, BOS), (0, 3, words[2]), (0, 4, words[3])],
            ]
        )


def test_rows_of_like_length_make_a_batch_and_batches_are_mixed():
    batches = list(make_batches(make_texts(200), causal=False, ctx_len=32).iterate())
    lengths = [batch.tokens.shape[1] for batch in batches]
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))
    padding = sum(int((~batch.kept).sum()) for batch in batches)
    assert padding < 0.05 * sum(batch.tokens.numel() for batch in batches)


@pytest.mark.parametrize("causal", [True, False])
def test_every_batch_can_be_the_first_again(causal, monkeypatch):
    monkeypatch.setattr(sequences, "WINDOW", 5)
    batches = make_batches(make_texts(150), causal=causal, seed=3)
    every = list(batches.iterate())
    assert len(every) > 6 * 5
    for number, batch in enumerate(every):
        assert batch.cursor.batch == number
        rest = list(batches.iterate(batch.cursor))
        assert len(rest) == len(every) - number
        for again, first in zip(rest[:20], every[number:], strict=False):
            assert again.cursor == first.cursor
            assert again.following == first.following
            for name in ("tokens", "kept", "doc_id", "position"):
                assert torch.equal(getattr(again, name), getattr(first, name))
    assert every[-1].following.rows == len(rows_of(every))
    assert every[-1].following.empty == 21  # the numbers below 150 that are 3 modulo 7


def test_excluded_special_tokens_are_read_but_not_kept():
    texts = make_texts()
    kept = rows_of(make_batches(texts, exclude=True).iterate())
    every = rows_of(make_batches(texts).iterate())
    assert kept == [row for row in every if row[2] != BOS]
    encoder = rows_of(make_batches(texts, causal=False, exclude=True).iterate())
    assert not {token for *_, token in encoder} & {CLS, SEP}
    assert len(encoder) == len(kept)


def test_an_unknown_word_is_text():
    rows = rows_of(make_batches(["the zebra sat"], exclude=True).iterate())
    assert [token for *_, token in rows] == [VOCABULARY[w] for w in ("the", "[UNK]", "sat")]


def test_a_part_of_the_documents():
    texts = make_texts()
    batches = make_batches(texts, start=10, stop=20)
    assert {number for number, *_ in rows_of(batches.iterate())} == {
        number for number in range(10, 20) if number % 7 != 3
    }


def test_shuffled_documents_keep_their_numbers():
    texts = make_texts()
    rows = rows_of(make_batches(texts, seed=5).iterate())
    assert sorted(rows) == rows_of(make_batches(texts).iterate())
    assert rows != sorted(rows)
    assert rows == rows_of(make_batches(texts, seed=5).iterate())


@pytest.mark.slow
def test_worker_processes_give_the_same():
    texts = make_texts(300)
    alone = rows_of(make_batches(texts).iterate())
    assert rows_of(make_batches(texts, processes=2).iterate()) == alone


def children():
    """Return the child processes that still run."""
    return {child.pid for child in multiprocessing.active_children()}


@pytest.mark.slow
def test_a_worker_process_that_is_ended_is_one_line():
    batches = make_batches(make_texts(4000), processes=2).iterate()
    next(batches)
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"^num_proc: a process that tokenises was ended$"):
        list(batches)


@pytest.mark.slow
def test_a_worker_process_leaves_signals_to_its_parent():
    context = multiprocessing.get_context("spawn")
    with (
        tokens._stored(make_tokenizer(True)) as path,
        ProcessPoolExecutor(1, context, initializer=tokens._begin_worker, initargs=(path,)) as pool,
    ):
        expected = tokens.tokenise(make_tokenizer(True), ["the cat"])[0].tolist()
        for _ in range(2):
            assert (
                pool.submit(tokens._encode_here, [0], ["the cat"]).result()[0].tokens.tolist()
                == expected
            )
            for pid in children():
                os.kill(pid, signal.SIGINT)
                os.kill(pid, signal.SIGTERM)


@pytest.mark.slow
def test_worker_processes_end_with_the_iterator():
    batches = make_batches(make_texts(1000), processes=2).iterate()
    next(batches)
    assert children()
    batches.close()
    assert not children()


# Prints its worker processes, and waits until it is killed.
WITH_WORKERS = """
import multiprocessing, time
from small_texts import make_batches, make_texts
if __name__ == "__main__":
    batches = make_batches(make_texts(1000), processes=2).iterate()
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_worker_processes_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(WITH_WORKERS)
    parent = warm_python.Process(
        [tmp_path / "script.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = parent.stdout.readline().split()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert workers
    deadline = time.monotonic() + 120
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))


def runs(pid):
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_few_documents_start_no_processes(monkeypatch):
    monkeypatch.setattr(tokens, "ProcessPoolExecutor", None)
    texts = make_texts(tokens.CHUNK)
    alone = rows_of(make_batches(texts).iterate())
    assert rows_of(make_batches(texts, processes=2).iterate()) == alone


@pytest.mark.parametrize("name", ["ctx_len", "batch_size"])
def test_sizes_are_checked(name):
    values = {"ctx_len": 4, "batch_size": 4, "pack": True, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        SequenceConfig(**values)


def test_a_context_of_special_tokens_only_is_refused():
    with pytest.raises(ValueError, match=r"ctx_len must leave room beside 2 special tokens, got 2"):
        make_batches(causal=False, ctx_len=2)
