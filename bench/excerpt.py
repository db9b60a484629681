"""The part of docs/performance.md that quotes results: a table and a plot, made from their file."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from pathlib import Path

from . import report
from .cases import NORMS
from .measure import COPY
from .results import Results, by_case, case_name, metrics

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
FIRST, LAST = "<!-- bench/results/{name}.json -->", "<!-- end of the results -->"


def markdown(results: Results, name: str) -> str:
    """Return the table of the shape with the most cases, what was measured how, and a plot.

    Args:
        results: The results.
        name: The name of their file, without its ending.
    """
    what = metrics(results)[0]
    copies = [cells[COPY] for cells in by_case(results).values()]
    shape, _ = Counter((copy["rows"], copy["cols"]) for copy in copies).most_common(1)[0]
    timed = {line[0]: line[1:] for line in report.rows(results, what)}
    lines = [report.headers(results), ["---"] * len(report.headers(results))]
    for copy in copies:
        if (copy["rows"], copy["cols"]) == shape and case_name(copy) in timed:
            norm, phase = copy["mode"].split("/")
            bold = [re.sub(r"^(.*) \*$", r"**\1**", entry) for entry in timed[case_name(copy)]]
            lines.append([f"{NORMS[norm]}, {phase}", *map(str.strip, bold)])
    known = results["environment"]
    clock = ", in time of the process" if known["clock"] == "process" else ""
    text = (
        f"{known['device']}, threads: {known['threads']}, load: {known['load']}. {shape[0]} rows "
        f"of {shape[1]} {copies[0]['dtype']} columns; {report.LABELS[what]}{clock}; commit "
        f"{known['commit']}. {report.LEGEND.format(mark='Bold')}"
    )
    return "\n".join(
        [
            *("| " + " | ".join(line) + " |" for line in lines),
            *("", *textwrap.wrap(text, 118), ""),
            f"![percent of the speed of a copy, by N](../bench/results/{name}-bandwidth.svg)",
        ]
    )


def write(results: Results, name: str, page: Path = PAGE) -> None:
    """Put it between its marks in the page.

    Raises:
        ValueError: The marks are not there.
    """
    pattern = FIRST.format(name=r"[^ ]+") + ".*" + LAST
    fresh = f"{FIRST.format(name=name)}\n{markdown(results, name)}\n{LAST}"
    before = page.read_text(encoding="utf-8")
    after, count = re.subn(pattern, lambda _: fresh, before, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{page}: expected one place for results, found {count}")
    page.write_text(after, encoding="utf-8")
