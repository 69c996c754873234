"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], texts: int | None = None
) -> str:
    """Return a table; bars and line breaks inside of cells do not end them.

    Args:
        headings: of the columns.
        rows: with a cell for each column.
        texts: how many of the first columns are text, after which come numbers, which stand at the
            right; None: all.
    """
    texts = len(headings) if texts is None else texts
    rule = ["---"] * texts + ["---:"] * (len(headings) - texts)
    lines = [map(_cell, headings), rule, *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.splitlines()).replace("|", "\\|")
