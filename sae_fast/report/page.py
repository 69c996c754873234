"""`Page`: a report in one HTML file that loads nothing, for a screen of any width and for print.

Sections come one below another: tables whose rows carry their definitions, charts as inline SVG,
pictures as data, and contexts of latents. All texts are escaped, and the page forbids itself every
request, so that a token which looks like markup is shown as it is. In sentences and definitions
`name` between backticks is code, as in the Markdown files beside the page.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

from sae_fast.atomic_files import write_text
from sae_fast.report.charts import Chart

REPORT = "report.html"
_CODE = re.compile("`([^`]+)`")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: at the left, as code.
        cells: the values.
        definition: below the name, in small letters.
    """

    name: str
    cells: tuple[str, ...]
    definition: str = ""


@dataclass
class Page:
    """A report that is put together section by section.

    Attributes:
        title: at the top.
        lines: below it, about what was measured.
    """

    title: str
    lines: Sequence[str] = ()
    _parts: list[str] = field(default_factory=list)
    _headings: list[str] = field(default_factory=list)

    def heading(self, text: str, about: str = "") -> None:
        """Begin a section."""
        self._headings.append(text)
        self._parts.append(f'<h2 id="{_anchor(text)}">{escape(text)}</h2>')
        if about:
            self.paragraph(about)

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f'<p class="soft">{_prose(text)}</p>')

    def table(self, headings: Sequence[str], rows: Iterable[Row]) -> None:
        """Add a table; the first heading is above the names, the others above the cells."""
        first, *others = headings
        columns = "".join(f'<th class="number">{escape(other)}</th>' for other in others)
        lines = [f"<tr><th>{escape(first)}</th>{columns}</tr>"]
        for row in rows:
            below = f"<small>{_prose(row.definition)}</small>" if row.definition else ""
            cells = "".join(f'<td class="number">{escape(cell)}</td>' for cell in row.cells)
            lines.append(f"<tr><td><code>{escape(row.name)}</code>{below}</td>{cells}</tr>")
        kind = ' class="pairs"' if len(headings) == 2 else ""
        self._parts.append(f'<div class="scroll"><table{kind}>{"".join(lines)}</table></div>')

    def definitions(self, texts: Mapping[str, str]) -> None:
        """Add what names stand for, in small letters."""
        lines = (f"<code>{escape(name)}</code>: {_prose(text)}" for name, text in texts.items())
        self._parts.append(f'<p class="definitions">{"<br>".join(lines)}</p>')

    def charts(self, charts: Iterable[Chart]) -> None:
        """Add charts beside each other, as many as the width has room for."""
        figures = "".join(
            f"<figure><h3>{escape(chart.title)}</h3>{_legend(chart)}{chart.svg()}"
            f"<figcaption>{_prose(chart.about)}</figcaption></figure>"
            for chart in charts
        )
        self._parts.append(f'<div class="figures">{figures}</div>')

    def picture(self, png: bytes, text: str) -> None:
        """Add an image, the bytes of a PNG file, with the text that stands for it."""
        data = base64.b64encode(png).decode()
        self._parts.append(
            f'<figure><img alt="{escape(text)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(text)}</figcaption></figure>"
        )

    def contexts(
        self, title: str, about: str, contexts: Iterable[tuple[float, Sequence[str], int]]
    ) -> None:
        """Add a latent with its contexts.

        Args:
            title: of the latent.
            about: a line on it.
            contexts: of each the activation, the texts of the tokens, and the place of the token
                on which the latent is active.
        """
        lines = []
        for value, texts, place in contexts:
            shown = [escape(text.replace("\n", "↵")) for text in texts]
            bare = shown[place].lstrip(" ") or shown[place]
            blank = shown[place][: len(shown[place]) - len(bare)]
            shown[place] = f"{blank}<mark>{bare}</mark>"
            lines.append(f'<p class="context"><b>{value:7.3g}</b>  {"".join(shown)}</p>')
        self._parts.append(
            f'<div class="latent"><h3>{escape(title)}</h3><p class="soft">{escape(about)}</p>'
            f"{''.join(lines)}</div>"
        )

    def html(self) -> str:
        """Return the page."""
        style = files(__package__).joinpath("page.css").read_text("utf-8")
        links = "".join(f'<a href="#{_anchor(text)}">{escape(text)}</a>' for text in self._headings)
        lines = "".join(f'<p class="soft">{_prose(line)}</p>' for line in self.lines)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{style}</style></head><body>"
            f"<h1>{escape(self.title)}</h1>{lines}<nav>{links}</nav>"
            f"{chr(10).join(self._parts)}</body></html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write the page into a file, whole or not at all; return its path."""
        write_text(path, self.html())
        return path


def _prose(text: str) -> str:
    """Return a text of one's own as HTML, with the parts between backticks as code."""
    return _CODE.sub(r"<code>\1</code>", escape(text))


def _legend(chart: Chart) -> str:
    keys = "".join(
        f'<span class="entry"><span class="key {series.kind}" style="color:{colour}"></span>'
        f"{escape(series.label)}</span> "
        for series, colour in zip(chart.series, chart.colours(), strict=True)
        if series.label
    )
    return f'<p class="legend">{keys}</p>' if keys else ""


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
