"""Charts as inline SVG: curves, points and histograms, in the colours of the page around them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 10, 40  # margins
_DIGITS, _DIGIT = 5, 7  # characters of a number that the left margin has room for, width of another
_ROOM = 0.03  # of an axis, between its ends and the outermost points
_TICKS = 5
_WIDE = 10.0  # from here on an axis that may be logarithmic is
_LEAST_SPAN = 2e-3  # of an axis that is not, as a share of its numbers: less is seldom a difference
_LETTER = 6.2  # width of a letter, about
_LINE = 12  # height of a line of letters
COLOURS = 12  # of page.css: --c0 to --c11
_RADII = {"rings": 6.0, "points": 3.0, "both": 3.0, "curve": 3.0}

# rings: hollow, so that points in them are seen; line: for comparison, dashed and without colour.
Kind = Literal["curve", "points", "rings", "both", "bars", "line"]


@dataclass(frozen=True)
class Series:
    """Numbers that are drawn in one colour.

    Attributes:
        points: x and y of each; of bars x is where a bar begins.
        label: in the legend; empty: it is not in it.
        kind: how they are drawn.
        names: a text for each point, shown when the pointer is over it.
        are_written: whether these texts stand beside the points too, where there is room.
        like: the place of the series whose colour it has; None: a colour of its own.
    """

    points: Sequence[tuple[float, float]]
    label: str = ""
    kind: Kind = "curve"
    names: Sequence[str] = ()
    are_written: bool = False
    like: int | None = None

    def finite(self) -> Series:
        """Return the series without points that have no value."""
        kept = [n for n, point in enumerate(self.points) if all(map(math.isfinite, point))]
        if len(kept) == len(self.points):
            return self
        names = [self.names[n] for n in kept] if self.names else ()
        return replace(self, points=[self.points[n] for n in kept], names=names)


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: what it shows.
        x, y: names of the axes, with units.
        series: what is drawn, at least one point.
        about: a line below it.
        may_be_logarithmic: whether an axis that spans a factor of 10 or more is logarithmic.
        bar_width: of bars, in units of x.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    about: str = ""
    may_be_logarithmic: tuple[bool, bool] = (False, False)
    bar_width: float = 0.0

    def colours(self) -> list[str]:
        """Return the colour of each series, in CSS."""
        found: list[str] = []
        own = itertools.count()
        for series in self.series:
            if series.like is not None:
                found.append(found[series.like])
            elif series.kind == "line":
                found.append("var(--soft)")
            else:
                found.append(f"var(--c{next(own) % COLOURS})")
        return found

    def svg(self) -> str:
        """Return the chart as an SVG element, or a line where no point has a value."""
        drawn = [series.finite() for series in self.series]
        has_bars = any(series.kind == "bars" for series in drawn)
        points = [point for series in drawn for point in series.points]
        if not points:
            return '<p class="soft">There is no value to draw.</p>'
        room = 0.0 if has_bars else _ROOM
        vertical = _Axis(
            [*(p[1] for p in points), *([0.0] if has_bars else [])],
            *(_HEIGHT - _BOTTOM, _TOP, self.may_be_logarithmic[1], room),
        )
        longest = max((len(text) for _, text in vertical.ticks()), default=0)
        left = _LEFT + _DIGIT * max(0, longest - _DIGITS)
        horizontal = _Axis(
            [*(p[0] for p in points), *(p[0] + self.bar_width for p in points if has_bars)],
            *(left, _WIDTH - _RIGHT, self.may_be_logarithmic[0], room),
        )
        parts = [*_grid(horizontal, vertical, left, self.x, self.y)]
        # Lines for comparison are below all else, and rings round the points that are in them.
        coloured = list(zip(drawn, self.colours(), strict=True))
        for series, colour in sorted(coloured, key=lambda item: item[0].kind != "line"):
            parts += _drawn(series, colour, horizontal, vertical, self.bar_width)
        parts += _written(drawn, horizontal, vertical)
        return (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(self.title)}</title>'
            f"{''.join(parts)}</svg>"
        )


def histogram(
    edges: Sequence[float], counts: Sequence[int], *, title: str, x: str, about: str
) -> Chart:
    """Return the chart of a histogram with intervals of one width.

    Args:
        edges: of the intervals, one more than there are counts.
        counts: in each interval.
        title: what it shows.
        x: the name of the axis.
        about: a line below it.
    """
    bars = Series(list(zip(edges[:-1], map(float, counts), strict=True)), kind="bars")
    width = (edges[-1] - edges[0]) / len(counts)
    return Chart(title, x, "latents", [bars], about, bar_width=width)


class _Axis:
    """Places numbers between two ends of the drawing."""

    def __init__(
        self,
        values: Sequence[float],
        start: float,
        end: float,
        may_be_logarithmic: bool,
        room: float,
    ) -> None:
        low, high = min(values), max(values)
        self._is_logarithmic = may_be_logarithmic and low > 0 and high / low >= _WIDE
        if self._is_logarithmic:
            low, high = math.log10(low), math.log10(high)
        if high <= low:
            low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
        elif not self._is_logarithmic:
            missing = _LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
            low, high = low - max(missing, 0.0) / 2, high + max(missing, 0.0) / 2
        margin = room * (high - low)
        self._low, self._high = low - margin, high + margin
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        """Return where a number is."""
        value = math.log10(value) if self._is_logarithmic else value
        share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return numbers to write at the axis, with their texts."""
        found = self._numbers()
        if self._is_logarithmic or len(found) < 2:
            return [(tick, _shown(tick)) for tick in found]
        largest, step = max(map(abs, found)), found[1] - found[0]
        return [(tick, _with_digits(tick, largest, step)) for tick in found]

    def _numbers(self) -> list[float]:
        if self._is_logarithmic:
            steps = (1, 2, 5) if self._high - self._low < 3 else (1,)
            exponents = range(math.floor(self._low), math.ceil(self._high) + 1)
            every = max(1, math.ceil(len(exponents) / 6)) if len(steps) == 1 else 1
            found = [m * 10.0**e for e in exponents if e % every == 0 for m in steps]
            return [t for t in found if self._low <= math.log10(t) + 1e-9 <= self._high + 2e-9]
        step = _nice((self._high - self._low) / _TICKS)
        first = math.ceil(self._low / step - 1e-9)
        last = math.floor(self._high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _nice(step: float) -> float:
    """Return 1, 2 or 5 times a power of ten, near a step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


def _grid(horizontal: _Axis, vertical: _Axis, left: int, x: str, y: str) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick, text in vertical.ticks():
        place = vertical.place(tick)
        parts.append(f'<path class="grid" d="M{left} {place:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{place + 4:.1f}" text-anchor="end">{text}</text>')
    for tick, text in horizontal.ticks():
        place = horizontal.place(tick)
        parts.append(f'<path class="axis" d="M{place:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{place:.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    middle = (left + right) / 2
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
        f'<text x="12" y="{(_TOP + bottom) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {(_TOP + bottom) / 2})">{escape(y)}</text>'
    )
    return parts


def _drawn(
    series: Series, colour: str, horizontal: _Axis, vertical: _Axis, bar_width: float
) -> list[str]:
    parts = []
    if series.kind == "bars":
        floor = vertical.place(0)
        for left, height in series.points:
            begin, end = horizontal.place(left), horizontal.place(left + bar_width)
            top = vertical.place(height)
            parts.append(
                f'<rect x="{begin + 0.5:.1f}" y="{top:.1f}" width="{max(end - begin - 1, 1):.1f}" '
                f'height="{floor - top:.1f}" style="fill:{colour}"><title>{_shown(left)} to '
                f"{_shown(left + bar_width)}: {_shown(height)}</title></rect>"
            )
        return parts
    places = [(horizontal.place(px), vertical.place(py)) for px, py in series.points]
    if series.kind in ("curve", "both", "line") and len(places) > 1:
        line = "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        kind = "line" if series.kind == "line" else "curve"
        parts.append(f'<path class="{kind}" style="stroke:{colour}" d="M{line}"/>')
    if series.kind in ("points", "rings", "both") or (series.kind == "curve" and len(places) == 1):
        paint = "stroke" if series.kind == "rings" else "fill"
        kind = ' class="ring"' if series.kind == "rings" else ""
        for number, (px, py) in enumerate(places):
            name = series.names[number] if series.names else series.label
            parts.append(
                f'<circle{kind} cx="{px:.1f}" cy="{py:.1f}" r="{_RADII[series.kind]:g}" '
                f'style="{paint}:{colour}"><title>{escape(name)}</title></circle>'
            )
    return parts


def _written(drawn: Sequence[Series], horizontal: _Axis, vertical: _Axis) -> list[str]:
    """Return the names of points beside them; a name that would cover another one is left out."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []  # left, right and height on the page
    for series in drawn:
        if not series.are_written:
            continue
        for name, (x, y) in zip(series.names, series.points, strict=True):
            px, py, width = horizontal.place(x), vertical.place(y), _LETTER * len(name)
            is_left = px + 9 + width > _WIDTH - _RIGHT
            left = px - 9 - width if is_left else px + 9
            if any(left < b and left + width > a and abs(py - h) < _LINE for a, b, h in taken):
                continue
            taken.append((left, left + width, py))
            anchor, at = ("end", px - 9) if is_left else ("start", px + 9)
            parts.append(
                f'<text x="{at:.1f}" y="{py - 4:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
            )
    return parts


def _with_digits(value: float, largest: float, step: float) -> str:
    """Return a number of an axis with as many digits as tell it from the next one."""
    if value == 0:
        return "0"
    if largest < 1e-3:
        digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step)))
        return f"{value:.{digits}e}".replace("e-0", "e-")
    units = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    unit, letter = next((u for u in units if u[0] <= largest and largest >= 1e4), (1.0, ""))
    digits = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    return f"{value / unit:,.{digits}f}{letter}"


def _shown(value: float) -> str:
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000:
        for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= unit:
                return f"{value / unit:g}{letter}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")
