"""Conversations: the tokens that a template gives, and which of them belong to which role."""

import json

import numpy as np
import pytest
from captured import all_rows
from small_models import make_tokenizer, save_model
from small_texts import rows_of

from sae_fast.activations.capture import (
    Documents,
    SequenceConfig,
    TokenBatches,
    Tokenisation,
    special_tokens,
)
from sae_fast.activations.capture.conversations import open_chat_template
from sae_fast.activations.capture.documents import Kind
from sae_fast.activations.capture.opening import load_documents
from sae_fast.capture import main

# Headers are words of the small tokenizer: "far" opens a message, "away" ends it.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}far {{ m['role'] }} "
    "{{ m['content'] | trim }} away {% endfor %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}far {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} away{% endgeneration %} "
    "{% else %}{{ m['content'] }} away {% endif %}{% endfor %}"
)
TALKS = [
    [
        {"role": "system", "content": "the cat"},
        {"role": "user", "content": "  far dog sat "},
        {"role": "assistant", "content": "a mat away ."},
        {"role": "user", "content": "dog"},
        {"role": "assistant", "content": "dog far"},
    ],
    [{"role": "user", "content": "sat"}],
    [],
    [{"role": "assistant", "content": "ran"}, {"role": "user", "content": ""}],
]


def expected_of(tokenizer, talk, roles, *, end_of_assistant=False):
    """Return tokens and mask of a conversation, written word by word without the template."""
    words, wanted = ["<s>"], [not roles]
    for message in talk:
        is_wanted = not roles or message["role"] in roles
        content = message["content"].split()
        header = ["far"] if end_of_assistant else ["far", message["role"]]
        words += [*header, *content, "away"]
        ends = is_wanted if end_of_assistant and message["role"] == "assistant" else not roles
        wanted += [not roles] * len(header) + [is_wanted] * len(content) + [ends]
    return tokenizer.convert_tokens_to_ids(words), wanted


def chat_of(tmp_path, template, roles=(), tokenizer=None):
    path = tmp_path / "chat.jinja"
    path.write_text(template)
    return open_chat_template(tokenizer or make_tokenizer(True), str(path), roles)


@pytest.mark.parametrize(
    "roles",
    [(), ("assistant",), ("user",), ("system", "assistant"), ("assistant,user",)],
)
def test_each_role_has_the_tokens_of_its_content(tmp_path, roles):
    chat = chat_of(tmp_path, PLAIN, roles)
    for number, talk in enumerate(TALKS):
        document = chat.encode(talk, number)
        tokens, wanted = expected_of(chat.tokenizer, talk, chat.roles) if talk else ([], [])
        assert document.tokens.tolist() == tokens
        if roles:
            kept = [] if document.wanted is None else document.wanted.tolist()
            assert kept == wanted


@pytest.mark.parametrize("roles", [("assistant",), ("assistant", "user")])
def test_the_part_that_a_template_marks_is_the_assistants(tmp_path, roles):
    chat = chat_of(tmp_path, MARKED, roles)
    talk = [{**message, "content": message["content"].strip()} for message in TALKS[0]]
    document = chat.encode(talk, 0)
    tokens, wanted = expected_of(chat.tokenizer, talk, roles, end_of_assistant=True)
    assert document.tokens.tolist() == tokens
    assert document.wanted.tolist() == wanted
    if roles == ("assistant",):
        theirs = chat.tokenizer.apply_chat_template(
            talk,
            chat_template=chat.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert document.tokens.tolist() == theirs["input_ids"]
        assert document.wanted.tolist() == [bool(n) for n in theirs["assistant_masks"]]


def test_messages_as_sharegpt_has_them_are_read(tmp_path):
    chat = chat_of(tmp_path, PLAIN, ("assistant",))
    talk = [
        {"from": "human", "value": "the cat", "role": None},
        {"from": "gpt", "value": "sat on", "role": None},
    ]
    same = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}]
    one, other = chat.encode(talk, 0), chat.encode(same, 0)
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.wanted.tolist() == other.wanted.tolist()
    assert one.wanted.sum() == 2


def test_a_template_that_writes_the_date_writes_one_that_stays(tmp_path):
    chat = chat_of(tmp_path, "{{ strftime_now('%Y') }}" + PLAIN)
    assert "strftime_now" not in chat.template
    assert "'2024'" in chat.template
    assert len(chat.encode(TALKS[1], 0)) == 6


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("exclude", [True, False])
def test_batches_keep_the_tokens_of_the_roles_and_of_no_other(tmp_path, pack, exclude):
    chat = chat_of(tmp_path, PLAIN, ("assistant",))
    special = special_tokens(chat.tokenizer, causal=True).without_surroundings()
    documents = Documents(TALKS * 3, kind=Kind.CONVERSATIONS)
    tokens = Tokenisation(chat.tokenizer, special, chat=chat)
    batches = TokenBatches(documents, tokens, SequenceConfig(8, 2, pack, exclude))
    expected = []
    for number, talk in enumerate(TALKS * 3):
        ids, wanted = expected_of(chat.tokenizer, talk, chat.roles) if talk else ([], [])
        expected += [(number, place, ids[place]) for place in np.flatnonzero(wanted)]
    assert sorted(rows_of(batches.iterate())) == expected
    counted = [batches.kept_of(item) for *_, item in tokens.iterate(documents, 0, len(documents))]
    assert sum(counted) == len(expected)
    last = [*batches.iterate()][-1]
    assert last.following.rows == len(expected)
    assert last.following.empty == 3


