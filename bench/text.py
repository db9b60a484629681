"""Tables and progress on a terminal, without a package that a GPU machine may not have."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_TO_THE_RIGHT = re.compile(r"[-+.\d]|[A-Z]+$|$")
"""How a number, the status of a cell, or nothing begins."""

QUIET = 20.0
"""Seconds between two lines of progress where the output is no terminal."""


def table(rows: Iterable[Sequence[str]], headers: Sequence[str] = ()) -> str:
    """Return the rows in aligned columns: to the right where all cells are numbers."""
    lines = [list(row) for row in rows]
    shown = [list(headers), *lines] if headers else lines
    columns = list(zip(*shown, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(map(_TO_THE_RIGHT.match, column[bool(headers) :])) for column in columns]
    if headers:
        shown.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in shown
    )


def progress(items: Sequence[T], unit: str) -> Iterator[T]:
    """Yield the items and show on stderr how many are done, and about how long the rest takes."""
    start = last = time.monotonic()
    terminal = sys.stderr.isatty()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if not terminal and now - last < QUIET and done < len(items):
            continue
        last = now
        rest = (now - start) / done * (len(items) - done)
        bar = "#" * (20 * done // len(items))
        line = f"[{bar:20}] {done}/{len(items)} {unit}s, {now - start:.0f} s, {rest:.0f} s left"
        ends = ("\r", " \n"[done == len(items)]) if terminal else ("", "\n")
        print(f"{ends[0]}{line:60}{ends[1]}", end="", file=sys.stderr, flush=True)
