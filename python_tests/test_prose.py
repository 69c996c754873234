"""tools/prose.py, which `make lint` runs on the repository, finds each kind of unclear text."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "prose.py"
if not TOOL.exists():
    pytest.skip("no checkout: the tools are not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def prose():
    """Import the tool."""
    specification = importlib.util.spec_from_file_location("prose", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


PHRASES = {
    "nobody": "a row that nobody reads",
    "whoever": "a copy for whoever asks",
    "everybody": "the same weights for everybody",
    "someone": "until someone reads it",
    "contestants": "all contestants take a step",
    "likewise": "reconstruct likewise",
    "the same of": "the same of the targets",
    "to be had": "memory is not to be had",
    "what the code is to": "what the code is to model",
    "That of": "That of the threshold",
    "those of": "the rows are those of a shard",
    "of which there is no": "rows of which there is no number",
    "so many": "after so many rows",
    "from which on": "the row from which on it differs",
    "goes on with": "it goes on with the next shard",
    "for want of": "negative for want of a ReLU",
    "tells of": "the name tells of its place",
    "another than": "a result that is another than before",
    "as are": "latents are sorted, as are tokens",
    "so are the": "codes are joined, so are the rows",
    "would else": "threads would else wait",
    "Return … Return": "Return the rows, Return their number",
    "twice": "the sum of of a row",
    "Were the": "It stops. Were the copy kept, it would crash",
}
PLAIN = (
    "Return the rows of a shard, so that every one of them is read once.",
    "At least as many as are dead; so are not counted here. Any one of these suffices.",
    "The result is that which offers the rows, on what it offers.",
    "It becomes offset by one. Somewhere the rows differ.",
)


@pytest.mark.parametrize("sentence", PHRASES.values(), ids=PHRASES)
def test_a_phrase_is_found_in_text_comment_and_docstring(prose, sentence):
    assert len(list(prose.in_text("a.md", sentence))) == 1
    assert len(list(prose.in_python("a.py", f"x = 1  # {sentence}\n"))) == 1
    assert len(list(prose.in_python("a.py", f'class A:\n    """A class: {sentence}."""\n'))) == 1


@pytest.mark.parametrize("sentence", PHRASES.values(), ids=PHRASES)
def test_a_phrase_is_found_in_a_message_of_the_package(prose, sentence):
    error = f'raise ValueError(f"{{path}}: {sentence}")\n'
    assert len(list(prose.in_python("sae_fast/a.py", error))) == 1
    setting = f'class A:\n    """A class."""\n    k: int = 1\n    """{sentence}."""\n'
    assert len(list(prose.in_python("sae_fast/a.py", setting))) == 1
    assert list(prose.in_python("python_tests/a.py", error)) == []


@pytest.mark.parametrize("sentence", PLAIN)
def test_plain_sentences_pass(prose, sentence):
    assert list(prose.in_text("a.md", sentence)) == []
    assert list(prose.in_python("a.py", f"# {sentence}\n")) == []


def test_phrases_are_found_over_line_ends_with_the_line_they_begin_in(prose):
    assert list(prose.in_text("a.md", "first\nrows are those\nof a shard")) == [
        "a.md:2: 'those of' makes readers guess"
    ]
    comments = "x = 1\n# The rows are those\n# of a shard.\n"
    assert list(prose.in_python("a.py", comments)) == ["a.py:2: 'those of' makes readers guess"]


def test_comments_beside_code_are_separate(prose):
    assert list(prose.in_python("a.py", "x = 1  # rows like those\ny = 2  # of a shard\n")) == []


def test_comments_of_cpp_are_read_and_its_code_is_not(prose):
    code = "// The rows are those\n// of a shard.\nint f();  // what f is\n"
    code += 'const char* kLink = "https://those of a shard";\n// What a shard holds.\n'
    assert list(prose.in_cpp("a.h", code)) == [
        "a.h:1: 'those of' makes readers guess",
        "a.h:5: the comment starts with 'What' and makes readers guess",
    ]


def test_text_in_backquotes_is_left_out(prose):
    assert list(prose.in_text("a.md", "The error `these are not those of the run` ends it.")) == []


@pytest.mark.parametrize("word", ["What", "Whether", "How", "Which", "Who"])
def test_comments_and_docstrings_do_not_begin_with_a_question_word(prose, word):
    finding = f"starts with {word!r} and makes readers guess"
    (comment,) = prose.in_python("a.py", f"# {word} a shard holds.\n")
    assert comment == f"a.py:1: the comment {finding}"
    (docstring,) = prose.in_python("a.py", f'"""{word} a shard holds."""\n')
    assert docstring == f"a.py:1: the docstring {finding}"


def test_where_begins_a_sentence_and_no_fragment(prose):
    assert (
        list(prose.in_python("a.py", "# Where shards are compressed, the processor works.\n")) == []
    )
    (finding,) = prose.in_python("a.py", "# Where the blocks of a model are.\n")
    assert "the comment starts with 'Where'" in finding


def test_a_property_may_begin_with_whether_and_a_function_must_begin_with_a_verb(prose):
    head = "class A:\n    @property\n    def b(self):\n"
    assert list(prose.in_python("a.py", f'{head}        """Whether it is so."""\n')) == []
    (finding,) = prose.in_python("a.py", f'{head}        """What it is."""\n')
    assert finding == "a.py:3: the docstring starts with 'What' and makes readers guess"
    function = 'def f():\n    """The rows of a shard."""\n'
    (finding,) = prose.in_python("a.py", function)
    assert finding == "a.py:1: f's docstring starts with 'The', not with a verb"
    assert list(prose.in_python("a.py", 'def f():\n    """Return the rows of a shard."""\n')) == []


def test_a_test_states_a_fact_and_its_helpers_begin_with_a_verb(prose):
    fact = 'def test_rows():\n    """The rows are read once."""\n'
    assert list(prose.in_python("test_a.py", fact)) == []
    assert len(list(prose.in_python("test_a.py", fact.replace("test_", "read_")))) == 1
