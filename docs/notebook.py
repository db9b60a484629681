"""Run the sessions of a page, or make a notebook of it: `python docs/notebook.py by-hand`."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
SESSION = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def session(page: Path) -> doctest.DocTest:
    """Return all sessions of a page as one test, at the lines where they stand."""
    text, kept, end = page.read_text(encoding="utf-8"), "", 0
    for block in SESSION.finditer(text):
        kept += "\n" * text.count("\n", end, block.start(1)) + block[1]
        end = block.end(1)
    return doctest.DocTestParser().get_doctest(kept, {}, page.name, str(page), 0)


def notebook(page: Path) -> str:
    """Return a page as a notebook, with a cell up to each result and without prompts."""
    import jupytext  # type: ignore[import-untyped]

    text = SESSION.sub(_cells, page.read_text(encoding="utf-8"))
    made = jupytext.reads(text, fmt="md")
    made.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    for number, each in enumerate(made.cells):
        each["id"] = f"cell-{number}"  # random ones would change at every run
    return str(jupytext.writes(made, fmt="ipynb"))


def _cells(block: re.Match[str]) -> str:
    """Return a session as cells; Jupyter shows the result of the last line of each."""
    cells = [""]
    for example in doctest.DocTestParser().get_examples(block[1]):
        cells[-1] += example.source
        if example.want:
            cells.append("")
    return "\n".join(f"```python\n{cell}```\n" for cell in cells if cell)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        (DOCS / f"{name}.ipynb").write_text(notebook(DOCS / f"{name}.md"), encoding="utf-8")
