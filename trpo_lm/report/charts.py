"""Line charts of a run as SVG: small, without scripts, in the colours of the page around them.

A chart holds at most two points a pixel column, however long the run: the lowest and the highest.
Colours come from classes, so that a page can be light or dark; shapes differ too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trpo_lm.report.format import number
from trpo_lm.report.html import escape

WIDTH, HEIGHT = 440, 190  # in units of the drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 18, 10, 24
MARKERS = 150  # most updates whose single points are drawn


@dataclass(frozen=True)
class Series:
    """One metric of every update.

    Attributes:
        name: Column of metrics.jsonl.
        label: In words.
        values: One for each row; nan where there is none.
        look: 'a' to 'd': a line of that colour; 'points': diamonds without a line.
    """

    name: str
    label: str
    values: np.ndarray
    look: str = "a"


@dataclass(frozen=True)
class Level:
    """A horizontal line: a limit, or what to compare with ('limit', 'level')."""

    value: float
    label: str
    look: str = "limit"


@dataclass(frozen=True)
class Marks:
    """Updates that are marked, on the curve or below it.

    Attributes:
        label: What they have in common.
        where: Of every row, whether it is marked.
        look: 'rejected' (crosses at the lower edge) or 'shortened' (triangles on the curve).
    """

    label: str
    where: np.ndarray
    look: str


def chart(
    title: str,
    note: str,
    x: np.ndarray,
    series: Sequence[Series],
    *,
    levels: Sequence[Level] = (),
    marks: Sequence[Marks] = (),
    log: bool = False,
    zero: bool = False,
) -> str:
    """Return a figure: title, key, drawing; empty if no series has a number.

    Args:
        title: Of the figure, with its unit.
        note: What it means; shown below the title.
        x: Number of each update.
        series: The first one carries the marks.
        levels: Horizontal lines.
        marks: Of the first series.
        log: Whether the axis is logarithmic; values of at most 0 are then left out.
        zero: Whether the axis begins at 0.
    """
    series = [_positive(s) if log else s for s in series]
    series = [s for s in series if np.isfinite(s.values).any()]
    levels = [level for level in levels if math.isfinite(level.value)]
    if not series or not len(x):
        return ""
    few = len(x) <= MARKERS
    marks = [m for m in marks if m.where.any() and (few or m.look == "rejected")]
    found = np.concatenate([*(s.values for s in series), [level.value for level in levels]])
    low, high = _range(found[np.isfinite(found)], log=log, zero=zero)
    first, last = float(x.min()), float(max(x.max(), x.min() + 1))

    def at_x(v: np.ndarray) -> np.ndarray:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (v - first) / (last - first)

    def at_y(v: np.ndarray | float) -> np.ndarray:
        v = np.log10(v) if log else np.asarray(v, dtype=float)
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (v - low) / (high - low)

    parts = []
    for value, text in _ticks(low, high, log=log):
        y = f"{at_y(value):.1f}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y}" dy=".32em" text-anchor="end">{text}</text>')
    for value, text in _ticks(first, last, log=False, whole=True):
        where = f"{at_x(np.asarray(value)):.1f}"
        parts.append(f'<text x="{where}" y="{HEIGHT - 8}" text-anchor="middle">{text}</text>')
    for level in levels:
        y = f"{at_y(level.value):.1f}"
        parts.append(f'<path class="{level.look}" d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>')
    for s in series:
        parts.append(_curve(s, at_x(x), at_y(s.values)))
    for m in marks:
        y = at_y(series[0].values) if m.look == "shortened" else np.full(len(x), HEIGHT - _BOTTOM)
        parts.append(_marks(m, at_x(x), y, len(x)))
    parts.append(f'<path class="cursor" d="M0 {_TOP}V{HEIGHT - _BOTTOM}" visibility="hidden"/>')
    if not few:
        note = f"{note}; thick: mean of {window(len(x))} updates"
    keys = [(s.look, s.label) for s in series] + [(v.look, v.label) for v in levels]
    keys += [(m.look, m.label) for m in marks]
    key = "".join(f'<li class="key {look}">{escape(label)}</li>' for look, label in keys)
    columns = escape(";".join(f"{s.name}={s.label}" for s in series))
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>'
        f'<p class="note">{escape(note)}</p></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" data-columns="{columns}" '
        f'data-first="{first:g}" data-last="{last:g}" aria-label="{escape(title)}">'
        f'{"".join(parts)}</svg><ul class="keys">{key}</ul></figure>'
    )


def sparkline(x: np.ndarray, values: np.ndarray) -> str:
    """Return a line without axes, 160 x 32; empty if there are no numbers."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ""
    low, high = float(finite.min()), float(finite.max())
    first, last = float(x.min()), float(max(x.max(), x.min() + 1))
    across = 2 + 156 * (x - first) / (last - first)
    up = 29 - 26 * (values - low) / (high - low) if high > low else values - low + 16
    line = f'<path class="a" d="{_path(across, up)}"/>'
    return f'<svg class="spark" viewBox="0 0 160 32" aria-hidden="true">{line}</svg>'


