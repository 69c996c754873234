"""Parameters of a test of which `make check` runs only the first."""

import pytest


def slow_after(count, values):
    """Return the values as parameters; all after the first `count` are marked slow."""
    return [
        value if number < count else pytest.param(value, marks=pytest.mark.slow)
        for number, value in enumerate(values)
    ]
