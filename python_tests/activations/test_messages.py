"""Names in messages, which stay one line."""

import pytest

from sae_fast.activations.errors import listed


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b"], "a and b"),
        (["a", "b", "c"], "a, b and c"),
        (["a", "b", "c", "d"], "a, b, c and 1 more"),
        (["a"] * 2003, "a, a, a and 2,000 more"),
        (["x" * 500], "x" * 80 + "…"),
    ],
)
def test_names_are_joined_as_a_sentence_has_them(names, text):
    assert listed(names, 3) == text
