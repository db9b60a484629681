"""Checks that a version can be released, and prints what to push where: make release VERSION=..

The version stands in fusednorm/_version.py. The changelog has a dated section for it, nothing waits
under Unreleased, docs/public.md speaks of its first two numbers, and the tree has no changes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

STEPS = """\
{version} can be released. What is left to do:

    make lint test wheel matrix
    git tag -a v{version} -m 'fusednorm {version}'
    git push {remote} HEAD v{version}
    python -m twine upload dist/fusednorm-{version}.tar.gz dist/fusednorm-{version}-*.whl

A wheel with CUDA kernels has a local version, which the package index does not take: it goes to the
release page of the tag, with the section of the changelog as its text.
"""


def problems(root: Path, version: str) -> list[str]:
    """Return what keeps a version from being released."""
    return [
        problem
        for check in (_number, _tree, _tag, _source, _changelog, _docs)
        if (problem := check(root, version)) is not None
    ]


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _number(root: Path, version: str) -> str | None:
    if re.fullmatch(r"\d+\.\d+\.\d+", version):
        return None
    return f"version: expected three numbers like 0.1.0, got {version!r}"


def _tree(root: Path, version: str) -> str | None:
    changed = _git(root, "status", "--porcelain").splitlines()
    return f"tree: expected no changes, got {', '.join(changed[:3])}" if changed else None


def _tag(root: Path, version: str) -> str | None:
    tagged = _git(root, "rev-list", "-n", "1", f"refs/tags/v{version}")
    head = _git(root, "rev-parse", "HEAD")
    if tagged in ("", head):
        return None
    return f"tag v{version}: expected this commit, {head[:12]}, got {tagged[:12]}"


def _source(root: Path, version: str) -> str | None:
    text = (root / "fusednorm" / "_version.py").read_text()
    found = re.search(r'__version__ = "(.*)"', text)
    stated = found[1] if found else "none"
    if stated == version:
        return None
    return f"fusednorm/_version.py: expected {version}, got {stated}"


def _changelog(root: Path, version: str) -> str | None:
    text = (root / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## \[(.*?)\](.*)\n((?:(?!## ).*\n?)*)", text, re.MULTILINE)
    sections = {name: (date, body.strip()) for name, date, body in heads}
    if sections.get("Unreleased", ("", ""))[1]:
        return f"CHANGELOG.md: expected nothing under Unreleased, but all under [{version}]"
    date, body = sections.get(version, ("", ""))
    if not re.fullmatch(r" - \d{4}-\d\d-\d\d", date) or not body:
        return f"CHANGELOG.md: expected a section '## [{version}] - YYYY-MM-DD' with entries"
    return None


def _docs(root: Path, version: str) -> str | None:
    series = version.rpartition(".")[0]
    text = (root / "docs" / "public.md").read_text()
    stated = re.search(r"within (\d+\.\d+)", text)
    if stated and stated[1] == series:
        return None
    return f"docs/public.md: expected 'within {series}', got {stated[1] if stated else 'none'}"


def main() -> int:
    """Print what is left to do, or what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version")
    version = parser.parse_args().version
    root = Path(_git(Path.cwd(), "rev-parse", "--show-toplevel"))
    if found := problems(root, version):
        print("\n".join(f"release: {problem}" for problem in found), file=sys.stderr)
        return 1
    remote = (_git(root, "remote").splitlines() or ["origin"])[0]
    print(STEPS.format(version=version, remote=remote))
    return 0


if __name__ == "__main__":
    sys.exit(main())
