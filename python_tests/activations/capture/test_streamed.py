"""Streams of documents: their order, how far they are read, and captures of them."""

import json
import os
from pathlib import Path

import pytest
from captured import assert_same_shards, capture, make_inputs, shards
from small_models import WORDS, make_tokenizer, save_model

from sae_fast.activations.capture import load_documents, opening
from sae_fast.activations.capture.streamed import SHUFFLED_DOCUMENTS, StreamedDocuments
from sae_fast.activations.source import check_state
from sae_fast.capture import main

COUNT = 2 * SHUFFLED_DOCUMENTS + 300
STREAMED = ("--streaming", "always")


@pytest.fixture
def texts(tmp_path):
    """Write three files with numbered documents of one to four words."""
    names = [f"{WORDS[n % 7]} " * (n % 4 + 1) for n in range(COUNT)]
    for number in range(3):
        part = names[number * 800 : (number + 1) * 800]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / f"{number}.jsonl").write_text(lines)
    return str(tmp_path / "*.jsonl"), names


def test_a_stream_has_every_document_once_in_blocks(texts):
    pattern, names = texts
    documents = load_documents(pattern, shuffle_seed=3, streaming="always")
    assert isinstance(documents, StreamedDocuments)
    assert documents.count is None
    numbers, found = documents.read(0, COUNT + 50)
    assert [names[number] for number in numbers] == found
    for begin in range(0, COUNT, SHUFFLED_DOCUMENTS):
        block = numbers[begin : begin + SHUFFLED_DOCUMENTS].tolist()
        assert sorted(block) == [*range(begin, min(COUNT, begin + SHUFFLED_DOCUMENTS))] != block
    # Any place again, forwards and backwards, also from the beginning of a new stream.
    other = load_documents(pattern, shuffle_seed=3, streaming="always")
    for start, stop in ((COUNT - 20, COUNT + 5), (990, 1010), (0, 3), (1500, 1500)):
        for stream in (documents, other):
            some, parts = stream.read(start, stop)
            assert some.tolist() == numbers[start:stop].tolist()
            assert parts == found[start:stop]
    assert documents.fingerprint() == other.fingerprint()
    plain = load_documents(pattern, streaming="always")
    assert plain.read(0, 9)[0].tolist() == [*range(9)]
    assert plain.fingerprint() == documents.fingerprint()


def test_a_stream_of_files_elsewhere_is_not_copied(tmp_path, monkeypatch):
    import fsspec

    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))
    place = f"memory://streamed_{os.getpid()}"
    for number in range(2):
        with fsspec.open(f"{place}/{number}.jsonl", "w") as file:
            file.write(json.dumps({"text": f"cat {number}"}) + "\n")
    for name, expected in (("1.jsonl", ["cat 1"]), ("*.jsonl", ["cat 0", "cat 1"])):
        documents = load_documents(f"{place}/{name}", streaming="always")
        assert documents.read(0, 9)[1] == expected
    assert [*cache.rglob("fetched")] == []


def bytes_of(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def test_a_few_tokens_of_a_large_set_write_no_copy_of_it(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "big").mkdir()
    for number in range(4):
        table = pyarrow.table({"text": [f"{WORDS[number]} " * 200] * 1500})
        path = tmp_path / "big" / f"{number}.parquet"
        pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    model = str(save_model(tmp_path / "llama", "llama"))
    monkeypatch.setattr(opening, "STREAMED_BYTES", bytes_of(tmp_path / "big") - 1)
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))
    command = [model, str(tmp_path / "big"), "--layers", "0", "--num-threads", "1"]
    assert main([*command, "--max-tokens", "1000", "--out", str(tmp_path / "out")]) == 0
    assert bytes_of(cache) < bytes_of(tmp_path / "big") / 100
    recipe = json.loads((tmp_path / "out" / "capture.json").read_text())
    assert recipe["dataset"]["documents"] is None
    # A smaller set, and one that is read to its end, are read as before.
    monkeypatch.setattr(opening, "STREAMED_BYTES", bytes_of(tmp_path / "big"))
    assert load_documents(str(tmp_path / "big"), streaming="auto").count == 6000


