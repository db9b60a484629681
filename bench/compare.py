"""What got faster or slower between two result files, beyond the spread of their rounds."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from . import text
from .results import Results, by_case, case_name, metrics
from .timing import spread


class Change(NamedTuple):
    """One provider on one case in both files."""

    case: str
    provider: str
    before: float  # seconds
    after: float
    noise: float  # the two spreads added up, as a share

    @property
    def factor(self) -> float:
        """How many times as long it takes now."""
        return self.after / self.before

    @property
    def verdict(self) -> str:
        """Whether the difference is larger than the spread of the rounds explains."""
        if abs(self.factor - 1) <= self.noise:
            return ""
        return "slower" if self.factor > 1 else "faster"


def changes(before: Results, after: Results, what: str) -> list[Change]:
    """Return every cell that both files have timed, the largest slowdown first."""
    found = []
    old = by_case(before)
    for key, cells in by_case(after).items():
        for provider, cell in cells.items():
            known = old.get(key, {}).get(provider)
            if known is None or what not in known["seconds"] or what not in cell["seconds"]:
                continue
            then, now = known["seconds"][what], cell["seconds"][what]
            noise = spread(then) + spread(now)
            found.append(Change(case_name(cell), provider, median(then), median(now), noise))
    return sorted(found, key=lambda change: -change.factor)


def describe(before: Results, after: Results) -> str:
    """Return the report.

    Raises:
        ValueError: The files have nothing in common.
    """
    what = next(iter(metrics(after)), "eager")
    found = changes(before, after, what)
    if not found:
        raise ValueError(f"compare: the two files have no timed cell of {what!r} in common")
    lines = []
    for name, results in (("A", before), ("B", after)):
        facts = results["environment"]
        lines.append(f"{name}: {facts['device']}, {facts['date']}, commit {facts['commit']}")
    moved = [change for change in found if change.verdict]
    rows = [
        [
            *(c.case, c.provider, f"{c.before * 1e6:.1f}", f"{c.after * 1e6:.1f}"),
            *(f"{c.factor:.3f}", f"{c.noise:.1%}", c.verdict),
        ]
        for c in moved
    ]
    if rows:
        headers = ("case", "provider", "A us", "B us", "B/A", "spread", "")
        lines.append(text.table(rows, headers))
    lines.append(f"{what}: {len(found) - len(moved)} of {len(found)} cells within the spread")
    return "\n".join(lines)
