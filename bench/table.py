"""The table of rungs: what was compiled for plain norms and what the model predicts of it, in CSV.

One table can be shown beside an earlier one, so that what a change of the kernels did is one look.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from . import text

COLS = (
    *(64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 8192),
    *(12288, 16384, 32768, 65536, 131072),
)
"""The N of the table."""

KEY = ("kernel", "dtype", "N")
"""The columns that say which rung a row is about."""

LITTLE = 0.95
"""Share of a copy's speed below which it is said what holds a kernel up."""

Row = dict[str, str]


def tile(entry: dict[str, Any]) -> str:
    """Return rows, chunks and columns of a chunk."""
    c = entry["constants"]
    return f"{c.get('ROWS', 1)}x{c.get('CHUNKS', 1)}x{c.get('BLOCK_N', c.get('COLS'))}"


def warps(entry: dict[str, Any]) -> str:
    """Return the warps of a program, times the programs of a cluster."""
    return str(entry["num_warps"]) + (f"x{entry['cluster']}" if entry["cluster"] > 1 else "")


def row(entry: dict[str, Any]) -> Row:
    """Return a kernel as a row of the table; the last kernel of a call has its prediction.

    Raises:
        ValueError: The kernel does not compile.
    """
    if "error" in entry:
        raise ValueError(f"{entry['kind']} {entry['dtype']} N={entry['cols']}: {entry['error']}")
    counted = f" of {entry['counted']}" if entry["counted"] else ""
    predicted = entry.get("predicted", {})
    shares = {gpu: f"{predicted[gpu][0]:.0%}" if predicted else "" for gpu in entry["seconds"]}
    limits = [limit for share, limit in sorted(predicted.values()) if share < LITTLE]
    return {
        "kernel": "row sums" if "sums" in entry["kernel"] else entry["kind"],
        "dtype": entry["dtype"],
        "N": str(entry["cols"]),
        "tile": tile(entry),
        "warps": warps(entry),
        "registers": str(entry["registers"]),
        "spills": str(entry["spills"]),
        "programs": f"{entry['programs']}{counted}",
        "KB in flight": f"{entry['in_flight'] / 1024:.0f}",
        "instructions": f"{entry['instructions_per_element']:.1f}",
        **shares,
        "held up by": limits[0] if limits else "",
    }


def save(rows: list[Row], path: Path) -> None:
    """Write a table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def load(path: Path) -> list[Row]:
    """Read a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def show(after: list[Row], before: list[Row]) -> str:
    """Return a table for a terminal, with ``old -> new`` where it differs from an earlier one.

    A kernel that only one of them has is ``-`` in the other.
    """
    columns = list(after[0])
    tables = [{tuple(row[c] for c in KEY): row for row in rows} for rows in (after, before)]
    lines = []
    for key in dict.fromkeys([*tables[0], *tables[1]]):
        new, old = ({**dict.fromkeys(columns, "-"), **table.get(key, {})} for table in tables)
        values = [new[c] if new[c] == old[c] else f"{old[c]} -> {new[c]}" for c in columns]
        lines.append([*key, *values[len(KEY) :]])
    return text.table(lines, columns)
