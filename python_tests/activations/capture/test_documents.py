"""Documents: every kind of dataset, its text column and order, and the errors for wrong ones."""

import json
import os

import pytest
from small_texts import make_texts

from sae_fast.activations.capture import Documents, load_documents

TEXTS = ["one cat", "two dogs", "", "four mats"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    cache = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


def write(folder, kind, texts=TEXTS):
    """Write texts as a user's file or folder of this kind; return its path."""
    import datasets

    path = folder / f"data.{kind}"
    table = datasets.Dataset.from_dict({"text": texts, "number": list(range(len(texts)))})
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif kind == "txt":
        path.write_text("".join(text + "\n" for text in texts))
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "csv":
        table.to_csv(path)
    elif kind == "saved":
        table.save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        write(path, "jsonl", texts)
    return str(path)


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "txt", "parquet", "csv", "saved", "splits", "folder"]
)
def test_every_kind_of_dataset_gives_its_texts(tmp_path, kind):
    numbers, texts = load_documents(write(tmp_path, kind)).read(0, 100)
    assert texts == TEXTS
    assert numbers.tolist() == [0, 1, 2, 3]


def test_a_pattern_of_files_is_one_dataset(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "jsonl", [name])
    documents = load_documents(str(tmp_path / "*" / "data.jsonl"))
    assert documents.read(0, 9)[1] == ["a", "b"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("line", ["a", "b", "", "c"]), ("paragraph", ["a\nb", "c"]), ("document", ["a\nb\n\nc\n"])],
)
def test_a_text_file_is_split_as_asked(tmp_path, split, expected):
    (tmp_path / "t.txt").write_text("a\nb\n\nc\n")
    documents = load_documents(str(tmp_path / "t.txt"), text_split=split)
    assert [text.strip("\n") for text in documents.read(0, 9)[1]] == [
        text.strip("\n") for text in expected
    ]


def test_a_seed_decides_the_order_and_numbers_are_those_of_the_dataset():
    texts = make_texts(100)
    numbers, found = Documents(texts, shuffle_seed=4).read(0, 100)
    assert sorted(numbers) == list(range(100)) != numbers.tolist()
    assert found == [texts[number] or "" for number in numbers]
    assert Documents(texts, shuffle_seed=4).read(30, 40)[0].tolist() == numbers[30:40].tolist()
    assert Documents(texts, shuffle_seed=5).read(0, 100)[0].tolist() != numbers.tolist()


def test_a_fingerprint_is_of_the_texts_wherever_they_are(tmp_path):
    fingerprint = load_documents(write(tmp_path, "jsonl")).fingerprint()
    assert fingerprint == load_documents(write(tmp_path, "parquet")).fingerprint()
    assert fingerprint == Documents(TEXTS, shuffle_seed=1).fingerprint()
    assert fingerprint != Documents([*TEXTS[:3], "four mat"]).fingerprint()
    assert fingerprint != Documents([*TEXTS, ""]).fingerprint()


def test_a_dataset_without_a_column_of_texts_called_text(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"body": "words", "n": 1}\n')
    assert load_documents(str(tmp_path / "one.jsonl")).read(0, 1)[1] == ["words"]
    (tmp_path / "two.jsonl").write_text('{"title": "t", "body": "words", "n": 1}\n')
    with pytest.raises(
        ValueError,
        match=r"two.jsonl has 2 columns of texts, none of them 'text': "
        r"name one with --text-column; it has title, body, n",
    ):
        load_documents(str(tmp_path / "two.jsonl"))
    chosen = load_documents(str(tmp_path / "two.jsonl"), text_column="body")
    assert chosen.read(0, 1)[1] == ["words"]
    with pytest.raises(ValueError, match=r"no column 'bod' \(did you mean body\?\); it has title,"):
        load_documents(str(tmp_path / "two.jsonl"), text_column="bod")
    with pytest.raises(ValueError, match=r"no column of texts 'n'"):
        load_documents(str(tmp_path / "two.jsonl"), text_column="n")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("/nowhere/x.jsonl", {}, r"/nowhere/x.jsonl cannot be read: no such file or folder"),
        ("/nowhere/x", {}, r"no such file or folder"),
        ("empty.jsonl", {}, r"empty.jsonl holds no documents"),
        ("data.jsonl", {"split": "trian"}, r"cannot be read: .*trian"),
        ("data.saved", {"split": "train"}, None),
        ("data.splits", {"split": "trian"}, r"no split 'trian', only train, test"),
        ("broken.parquet", {}, r"broken.parquet cannot be read: "),
        ("data.xyz", {}, r"a file must be one of .json, .*got .xyz"),
        ("someone/nothing", {}, r"someone/nothing cannot be read: "),
        ("data.jsonl", {"text_split": "word"}, r"text_split must be one of line, paragraph, doc"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_one_line(tmp_path, name, options, message):
    for kind in ("jsonl", "saved", "splits"):
        write(tmp_path, kind)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "data.xyz").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    path = str(tmp_path / name) if (tmp_path / name).exists() else name
    if message is None:
        assert len(load_documents(path, **options)) == 4
        return
    with pytest.raises(ValueError, match=message) as caught:
        load_documents(path, **options)
    assert "\n" not in str(caught.value)


