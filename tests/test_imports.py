"""The layering: an import goes down, never up, and `import fusednorm` needs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fusednorm

ROOT = Path(__file__).parents[1]
PUBLIC = frozenset(fusednorm.__all__)

# From top to bottom. A module may import what stands on its own line or below it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("bench", "examples"),
    ("fusednorm", "fusednorm.__main__", "fusednorm.coverage"),
    (
        *("fusednorm.functional", "fusednorm.modules", "fusednorm.replace"),
        *("fusednorm.adaptive", "fusednorm.adaptive_probe"),
        *("fusednorm.arithmetic", "fusednorm.comparison", "fusednorm.probe"),
        *("fusednorm.probe_autocast", "fusednorm.recognition", "fusednorm.swapped"),
        "fusednorm.torch_operators",
    ),
    ("fusednorm.route", "fusednorm.gated", "fusednorm.channels"),
    ("fusednorm.distributed",),
    ("fusednorm.autograd",),
    ("fusednorm.ops", "fusednorm.backends"),
    ("fusednorm.triton_kernels", "fusednorm.cuda", "fusednorm.csrc", "fusednorm.reference"),
    ("fusednorm.validation", "fusednorm.spec"),
    ("fusednorm.observers", "fusednorm._version", "fusednorm._C"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
IMPLEMENTATIONS = frozenset(FLOORS[-3])
LEAVES = frozenset(FLOORS[-1])
# What looks behind the public API: at the launch policy, below the operators of others, and at what
# a compiled graph calls.
BEHIND_THE_API = frozenset({"bench.tune", "bench.enabled", "bench.launch_time"})


@dataclass(frozen=True)
class Import:
    """One import of one name."""

    importer: str
    target: str
    line: int
    at_load: bool  # not inside a function

    def __str__(self) -> str:
        """Return who imports what, and where."""
        return f"{self.importer}:{self.line} imports {self.target}"


def _sources(root: Path) -> dict[str, Path]:
    """Return every module of the layout by its dotted name; tests may import anything."""
    prefixes = {
        "fusednorm": "fusednorm",
        "triton_kernels": "fusednorm.triton_kernels",
        "csrc": "fusednorm.csrc",
        "bench": "bench",
        "examples": "examples",
    }
    sources: dict[str, Path] = {}
    for folder, prefix in prefixes.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join([prefix, *parts]).removesuffix(".__init__")
            sources.setdefault(name, path)
    return sources


def _imports(name: str, path: Path, known: frozenset[str]) -> Iterator[Import]:
    """Yield what a module imports; `from package import module` names the module."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno, at_load)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                target = full if full in known or base == "fusednorm" else base
                yield Import(name, target, node.lineno, at_load)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_load and not inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def _place(name: str) -> str | None:
    """Return the entry of FLOORS that a module belongs to, the longest one that fits."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in FLOOR), None)


def _is_public(name: str) -> bool:
    """Return whether `name` is the package itself or something that it exports."""
    return name == "fusednorm" or name.removeprefix("fusednorm.").partition(".")[0] in PUBLIC


def _attributes(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every `fusednorm.name` that a file reads from the package it imported."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "fusednorm"
        ):
            yield node.attr, node.lineno


def _broken_rule(imported: Import) -> str | None:
    """Return the rule that one import breaks, or None."""
    importer, target = imported.importer, imported.target
    top = target.partition(".")[0]
    kernels = importer.startswith("fusednorm.triton_kernels")
    if top == "triton" and not kernels and imported.at_load and _place(importer) != "bench":
        return "Triton is imported by the kernels, elsewhere only inside functions"
    if importer == "fusednorm.triton_kernels.config" and top in ("triton", "torch"):
        return "the launch policy imports neither triton nor torch"
    if top == "triton_kernels":
        return "the kernels are fusednorm.triton_kernels"
    if top != "fusednorm":
        return None
    here = _place(importer)
    assert here is not None, importer
    if here in FLOORS[0]:
        if importer not in BEHIND_THE_API and not _is_public(target):
            return "bench and examples use the public API only"
        return None
    there = _place(target)
    if there == "fusednorm" and FLOOR[here] > FLOOR[there]:
        return "a module of the package does not import the package"
    assert there is not None, target
    if here in LEAVES:
        return "a leaf imports nothing of the package"
    if FLOOR[there] < FLOOR[here]:
        return "an import goes down, never up"
    if here in IMPLEMENTATIONS and there in IMPLEMENTATIONS and here != there:
        return "implementations never import one another"
    if there == "fusednorm.triton_kernels" and here != there and imported.at_load:
        return "the package imports with torch alone"
    return None


def _cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Return one cycle of a graph, or None."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for following in sorted(graph.get(node, ())):
            if found := walk(following, [*path, node]):
                return found
        done.add(node)
        return None

    return next((found for node in sorted(graph) if (found := walk(node, []))), None)


def violations(root: Path) -> list[str]:
    """Return every broken rule of the tree at `root`, for reading."""
    sources = _sources(root)
    known = frozenset(sources)
    found, graph = [], {name: set[str]() for name in sources}
    for name, path in sources.items():
        if name.startswith("fusednorm.") and _place(name) == "fusednorm":
            found.append(f"{name} has no floor")
            continue
        for imported in _imports(name, path, known):
            if rule := _broken_rule(imported):
                found.append(f"{imported}: {rule}")
            if imported.target in known and imported.target != name:
                graph[name].add(imported.target)
        if name not in BEHIND_THE_API and _place(name) in FLOORS[0]:
            found += [
                f"{name}:{line} reads fusednorm.{attribute}: bench and examples use the public "
                "API only"
                for attribute, line in _attributes(path)
                if attribute not in PUBLIC
            ]
    if cycle := _cycle(graph):
        found.append(f"{' -> '.join(cycle)}: imports form no cycle")
    return found


def test_the_layering_holds() -> None:
    """No file of the repository breaks a rule."""
    assert len(_sources(ROOT)) > 12
    assert violations(ROOT) == []


# A tree that keeps every rule; each planted violation replaces or adds one file.
CLEAN = {
    "fusednorm/__init__.py": "from fusednorm import backends\nfrom fusednorm.modules import A",
    "fusednorm/__main__.py": "import fusednorm\nfrom fusednorm import backends",
    "fusednorm/functional.py": "from fusednorm import autograd, backends, reference, validation",
    "fusednorm/modules.py": "from fusednorm.functional import layer_norm",
    "fusednorm/replace.py": "from fusednorm.modules import LayerNorm",
    "fusednorm/autograd.py": "import torch\nfrom fusednorm import ops, reference",
    "fusednorm/ops.py": "from fusednorm import backends\n"
    "def f():\n    from fusednorm.triton_kernels.forward import g",
    "fusednorm/backends.py": "def f():\n    import triton",
    "fusednorm/reference.py": "import torch",
    "fusednorm/validation.py": "from fusednorm.observers import shape_of",
    "fusednorm/observers.py": "import torch",
    "triton_kernels/__init__.py": "",
    "triton_kernels/config.py": "import math",
    "triton_kernels/forward.py": "import triton\nfrom . import launch\nfrom .config import c",
    "triton_kernels/launch.py": "import torch\nfrom .config import c",
    "bench/run.py": "import fusednorm\nfrom fusednorm import layer_norm\nfusednorm.LayerNorm(8)",
    "bench/tune.py": "import triton\nfrom fusednorm.triton_kernels import forward",
    "examples/demo.py": "import torch, fusednorm\nfusednorm.backends.explain",
}

UP = "an import goes down, never up"
PUBLIC_ONLY = "bench and examples use the public API only"
ALONE = "the package imports with torch alone"
INSIDE = "Triton is imported by the kernels, elsewhere only inside functions"
POLICY = "the launch policy imports neither triton nor torch"

PLANTED = [
    ("fusednorm/reference.py", "from fusednorm import ops", UP),
    ("fusednorm/reference.py", "from fusednorm.ops import run_fwd", UP),
    ("fusednorm/reference.py", "import fusednorm.ops", UP),
    ("fusednorm/reference.py", "from . import ops", UP),
    ("fusednorm/reference.py", "from .ops import run_fwd", UP),
    ("fusednorm/reference.py", "def f():\n    from fusednorm import autograd", UP),
    ("fusednorm/backends.py", "from fusednorm.functional import layer_norm", UP),
    ("fusednorm/ops.py", "if True:\n    from fusednorm import autograd", UP),
    ("fusednorm/autograd.py", "from fusednorm.modules import LayerNorm", UP),
    ("triton_kernels/launch.py", "from ..autograd import f", UP),
    ("triton_kernels/launch.py", "from fusednorm.backends import f", UP),
    (
        "triton_kernels/launch.py",
        "from fusednorm import reference",
        "implementations never import one another",
    ),
    (
        "fusednorm/reference.py",
        "def f():\n    from fusednorm.triton_kernels import config",
        "implementations never import one another",
    ),
    (
        "csrc/build.py",
        "from fusednorm import reference",
        "implementations never import one another",
    ),
    ("fusednorm/validation.py", "from fusednorm import reference", UP),
    ("fusednorm/observers.py", "from fusednorm import _version", "a leaf imports nothing"),
    ("fusednorm/observers.py", "from fusednorm import validation", "a leaf imports nothing"),
    ("fusednorm/autograd.py", "import fusednorm", "does not import the package"),
    ("fusednorm/autograd.py", "from fusednorm import layer_norm", "does not import the package"),
    ("fusednorm/backends.py", "import triton", INSIDE),
    ("fusednorm/backends.py", "try:\n    import triton\nexcept ImportError:\n    pass", INSIDE),
    ("fusednorm/ops.py", "from triton import language", INSIDE),
    ("fusednorm/ops.py", "from fusednorm.triton_kernels import forward", ALONE),
    ("fusednorm/ops.py", "from .triton_kernels.forward import g", ALONE),
    ("fusednorm/ops.py", "def f():\n    import triton_kernels", "fusednorm.triton_kernels"),
    ("triton_kernels/config.py", "import torch", POLICY),
    ("triton_kernels/config.py", "def f():\n    import triton.language as tl", POLICY),
    ("examples/demo.py", "from fusednorm.functional import layer_norm", PUBLIC_ONLY),
    ("examples/demo.py", "from fusednorm import ops", PUBLIC_ONLY),
    ("examples/demo.py", "import fusednorm.triton_kernels.config", PUBLIC_ONLY),
    ("examples/demo.py", "import fusednorm\nfusednorm.ops.run_fwd()", PUBLIC_ONLY),
    ("bench/run.py", "from fusednorm import reference", PUBLIC_ONLY),
    ("fusednorm/newcomer.py", "import torch", "has no floor"),
    ("fusednorm/functional.py", "from fusednorm import replace", "imports form no cycle"),
    ("triton_kernels/config.py", "from . import launch", "imports form no cycle"),
]


def _plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_a_clean_tree_passes(tmp_path: Path) -> None:
    """The checker finds nothing where nothing is wrong."""
    _plant(tmp_path, CLEAN)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(("name", "text", "rule"), PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, name: str, text: str, rule: str) -> None:
    """Each rule is enforced, in every form that an import can take."""
    _plant(tmp_path, CLEAN | {name: text})
    path = Path(name)
    assert any(rule in found and path.stem in found for found in violations(tmp_path))


# What is loaded


def _python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_importing_the_package_loads_no_compiler() -> None:
    """A fresh interpreter has torch and the package, and nothing that compiles."""
    code = "import sys, torch; before = set(sys.modules); import fusednorm; "
    done = _python(code + "print(*sorted(set(sys.modules) - before), sep='\\n')", ROOT)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "fusednorm.functional" in loaded
    unwanted = (
        "triton",
        "fusednorm.triton_kernels",
        "torch._dynamo",
        "torch._inductor",
        "torch.utils.cpp_extension",
        "setuptools",
    )
    assert [name for name in loaded if name.startswith(unwanted)] == []


def test_the_kernels_are_not_a_top_level_package() -> None:
    """`import triton_kernels` from the repository root says where to find them instead."""
    done = _python("import triton_kernels", ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: this folder is fusednorm.triton_kernels; it must not shadow the "
        "triton_kernels package of triton-lang: install fusednorm (pip install -e .) and import "
        "it from there"
    )