def _positive(s: Series) -> Series:
    return Series(s.name, s.label, np.where(s.values > 0, s.values, np.nan), s.look)


def _range(values: np.ndarray, *, log: bool, zero: bool) -> tuple[float, float]:
    """Return the ends of an axis, as logarithms where it is logarithmic."""
    values = np.log10(values) if log else values
    low, high = float(values.min()), float(values.max())
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low, low + 1.0) if zero else (low - 0.5, high + 0.5)
    margin = 0.06 * (high - low)
    return (low if zero and low == 0 else low - margin), high + margin


def _ticks(low: float, high: float, *, log: bool, whole: bool = False) -> list[tuple[float, str]]:
    """Return about four round values between two ends, and their texts."""
    if log and high - low > 1.2:
        powers = range(math.ceil(low), math.floor(high) + 1)
        powers = powers[:: max(1, math.ceil(len(powers) / 5))]
        return [(10.0**p, _short(10.0**p)) for p in powers]
    low, high = (10.0**low, 10.0**high) if log else (low, high)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    step = max(1.0, round(step)) if whole else step
    count = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(i * step, _short(i * step)) for i in count]


def _short(value: float) -> str:
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-4:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.6g}"


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Return a path through the points; a gap where a value is missing."""
    xs, ys = x.tolist(), y.tolist()
    parts, before = [], False
    kept = _extremes(xs, ys)
    for place, i in enumerate(kept):
        if ys[i] == ys[i]:
            after = place + 1 < len(kept) and ys[kept[place + 1]] == ys[kept[place + 1]]
            dot = "" if before or after else "h.1"
            parts.append(f"{'L' if before else 'M'}{xs[i]:.1f} {ys[i]:.1f}{dot}")
        before = ys[i] == ys[i]
    return "".join(parts)


def _extremes(xs: list[float], ys: list[float]) -> list[int]:
    """Return the lowest and the highest point of each unit of width, in order; few points all."""
    if len(xs) <= MARKERS:
        return [*range(len(xs))]
    units: dict[int, list[int]] = {}
    for i, x in enumerate(xs):
        units.setdefault(int(x), []).append(i)
    kept = []
    for places in units.values():
        there = [i for i in places if ys[i] == ys[i]] or places[:1]
        kept += sorted({min(there, key=ys.__getitem__), max(there, key=ys.__getitem__)})
    return kept


def _curve(s: Series, x: np.ndarray, y: np.ndarray) -> str:
    if s.look == "points":
        return f'<path class="points" d="{_shapes(x, y, "m0-4l4 4-4 4-4-4z")}"/>'
    if len(x) > MARKERS:  # many updates: faint, with their moving mean on top
        faint = "" if s.look == "d" else f'<path class="{s.look} faint" d="{_path(x, y)}"/>'
        return f'{faint}<path class="{s.look}" d="{_path(x, moving_mean(y, window(len(x))))}"/>'
    dots = ""
    if np.isfinite(y).sum() <= 40:
        dots = f'<path class="dots {s.look}" d="{_shapes(x, y, "h.01")}"/>'
    return f'<path class="{s.look}" d="{_path(x, y)}"/>{dots}'


def window(count: int) -> int:
    """Return over how many of so many updates the thick line is a mean; odd."""
    return 2 * (count // 100) + 1


def moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of the numbers up to half of `width` before and after each; nan of none."""
    there = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    places = np.arange(len(values))
    low = np.maximum(places - width // 2, 0)
    high = np.minimum(places + width // 2 + 1, len(values))
    total, number = sums[high] - sums[low], counts[high] - counts[low]
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _marks(m: Marks, x: np.ndarray, y: np.ndarray, count: int) -> str:
    y = np.where(m.where, y, np.nan)
    if m.look == "rejected":
        shape = "m-3.5-3.5l7 7m0-7l-7 7" if count <= MARKERS else "m0-3v6"
    else:
        shape = "m-4-3h8l-4 7z"
    return f'<path class="{m.look}" d="{_shapes(x, y, shape)}"/>'


def _shapes(x: np.ndarray, y: np.ndarray, shape: str) -> str:
    xs, ys = x.tolist(), y.tolist()
    kept = [i for i in _extremes(xs, ys) if ys[i] == ys[i]]
    return "".join(f"M{xs[i]:.1f} {ys[i]:.1f}{shape}" for i in kept)


def reading(value: float) -> str:
    """Return a number for a person, with thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 1000 else number(value)