def test_a_dataset_without_documents_is_refused():
    with pytest.raises(ValueError, match="dataset: documents has no documents"):
        Documents([])


MESSAGES = [{"role": "user", "content": "w2 w3"}, {"role": "assistant", "content": "w4"}]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"id": "w1", "messages": MESSAGES}, "'messages' holds conversations"),
        ({"id": "w1", "conversations": MESSAGES}, "apply_chat_template"),
        ({"input_ids": [1, 5, 6], "source": "w1"}, "'input_ids' holds tokens"),
        ({"sentences": ["a b", "c"], "source": "w1"}, "'sentences' holds lists"),
        ({"messages": MESSAGES}, "'messages' holds conversations"),
    ],
)
def test_a_column_of_strings_beside_lists_is_not_taken_for_the_documents(tmp_path, entry, said):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match="has no column 'text'") as error:
        load_documents(str(path))
    assert said in str(error.value)
    assert "--text-column" in str(error.value)


def test_a_column_that_is_named_is_taken_beside_lists_and_told(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"body": "a cat", "messages": MESSAGES}))
    documents = load_documents(str(path), text_column="body")
    assert (documents.read(0, 1)[1], documents.column) == (["a cat"], "body")
    path.write_text(json.dumps({"body": "a cat", "number": 1}))
    assert load_documents(str(path)).column == "body"
    path.write_text(json.dumps({"text": "a cat", "messages": MESSAGES}))
    assert load_documents(str(path)).column == "text"
    assert Documents(["a cat"]).column is None


def test_the_configurations_of_a_dataset_are_named_where_one_has_to_be_chosen(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    entries = "".join(
        f"- config_name: part_{name}\n  data_files: {name}.jsonl\n" for name in ("a", "b")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    with pytest.raises(ValueError, match="several configurations, part_a, part_b") as error:
        load_documents(str(tmp_path))
    assert "name one with --dataset-config" in str(error.value)
    assert load_documents(str(tmp_path), config="part_b").read(0, 1)[1] == ["b"]


def test_files_elsewhere_are_read_with_a_protocol_of_fsspec():
    import fsspec

    place = f"texts_{os.getpid()}"
    for number, text in enumerate(("a cat", "a dog")):
        with fsspec.open(f"memory://{place}/{number}.jsonl", "w") as file:
            file.write(json.dumps({"text": text}) + "\n")
    documents = load_documents(f"memory://{place}/1.jsonl")
    assert documents.read(0, 9)[1] == ["a dog"]
    assert load_documents(f"memory://{place}/*.jsonl").read(0, 9)[1] == ["a cat", "a dog"]
    with fsspec.open(f"memory://{place}/1.jsonl", "w") as file:
        file.write(json.dumps({"text": "two dogs"}) + "\n")
    assert load_documents(f"memory://{place}/1.jsonl").read(0, 9)[1] == ["two dogs"]
    for wrong in (f"memory://{place}/none.jsonl", f"memory://{place}/0.pdf", "nowhere://a.jsonl"):
        with pytest.raises(ValueError, match="cannot be read") as caught:
            load_documents(wrong)
        assert "\n" not in str(caught.value)