@pytest.fixture
def inputs(texts, tmp_path):
    return [str(save_model(tmp_path / "llama", "llama")), texts[0]]


class Killed(BaseException):
    """Ends a capture like a kill."""


def kill_behind_shard(monkeypatch, name):
    """End the capture when it has written a shard of this name."""
    rename = Path.replace

    def replace(path, target):
        result = rename(path, target)
        if Path(target).name == name:
            raise Killed
        return result

    monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.slow
def test_a_capture_of_a_stream_holds_the_first_documents_out_and_continues(
    inputs, tmp_path, monkeypatch
):
    assert capture(inputs, tmp_path / "whole", *STREAMED) == 0
    for killed_at in ("heldout_00.h5", "shard_00001.h5"):
        cut = tmp_path / killed_at
        with monkeypatch.context() as patched:
            kill_behind_shard(patched, killed_at)
            with pytest.raises(Killed):
                capture(inputs, cut, *STREAMED)
        assert capture(inputs, cut, *STREAMED) == 0
        assert_same_shards(tmp_path / "whole", cut)
    held_out = {
        int(number)
        for name, (rows, _) in shards(tmp_path / "whole").items()
        if "heldout" in name
        for number in rows["doc_id"]
    }
    others = {
        int(number)
        for name, (rows, _) in shards(tmp_path / "whole").items()
        if "heldout" not in name
        for number in rows["doc_id"]
    }
    assert held_out
    assert others
    assert not held_out & others
    numbers, _ = load_documents(inputs[1], shuffle_seed=42, streaming="always").read(0, 1000)
    assert set(numbers[: len(held_out)].tolist()) == held_out


def test_a_stream_that_ends_before_is_captured_to_its_end(inputs, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"text": "the cat"}\n{"text": "sat"}\n')
    command = [inputs[0], str(tmp_path / "few.jsonl"), "--layers", "0", "--max-tokens", "100"]
    assert main([*command, *STREAMED, "--out", str(tmp_path / "out")]) == 0
    rows = shards(tmp_path / "out")["residual.0/shard_00000.h5"][0]
    tokens = make_tokenizer(True)(["the cat", "sat"], add_special_tokens=False)["input_ids"]
    assert len(rows["token_ids"]) == sum(len(part) + 1 for part in tokens)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--streaming", "always"], "streaming = 'always' needs max_tokens"),
        (
            ["--streaming", "always", "--max-tokens", "9", "--split", "train[:5]"],
            "a part of a split has a length",
        ),
        (
            [*STREAMED, "--max-tokens", "9", "--heldout-tokens", "99999999"],
            "heldout_tokens must leave documents to train on, got 99,999,999",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_refused_in_one_line(tmp_path, capsys, flags, message):
    model, data = make_inputs(tmp_path)
    assert main([model, data, "--layers", "0", *flags, "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(("before", "now"), [("never", "always"), ("always", "never")])
def test_a_capture_that_was_read_in_another_way_names_the_flag(
    inputs, tmp_path, capsys, before, now
):
    assert capture(inputs, tmp_path / "out", "--streaming", before) == 0
    capsys.readouterr()
    assert capture(inputs, tmp_path / "out", "--streaming", now) == 2
    assert f"stream, --streaming {before} continues it" in capsys.readouterr().err
    assert capture(inputs, tmp_path / "out", "--streaming", before) == 0


def test_a_position_that_was_read_in_another_way_names_the_flag():
    known = {"name": "texts", "documents": 9}
    state = {"version": 1, "identity": {"dataset": known}}
    with pytest.raises(ValueError, match=r"dataset changed: .*--streaming never continues it"):
        check_state(state, 1, {}, {"dataset": {**known, "documents": None}})