def write_talks(path, talks, column="messages"):
    path.write_text("".join(json.dumps({"id": "a", column: talk}) + "\n" for talk in talks))
    return str(path)


def test_a_capture_stores_the_rows_of_a_role(tmp_path):
    model = save_model(tmp_path / "llama", "llama")
    tokenizer = make_tokenizer(True)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(model)
    data = write_talks(tmp_path / "talks.jsonl", TALKS * 5)
    base = [str(model), data, "--layers", "1", "--num-threads", "1", "--dtype", "float32"]
    chat = ["--chat-template", "--roles", "assistant,user"]
    assert main([*base, "--chat-template", "--out", str(tmp_path / "all")]) == 0
    assert main([*base, *chat, "--out", str(tmp_path / "some")]) == 0
    assert main([*base, *chat, "--out", str(tmp_path / "some")]) == 0  # it is complete
    every = all_rows(tmp_path / "all" / "residual.1")
    some = all_rows(tmp_path / "some" / "residual.1")
    expected = set()
    for number, talk in enumerate(TALKS * 5):
        ids, wanted = expected_of(tokenizer, talk, ("assistant", "user")) if talk else ([], [])
        expected |= {(number, int(place), ids[place]) for place in np.flatnonzero(wanted)}
    assert set(some) == expected
    assert len(every) == sum(len(expected_of(tokenizer, talk, ())[0]) for talk in TALKS * 5 if talk)
    for key, row in some.items():
        np.testing.assert_array_equal(row, every[key])
    recipe = json.loads((tmp_path / "some" / "capture.json").read_text())
    assert recipe["dataset"]["chat"]["roles"] == ["assistant", "user"]
    assert recipe["dataset"]["text_column"] == "messages"


def test_another_template_or_other_roles_are_another_capture(tmp_path, capsys):
    model = save_model(tmp_path / "llama", "llama")
    data = write_talks(tmp_path / "talks.jsonl", TALKS * 5)
    (tmp_path / "chat.jinja").write_text(PLAIN)
    base = [str(model), data, "--layers", "1", "--chat-template", str(tmp_path / "chat.jinja")]
    out = ["--out", str(tmp_path / "out")]
    assert main([*base, *out]) == 0
    assert main([*base, "--roles", "user", *out]) == 2
    assert "holds another capture: its dataset is" in capsys.readouterr().err


def test_a_column_of_conversations_is_found(tmp_path):
    path = write_talks(tmp_path / "a.jsonl", TALKS, "conversations")
    documents = load_documents(path, conversations=True)
    assert documents.column == "conversations"
    numbers, talks = documents.read(0, 9)
    assert numbers.tolist() == [0, 1, 2, 3]
    assert [[m["content"] for m in talk] for talk in talks] == [
        [m["content"] for m in talk] for talk in TALKS
    ]
    path = write_talks(tmp_path / "b.jsonl", TALKS, "turns")
    assert load_documents(path, conversations=True).column == "turns"


TWICE = "{% for m in messages %}{{ m['content'] }} {{ m['content'] }}{% endfor %}"
CHANGED = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
STRICT = "{{ raise_exception('roles must alternate') }}"


@pytest.mark.parametrize(
    ("template", "flags", "message"),
    [
        (TWICE, ["--roles", "user"], "conversation 0: which tokens are a role's cannot be told"),
        (CHANGED, ["--roles", "user"], "cannot be told"),
        (STRICT, [], "conversation 0: the template refuses it: roles must alternate"),
        ("{% for %}", [], "is no template"),
        (PLAIN, ["--roles", "asistant"], "is of asistant; there are assistant, system, user"),
        (PLAIN, ["--text-column", "id"], "has no column of conversations 'id'"),
        (PLAIN, ["--tokens-column", "id"], "give one of the two"),
        (None, ["--roles", "user"], "needs chat_template"),
        (None, ["--chat-template"], "the tokenizer has no template of its own"),
        (None, ["--chat-template", "nowhere.jinja"], "must be 'tokenizer' or the path of a Jinja"),
    ],
)
def test_what_cannot_be_told_is_refused_in_one_line(tmp_path, capsys, template, flags, message):
    model = save_model(tmp_path / "llama", "llama")
    data = write_talks(tmp_path / "talks.jsonl", TALKS)
    if template is not None:
        (tmp_path / "chat.jinja").write_text(template)
        flags = [*flags, "--chat-template", str(tmp_path / "chat.jinja")]
    options = ["--layers", "0", "--shuffle-seed", "None", "--out", str(tmp_path / "out")]
    assert main([str(model), data, *options, *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.slow
def test_processes_tokenise_conversations_too(tmp_path):
    chat = chat_of(tmp_path, PLAIN, ("user",))
    special = special_tokens(chat.tokenizer, causal=True).without_surroundings()
    documents = Documents(TALKS * 20, kind=Kind.CONVERSATIONS)
    found = []
    for processes in (1, 2):
        tokens = Tokenisation(chat.tokenizer, special, processes, chat=chat)
        documents_of = tokens.iterate(documents, 0, len(documents))
        found.append(
            [
                (place, number, item.tokens.tolist(), item.wanted is None or item.wanted.tolist())
                for place, number, item in documents_of
            ]
        )
    assert found[0] == found[1]
