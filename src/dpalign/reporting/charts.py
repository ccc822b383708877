"""Geometry of the report's charts: numbers become places on a small canvas. The page's template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 190  # of a chart, in the units of its viewBox; text in it is 11 of them high
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 24  # margins that ticks are written in
ROW = 40  # height of a model in a chart of intervals
POINTS = 400  # of a curve; of longer ones every k-th is drawn


@dataclass(frozen=True)
class Series:
    """What is drawn as one curve. points: step, value, standard deviation of its noise."""

    label: str
    style: str
    points: Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class Measured:
    """What is drawn as one interval: middle ± half; half is 0 where there is none. text: the numbers as written."""

    label: str
    style: str
    middle: float
    half: float
    text: str


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve's path, its band (empty without noise), and its points where they are few enough to be seen."""

    label: str
    style: str
    path: str
    band: str
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Curves:
    """width, height: the canvas. across, up: ticks. every: which points are drawn, 1 for all."""

    title: str
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    every: int
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Bar:
    label: str
    style: str
    low: float
    high: float
    middle: float
    at: float
    text: str


@dataclass(frozen=True)
class Intervals:
    title: str
    bars: tuple[Bar, ...]
    across: tuple[Tick, ...]
    height: int
    width: int = WIDTH
    left: int = 8
    right: int = WIDTH - RIGHT

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM


def curves(title: str, series: Sequence[Series]) -> Curves | None:
    """One chart of all series, with a band of one standard deviation of the noise; None if there is nothing finite."""
    found = [(s, [p for p in s.points if all(map(math.isfinite, p))]) for s in series]
    found = [(s, points) for s, points in found if points]
    if not found:
        return None
    every = max(1, math.ceil(max(len(points) for _, points in found) / POINTS))
    steps = [step for _, points in found for step, *_ in points]
    ends = [end for _, points in found for _, value, noise in points for end in (value - noise, value + noise)]
    x = Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT, whole=True)
    y = Axis(min(ends), max(ends), HEIGHT - BOTTOM, TOP)
    lines = tuple(_line(s, points[:-1:every] + points[-1:], x, y) for s, points in found)
    return Curves(title, lines, x.ticks(), y.ticks(), every)


def _line(series: Series, points: Sequence[tuple[float, float, float]], x: Axis, y: Axis) -> Line:
    middle = [(x.place(step), y.place(value)) for step, value, _ in points]
    high = [(x.place(step), y.place(value + noise)) for step, value, noise in points]
    low = [(x.place(step), y.place(value - noise)) for step, value, noise in reversed(points)]
    band = _path([*high, *low]) + "Z" if any(noise for *_, noise in points) and len(points) > 1 else ""
    return Line(series.label, series.style, _path(middle), band, tuple(middle) if len(middle) <= 40 else ())


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)


def intervals(title: str, measured: Sequence[Measured]) -> Intervals:
    """One row for each model, on one scale."""
    ends = [end for m in measured for end in (m.middle - m.half, m.middle + m.half)]
    x = Axis(min(ends), max(ends), 8, WIDTH - RIGHT)
    bars = tuple(
        Bar(m.label, m.style, x.place(m.middle - m.half), x.place(m.middle + m.half), x.place(m.middle), at, m.text)
        for m, at in zip(measured, range(TOP + 18, TOP + 18 + ROW * len(measured), ROW), strict=True)
    )
    return Intervals(title, bars, x.ticks(), TOP + ROW * len(measured) + BOTTOM)


class Axis:
    """A scale from numbers to places between `start` and `end`, with a little room at both ends."""

    def __init__(self, low: float, high: float, start: float, end: float, *, whole: bool = False) -> None:
        room = 0.06 * (high - low) or (0.5 if whole else abs(high) * 0.1 or 1.0)
        self.low, self.high = low - room, high + room
        self.start, self.end, self.whole = start, end, whole

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> tuple[Tick, ...]:
        """Round numbers within the scale."""
        from matplotlib.ticker import MaxNLocator

        values = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=self.whole).tick_values(self.low, self.high)
        inside = [float(v) for v in values if self.low <= v <= self.high]
        return tuple(Tick(round(self.place(v), 1), f"{v:g}" if abs(v) > 1e-9 else "0") for v in inside)
