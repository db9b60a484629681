"""The pages say what is so: their sessions run, their figures are those of committed results."""

from __future__ import annotations

import csv
import doctest
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import BACKENDS
from test_imports import FLOORS

from fusednorm import backends

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SESSIONS = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", *DOCS.glob("*.md"))
    if "```pycon" in page.read_text(encoding="utf-8")
)
# Those of `modules` and `replace` run in test_modules.py and test_replace.py.
PUBLIC = ("backends", "functional", "torch_operators")


@pytest.fixture(scope="module")
def notebook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebook", DOCS / "notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(test: doctest.DocTest) -> tuple[int, str]:
    """Return how many lines of a session ran, and what was wrong."""
    report: list[str] = []
    found = doctest.DocTestRunner().run(test, out=report.append)
    return found.attempted, "".join(report)


# What runs


@pytest.mark.parametrize("page", SESSIONS)
def test_sessions_of_a_page(notebook: ModuleType, page: str) -> None:
    attempted, wrong = run(notebook.session(ROOT / page))
    assert attempted > 0
    assert wrong == ""


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_numbers_worked_by_hand(notebook: ModuleType, backend: str) -> None:
    if torch.cuda.is_available() and backend != "torch":
        pytest.skip("the page computes on the CPU")
    with backends.use(backend):
        _, wrong = run(notebook.session(DOCS / "by-hand.md"))
    assert wrong == ""


def test_a_wrong_digit_fails_the_page(notebook: ModuleType, tmp_path: Path) -> None:
    """Each number of the page in turn, one off in its last digit."""
    text = (DOCS / "by-hand.md").read_text(encoding="utf-8")
    digits = [
        match.end() - 1
        for block in notebook.SESSION.finditer(text)
        for line in re.finditer(r"^(?:tensor|\(| +\[).*$", block[0], re.MULTILINE)
        for match in re.compile(r"\d+\.\d*[1-9]\d*").finditer(text, *_span(block, line))
    ]
    assert len(digits) > 30
    page = tmp_path / "page.md"
    for place in digits[::4]:
        page.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        assert run(notebook.session(page))[1] != "", text[place - 20 : place + 1]


def _span(block: re.Match[str], line: re.Match[str]) -> tuple[int, int]:
    return block.start() + line.start(), block.start() + line.end()


@pytest.mark.parametrize("module", PUBLIC)
def test_examples_of_docstrings(module: str) -> None:
    """The example of every public name runs, and every public function has one."""
    if module == "torch_operators" and (missing := backends.extension_missing()):
        pytest.skip(missing)
    public = importlib.import_module(f"fusednorm.{module}")
    attempted, wrong = 0, ""
    for test in doctest.DocTestFinder(exclude_empty=True).find(public):
        found = run(test)
        attempted, wrong = attempted + found[0], wrong + found[1]
    assert attempted > 0
    assert wrong == ""


# What stands in the pages


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1100


def test_readme_quotes_the_speed_of_default_paths() -> None:
    """Its lines are lines of docs/performance.md, which are those of a results file."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Speed\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    measured = (DOCS / "performance.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 3
    assert set(lines) <= set(measured)
    # A plain layer norm of CPU tensors is torch's by default, whatever the kernels would take.
    assert not [line for line in lines if line.startswith("| LayerNorm")]


LINK = re.compile(r"\]\(([^)\s]+)\)")


def linked(page: Path) -> list[str]:
    return [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in DOCS.glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    """In the repository; on the site the strict build says so."""
    for link in linked(ROOT / page):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles}


def test_the_guarantees_name_tests_that_exist() -> None:
    text = (DOCS / "guarantees.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 15
    for file, function in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {function}(" in source if function else source


def test_contributing_gives_the_floors_that_the_test_holds() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.split("### Imports")[1].split("```")[1].strip().splitlines()
    shown = [tuple(line.split()) for line in block]
    assert shown == [tuple(n.removeprefix("fusednorm.") for n in floor) for floor in FLOORS]


def test_tests_cite_guarantees_that_exist() -> None:
    """`Promise 2` in the first line of a test file is line 2 of the page, which names the file."""
    rows = dict(
        re.findall(r"^\| (\d+) \| (.*)$", (DOCS / "guarantees.md").read_text(), re.MULTILINE)
    )
    for file in (ROOT / "tests").glob("test_*.py"):
        if cited := re.match(
            r'"""Promises? (\d+)(?: and (\d+))?:', file.read_text(encoding="utf-8")
        ):
            for number in filter(None, cited.groups()):
                assert file.name in rows[number]


