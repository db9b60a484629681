"""Results for people: the table, the plots, and one HTML page that opens without a network."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from . import text
from .cases import COMMON, PHASES
from .measure import COPY
from .results import Cell, Results, by_case, case_name, metrics
from .timing import ratio

LABELS = {
    "device": "device time, inputs not in the cache",
    "eager": "one eager call, host included",
    "do_bench": "median of triton.testing.do_bench",
}


def providers(results: Results) -> list[str]:
    """Return the providers that have a cell, in the order of the run."""
    names = dict.fromkeys(cell["provider"] for cell in results["cells"])
    return [name for name in names if name != COPY]


def is_ours(provider: str) -> bool:
    """Return whether a provider is this project."""
    return provider.startswith("fusednorm")


def share_of_copy(cells: dict[str, Cell], provider: str, what: str) -> float | None:
    """Return the speed of a provider over that of the copy of as many bytes, or None."""
    seconds, copy = (cells.get(name, {}).get("seconds", {}) for name in (provider, COPY))
    if what not in seconds or what not in copy:
        return None
    return ratio(copy[what], seconds[what])[0]


def best(cells: dict[str, Cell], what: str, ours: bool | None = None) -> str | None:
    """Return the fastest provider of a case: of all, of ours, or of the others."""
    timed = {
        name: median(cell["seconds"][what])
        for name, cell in cells.items()
        if name != COPY and what in cell["seconds"] and (ours is None or is_ours(name) == ours)
    }
    return min(timed, key=timed.__getitem__) if timed else None


def versus(cells: dict[str, Cell], what: str) -> tuple[float, float] | None:
    """Return the time of the best other provider over ours, and its spread; None without both.

    Ours is what users get who ask for nothing, the best of our backends where that was not timed.
    """
    automatic = what in cells.get("fusednorm", {}).get("seconds", {})
    ours = "fusednorm" if automatic else best(cells, what, ours=True)
    theirs = best(cells, what, ours=False)
    if not ours or not theirs:
        return None
    return ratio(cells[theirs]["seconds"][what], cells[ours]["seconds"][what])


def rows(results: Results, what: str) -> Iterator[list[str]]:
    """Yield the rows of the table of one figure: a case, the copy, the providers, us / the best."""
    for cells in by_case(results).values():
        copy, fastest = cells[COPY], best(cells, what)
        if what not in copy["seconds"] or not fastest:
            continue
        gbps = copy["bytes"] / median(copy["seconds"][what]) / 1e9
        entries = [_entry(cells, name, what, name == fastest) for name in providers(results)]
        found = versus(cells, what)
        last = "{:.2f}x ±{:.0%}".format(*found) if found else ""
        yield [case_name(copy), f"{gbps:.0f} GB/s", *entries, last]


def summary(results: Results, what: str) -> list[str]:
    """Return a line for each phase: the geometric mean of the best other's time over ours."""
    factors: dict[str, list[float]] = {}
    for cells in by_case(results).values():
        if found := versus(cells, what):
            factors.setdefault(cells[COPY]["mode"].split("/")[1], []).append(found[0])
    return [
        f"{phase}: {geometric_mean(all_of):.2f}x as fast as the best other provider "
        f"(geometric mean), faster in {sum(factor > 1 for factor in all_of)} of {len(all_of)} cases"
        for phase in PHASES
        if (all_of := factors.get(phase))
    ]


def _entry(cells: dict[str, Cell], name: str, what: str, fastest: bool) -> str:
    cell = cells.get(name)
    if cell is None:
        return "-"
    if cell["status"] != "ok":
        return str(cell["status"]).upper()
    if what not in cell["seconds"]:
        return "-"
    time = median(cell["seconds"][what])
    share = share_of_copy(cells, name, what)
    percent = "" if share is None else f" {share:.0%}"
    return f"{_time(time)}{percent}{' *' if fastest else '  '}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def headers(results: Results) -> list[str]:
    """Return the headings of `rows`."""
    return ["case", "copy", *providers(results), "ours vs best other"]


def facts(results: Results) -> list[tuple[str, str]]:
    """Return the environment, the yardstick, what ran unseen and what is missing."""
    lines = [(name, str(value)) for name, value in results["environment"].items()]
    lines.append(("large copy", f"{results['copy_gbps']:.1f} GB/s"))
    ran = Counter((c["provider"], c["note"]) for c in results["cells"] if c["status"] == "ok")
    lines += [(name, f"{note} in {n} cases") for (name, note), n in ran.items() if note]
    lines += [(name, f"missing: {why}") for name, why in results["missing"].items()]
    return lines


def problems(results: Results) -> list[str]:
    """Return a line for every cell that was not timed."""
    return [
        f"{case_name(cell)}, {cell['provider']}: {cell['status']}: {cell['note']}"
        for cell in results["cells"]
        if cell["status"] != "ok"
    ]


LEGEND = (
    "Percent: of the speed of a copy that moves as many bytes, the fewest that the case can move. "
    "{mark}: the fastest provider. Last column: the time of the best other provider over ours, the "
    "median of the rounds and half of their interquartile range."
)


def table(results: Results, what: str) -> str:
    """Return the table of one figure for a terminal."""
    lines = [f"{LABELS[what]}:", text.table(rows(results, what), headers(results))]
    return "\n".join([*lines, LEGEND.format(mark="*"), *summary(results, what)])


def terminal(results: Results) -> str:
    """Return the report for a terminal: the main figure, what failed and what is missing."""
    parts = [text.table(facts(results))]
    parts += [table(results, what) for what in metrics(results)[:1]]
    parts += problems(results)
    return "\n\n".join(parts)


