"""How time grows with M, with N and with threads, and the fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

from . import text
from .cases import Case
from .results import Results, metrics

ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
COLS = (64, 256, 1024, 4096, 16384)
FIXED_ROWS, FIXED_COLS = 1024, 1024
MODES = ("layer_norm/forward", "layer_norm/backward")


class Fit(NamedTuple):
    """time = fixed + slope * x, and the exponent of the last factor of 16 of x."""

    fixed: float
    slope: float
    exponent: float


def cases(dtype: str) -> list[Case]:
    """Return the sweeps over M and over N."""
    shapes = [(rows, FIXED_COLS) for rows in ROWS] + [(FIXED_ROWS, cols) for cols in COLS]
    return [
        Case(mode, rows, cols, dtype, dtype, "scaling")
        for mode in MODES
        for rows, cols in dict.fromkeys(shapes)
    ]


def fit(xs: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Fit a line by least squares of the relative error, so that short times count as well.

    Raises:
        ValueError: There are fewer than two points.
    """
    if len(set(xs)) < 2:
        raise ValueError("scaling: expected at least two different sizes")
    weights = [1 / t**2 for t in seconds]
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    mean_t = sum(w * t for w, t in zip(weights, seconds, strict=True)) / total
    points = list(zip(weights, xs, seconds, strict=True))
    covariance = sum(w * (x - mean_x) * (t - mean_t) for w, x, t in points)
    slope = covariance / sum(w * (x - mean_x) ** 2 for w, x, _ in points)
    large = [(x, t) for x, t in zip(xs, seconds, strict=True) if 16 * x >= max(xs)]
    (first_x, first_t), (last_x, last_t) = min(large), max(large)
    exponent = math.log(last_t / first_t) / math.log(last_x / first_x) if len(large) > 1 else 1.0
    return Fit(mean_t - slope * mean_x, slope, exponent)


class Sweep(NamedTuple):
    """What varies, what is fixed, and how the fit is read."""

    name: str
    select: Callable[[dict[str, int]], bool]
    size: Callable[[dict[str, int]], float]
    unit: str


SWEEPS = (
    Sweep("M", lambda c: c["cols"] == FIXED_COLS, lambda c: c["rows"], "row"),
    Sweep("N", lambda c: c["rows"] == FIXED_ROWS, lambda c: c["cols"], "column"),
)


def describe(results: Results) -> str:
    """Return the fits of every provider.

    Raises:
        ValueError: The results hold no sweep.
    """
    what = next(iter(metrics(results)), "eager")
    timed = [cell for cell in results["cells"] if what in cell["seconds"]]
    most = max((cell["threads"] for cell in timed), default=0)
    lines = []
    groups = dict.fromkeys((cell["mode"], cell["provider"]) for cell in timed)
    for mode, provider in groups:
        mine = [c for c in timed if (c["mode"], c["provider"]) == (mode, provider)]
        for sweep in SWEEPS:
            points = {
                sweep.size(c): median(c["seconds"][what])
                for c in mine
                if sweep.select(c) and c["threads"] == most
            }
            if len(points) > 2:
                found = fit(list(points), list(points.values()))
                line = _line(mode, provider, sweep.name, found.fixed, 1e9 * found.slope)
                lines.append([*line, f"ns a {sweep.unit}", f"{found.exponent:.2f}"])
        lines += _thread_lines(mode, provider, mine, what)
    if not lines:
        raise ValueError("scaling: the results hold no sweep over M, N or threads")
    headings = ("mode", "provider", "over", "fixed us", "slope", "", "exponent of large sizes")
    return f"time = fixed + slope * size, {what}:\n" + text.table(lines, headings)


def _line(mode: str, provider: str, over: str, fixed: float, slope: float) -> list[str]:
    return [mode, provider, over, f"{fixed * 1e6:.2f}", f"{slope:.2f}"]


def _thread_lines(
    mode: str, provider: str, cells: list[dict[str, object]], what: str
) -> list[list[str]]:
    """Return the share of the work that threads divide between them, by Amdahl's law."""
    shapes: dict[object, dict[float, float]] = {}
    for cell in cells:
        seconds = cell["seconds"][what]  # type: ignore[index]
        points = shapes.setdefault((cell["rows"], cell["cols"]), {})
        points[1 / max(1, cell["threads"])] = median(seconds)  # type: ignore[type-var]
    lines = []
    for (rows, cols), points in shapes.items():  # type: ignore[misc]
        if len(points) > 1:
            found = fit(list(points), list(points.values()))
            share = found.slope / (found.fixed + found.slope)
            where = f"threads, {rows}x{cols}"
            line = _line(mode, provider, where, found.fixed, found.slope * 1e6)
            lines.append([*line, "us / threads", f"{share:.0%} parallel"])
    return lines