def test_every_question_is_answered_with_a_line_that_runs() -> None:
    text = (DOCS / "questions.md").read_text(encoding="utf-8")
    questions = text.split("\n## ")[1:]
    assert len(questions) >= 17
    for question in questions:
        assert "\n>>> " in question, question.splitlines()[0]


def test_the_notebook_is_the_page(notebook: ModuleType) -> None:
    """`make notebook` after a change to the page; the cells run as the page does."""
    pytest.importorskip("jupytext", reason="requirements-docs.txt is not installed")
    made = notebook.notebook(DOCS / "by-hand.md")
    assert (DOCS / "by-hand.ipynb").read_text(encoding="utf-8") == made


def test_the_notebook_runs(notebook: ModuleType) -> None:
    """Its cells show what the page says, in that order."""
    nbformat = pytest.importorskip("nbformat", reason="requirements-docs.txt is not installed")
    nbclient = pytest.importorskip("nbclient", reason="requirements-docs.txt is not installed")
    pytest.importorskip("ipykernel", reason="requirements-docs.txt is not installed")
    ran = nbformat.read(DOCS / "by-hand.ipynb", as_version=4)
    nbclient.NotebookClient(ran, timeout=60).execute()
    shown = [
        output["data"]["text/plain"] + "\n"
        for cell in ran.cells
        for output in cell.get("outputs", ())
    ]
    examples = notebook.session(DOCS / "by-hand.md").examples
    assert shown == [example.want for example in examples if example.want]


# The experiment


@pytest.fixture(scope="module")
def results(normalizations: ModuleType) -> list[tuple[str, str, str, int, float]]:
    with (DOCS / "normalizations.csv").open(encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    return [normalizations.Result(*row[:3], int(row[3]), float(row[4])) for row in rows]


@pytest.fixture(scope="module")
def normalizations() -> ModuleType:
    sys.path.append(str(ROOT / "examples"))
    return importlib.import_module("normalizations")


def test_the_experiment_has_three_seeds(
    normalizations: ModuleType, results: list[tuple[str, str, str, int, float]]
) -> None:
    for row in normalizations.by_condition(results).values():
        assert row.keys() == normalizations.NORMS.keys()
        assert all(len(values) == 3 for values in row.values())


def test_the_page_shows_the_committed_numbers(
    normalizations: ModuleType, results: list[tuple[str, str, str, int, float]]
) -> None:
    """The table is that of the file, and so is every figure in the sentences and the answers."""
    page = (DOCS / "normalizations.md").read_text(encoding="utf-8")
    table = normalizations.table(results)
    assert table in page
    known = set(re.findall(r"\d[\d.e+-]* ± [\d.e+-]+", table))
    for text in (page, (DOCS / "questions.md").read_text(encoding="utf-8")):
        quoted = set(re.findall(r"\d[\d.e+-]* ± [\d.e+-]*\d", text))
        assert len(quoted) > 3
        assert quoted <= known
    prose = page.split("\n## (a)")[1].split("\n## All numbers")[0]
    for paragraph in re.split(r"\n\n|(?<=\.)\s+(?=[A-Z])", "## (a)" + prose):
        assert paragraph.startswith("##") or " ± " in paragraph or "refuses" in paragraph, paragraph


# The site


def test_the_site_builds_strictly_and_opens_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="requirements-docs.txt is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "by-hand.html", "api.html"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?([^\">]*)", text)
        assert loaded
        assert [url for url in loaded if re.match(r"(?:https?:)?//", url)] == [], page.name
    api = (tmp_path / "site/docs/api.html").read_text(encoding="utf-8")
    assert api.count("<math") >= 8  # formulas are set here, not by a script from elsewhere
    assert ".. math::" not in api
