"""Charts as inline SVG: curves, points and histograms, in the colours of the page around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 10, 40  # margins
_ROOM = 0.03  # of an axis, between its ends and the outermost points
_TICKS = 5
_WIDE = 10.0  # from here on an axis that may be logarithmic is

Kind = Literal["curve", "points", "both", "bars"]


@dataclass(frozen=True)
class Series:
    """Numbers that are drawn in one colour.

    Attributes:
        points: x and y of each; of bars x is where a bar begins.
        label: in the legend; empty: it is not in it.
        kind: how they are drawn.
        names: a text for each point, shown when the pointer is over it.
    """

    points: Sequence[tuple[float, float]]
    label: str = ""
    kind: Kind = "curve"
    names: Sequence[str] = ()

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

    def svg(self) -> str:
        """Return the chart as an SVG element, or a line where no point has a value."""
        drawn = [series.finite() for series in self.series]
        has_bars = any(series.kind == "bars" for series in drawn)
        points = [point for series in drawn for point in series.points]
        if not points:
            return '<p class="soft">There is no value to draw.</p>'
        room = 0.0 if has_bars else _ROOM
        horizontal = _Axis(
            [*(p[0] for p in points), *(p[0] + self.bar_width for p in points if has_bars)],
            *(_LEFT, _WIDTH - _RIGHT, self.may_be_logarithmic[0], room),
        )
        vertical = _Axis(
            [*(p[1] for p in points), *([0.0] if has_bars else [])],
            *(_HEIGHT - _BOTTOM, _TOP, self.may_be_logarithmic[1], room),
        )
        parts = [*_grid(horizontal, vertical, self.x, self.y)]
        for number, series in enumerate(drawn):
            parts += _drawn(series, f"var(--c{number % 7})", horizontal, vertical, self.bar_width)
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
        margin = room * (high - low)
        self._low, self._high = low - margin, high + margin
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        """Return where a number is."""
        value = math.log10(value) if self._is_logarithmic else value
        share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Return numbers to write at the axis."""
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


def _grid(horizontal: _Axis, vertical: _Axis, x: str, y: str) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in vertical.ticks():
        place = vertical.place(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {place:.1f}H{right}"/>')
        text = f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{_shown(tick)}</text>'
        parts.append(text)
    for tick in horizontal.ticks():
        place = horizontal.place(tick)
        parts.append(f'<path class="axis" d="M{place:.1f} {bottom}v4"/>')
        parts.append(
            f'<text x="{place:.1f}" y="{bottom + 16}" text-anchor="middle">{_shown(tick)}</text>'
        )
    middle = (_LEFT + right) / 2
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
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
    if series.kind in ("curve", "both") and len(places) > 1:
        line = "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        parts.append(f'<path class="curve" style="stroke:{colour}" d="M{line}"/>')
    if series.kind in ("points", "both") or len(places) == 1:
        for number, (px, py) in enumerate(places):
            name = series.names[number] if series.names else ""
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" style="fill:{colour}">'
                f"<title>{escape(name)}</title></circle>"
            )
    return parts


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
