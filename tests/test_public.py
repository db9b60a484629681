"""docs/public.md says what the program has: names, operators' schemas, environment variables."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

import fusednorm
import fusednorm.ops  # registers the operators

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "public.md").read_text()


def block(name: str) -> str:
    """Return what stands in the block or the table of a name."""
    found = re.search(rf"<!-- {name} -->\n(?:```\n(.*?)```|((?:\|.*\n)+))", PAGE, re.DOTALL)
    assert found is not None, name
    return found[1] or found[2]


def test_names() -> None:
    """Of the package and of `backends`, each with a docstring."""
    assert sorted(block("names").split()) == sorted(fusednorm.__all__)
    for name in fusednorm.__all__:
        assert getattr(fusednorm, name).__doc__
    for name in block("backends").split():
        assert getattr(fusednorm.backends, name).__doc__


def test_schemas() -> None:
    """A schema that changes breaks the programs that were exported with it."""
    schemas = [str(schema) for schema in torch._C._jit_get_all_schemas()]
    registered = [schema for schema in schemas if re.match("fusednorm::[a-z]", schema)]
    assert block("operators").splitlines() == sorted(registered)


def test_environment() -> None:
    """Each variable that the package or its build names stands on the page, and no other."""
    sources = [ROOT / "setup.py", ROOT / "toolchain.py"]
    for package in ("fusednorm", "fusednorm.triton_kernels"):
        found = importlib.util.find_spec(package)
        assert found is not None
        for folder in found.submodule_search_locations or ():
            sources += Path(folder).glob("*.py")
    text = "".join(source.read_text() for source in sources)
    macros = {"FUSEDNORM_CUDA", "FUSEDNORM_X", "FUSEDNORM_BUILT"}
    named = set(re.findall(r"FUSEDNORM_[A-Z]+", text)) - macros
    assert named == set(re.findall(r"FUSEDNORM_[A-Z]+", block("variables")))
