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

PAUSE = {"": 0.2, "\n": 20.0}
"""Seconds between two signs of progress, where they overwrite each other and where they do not."""


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
    """Yield the items; say on stderr how many are done, and about how long the rest takes."""
    start = last = time.monotonic()
    ends = ("\r", "") if sys.stderr.isatty() else ("", "\n")
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > PAUSE[ends[1]] or done == len(items):
            last, rest = now, (now - start) / done * (len(items) - done)
            line = f"{done}/{len(items)} {unit}s, {now - start:.0f} s, {rest:.0f} s left"
            end = "\n" if done == len(items) else ends[1]
            print(f"{ends[0]}{line:60}", end=end, file=sys.stderr, flush=True)
