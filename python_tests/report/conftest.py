"""The figures that tests of plots look at."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are written."""
    found: list[Figure] = []
    write = Figure.savefig

    def note(figure: Figure, *arguments: object, **options: object) -> None:
        found.append(figure)
        write(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", note)
    return found