def plots(results: Results) -> dict[str, str]:
    """Return the SVG of the figures that the results have points for, by name."""
    import matplotlib

    matplotlib.use("Agg")
    # Words stay words, and the same results give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "fusednorm", "font.size": 9})
    made = {}
    for what in metrics(results)[:1]:
        heading = f"{results['environment']['device']}: {LABELS[what]}"
        for name, sweep in (("bandwidth", "cols"), ("latency", "rows")):
            if panels := _panels(results, sweep, what):
                drawn = io.StringIO()
                figure = _figure(panels, sweep, heading)
                figure.savefig(drawn, format="svg", metadata={"Date": None})
                made[name] = drawn.getvalue()
    return made


Points = list[tuple[int, float]]


def _panels(results: Results, sweep: str, what: str) -> dict[str, dict[str, Points]]:
    """Return for each panel, for each provider, its points in the order of the sweep."""
    panels: dict[str, dict[str, Points]] = {}
    for cells in by_case(results).values():
        head = cells[COPY]
        if head["sweep"] != sweep or head["mode"] not in COMMON:
            continue
        title = f"{head['mode'].split('/')[1]}, {head['dtype']}"
        if sweep == "rows":
            title += f", N = {head['cols']}"
        for name, cell in cells.items():
            if what in cell["seconds"]:
                seconds = median(cell["seconds"][what])
                share = 1.0 if name == COPY else share_of_copy(cells, name, what)
                value = 1e6 * seconds if sweep == "rows" else 100 * (share or math.nan)
                panels.setdefault(title, {}).setdefault(name, []).append((head[sweep], value))
    return panels


def _figure(panels: dict[str, dict[str, Points]], sweep: str, heading: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.2 * across, 3.4 * down + 0.6), layout="constrained")
    # A provider has one colour in all panels; the yardstick is dashed and ours are thick.
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for place, (title, lines) in enumerate(panels.items()):
        plot = figure.add_subplot(down, across, place + 1)
        for name, points in lines.items():
            style: dict[str, Any] = {"color": "0.5", "linestyle": "--"}
            if name != COPY:
                style = {"color": f"C{names.index(name)}", "marker": "o", "markersize": 3.5}
            width = 2.2 if is_ours(name) else 1.2
            plot.plot(*zip(*sorted(points), strict=True), label=name, linewidth=width, **style)
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        plot.set_xscale("log", base=2)
        plot.xaxis.set_major_formatter(plain)
        if sweep == "cols":
            plot.set(xlabel="N", ylabel="% of the speed of a copy", title=title)
            plot.set_ylim(bottom=0)
        else:
            plot.set(xlabel="M", ylabel="us a call", title=title, yscale="log")
            plot.yaxis.set_major_formatter(plain)
        plot.grid(alpha=0.3)
    lines_of = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(lines_of.values(), lines_of.keys(), loc="outside lower center", ncols=4)
    figure.suptitle(heading)
    return figure


_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; max-width: 110em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff }
table { border-collapse: collapse; margin: .5em 0 1.5em; font-variant-numeric: tabular-nums }
small { color: #666; font-weight: 400; display: inline-block; min-width: 3.6em }
th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid #888; position: sticky; top: 0; background: #fff }
.best { background: #e2f3e4; font-weight: 600 } .bad { color: #b00020 }
.facts td { text-align: left; border: 0; padding: .1em 1em .1em 0; white-space: normal }
img { max-width: 100% } .scroll { overflow-x: auto }
"""


def _html_table(lines: list[list[str]], heading: list[str]) -> str:
    def cell(entry: str) -> str:
        kind = "best" if entry.endswith("*") else "bad" if entry.isupper() else ""
        mark = f' class="{kind}"' if kind else ""
        shown = re.sub(r"( ±?\d+%)$", r"<small>\1</small>", html.escape(entry.rstrip(" *")))
        return f"<td{mark}>{shown}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in heading)
    body = "\n".join("<tr>" + "".join(map(cell, line)) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def page(results: Results, drawings: Mapping[str, str]) -> str:
    """Return the HTML page, with the plots inside."""
    device = html.escape(results["environment"]["device"])
    parts = [f"<h1>fusednorm on {device}</h1>"]
    for what in metrics(results)[:1]:
        parts.append(f"<p>{html.escape(LABELS[what].capitalize())}:</p>")
        parts.append(_html_list(summary(results, what)))
    for name, drawing in drawings.items():
        data = base64.b64encode(drawing.encode()).decode()
        parts.append(f'<p><img alt="{name}" src="data:image/svg+xml;base64,{data}"></p>')
    for what in metrics(results):
        parts.append(f"<h2>{html.escape(LABELS[what].capitalize())}</h2>")
        parts.append(f"<p>{html.escape(LEGEND.format(mark='Green'))}</p>")
        lines = _html_table(list(rows(results, what)), headers(results))
        parts.append(f'<div class="scroll">{lines}</div>')
    if failed := problems(results):
        parts += ["<h2>Not timed</h2>", _html_list(failed)]
    known = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in facts(results)
    )
    parts.append(f'<h2>Where and with what</h2><table class="facts">{known}</table>')
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>fusednorm on {device}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _html_list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def write(results: Results, path: Path) -> list[Path]:
    """Write plots and page beside the results file `path`; return what was written."""
    drawings: dict[str, str] = {}
    try:
        drawings = plots(results)
    except ImportError as error:
        print(f"bench: no plots: {error}; `bench report` makes them later", file=sys.stderr)
    files = {path.with_name(f"{path.stem}-{name}.svg"): text for name, text in drawings.items()}
    files[path.with_suffix(".html")] = page(results, drawings)
    for target, content in files.items():
        target.write_text(content, encoding="utf-8")
    return list(files)
