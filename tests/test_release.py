"""tools/release.py refuses what does not agree; workflows run nothing but make."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

AGREED = {
    "fusednorm/_version.py": '__version__ = "1.2.3"\n',
    "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-02\n\n- A thing.\n",
    "docs/public.md": "within 1.2 nothing is taken away\n",
}


def git(root: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A committed tree in which everything agrees on 1.2.3."""
    for name, text in AGREED.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "all")
    return tmp_path


def release(root: Path, version: str = "1.2.3") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "release.py", version]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_what_agrees_is_released(tree: Path) -> None:
    """And the tag may be there already, on this commit."""
    for _ in range(2):
        done = release(tree)
        assert done.returncode == 0, done.stderr
        assert "git tag -a v1.2.3" in done.stdout
        git(tree, "tag", "--force", "v1.2.3")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("fusednorm/_version.py", "1.2.3", "1.2.4", "_version.py: expected 1.2.3, got 1.2.4"),
        ("CHANGELOG.md", "[1.2.3]", "[1.2.2]", r"expected a section '## \[1.2.3\] - YYYY-MM-DD'"),
        ("CHANGELOG.md", " - 2026-01-02", "", r"expected a section '## \[1.2.3\] - YYYY-MM-DD'"),
        ("CHANGELOG.md", "- A thing.", "", "expected a section .* with entries"),
        ("CHANGELOG.md", "leased]\n", "leased]\n\n- More.\n", "expected nothing under Unreleased"),
        ("docs/public.md", "1.2", "1.1", "public.md: expected 'within 1.2', got 1.1"),
    ],
)
def test_mismatch(tree: Path, file: str, old: str, new: str, message: str) -> None:
    """It is the one thing that is named."""
    path = tree / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    git(tree, "commit", "--quiet", "--all", "-m", "planted")
    done = release(tree)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr)


def test_dirty_tree(tree: Path) -> None:
    (tree / "new.py").write_text("")
    done = release(tree)
    assert done.returncode == 1
    assert done.stderr == "release: tree: expected no changes, got ?? new.py\n"


def test_tag_of_another_commit(tree: Path) -> None:
    git(tree, "tag", "v1.2.3")
    git(tree, "commit", "--quiet", "--allow-empty", "-m", "more")
    done = release(tree)
    assert done.returncode == 1
    assert "tag v1.2.3: expected this commit" in done.stderr


def test_version_of_another_form(tree: Path) -> None:
    done = release(tree, "1.2")
    assert "version: expected three numbers like 0.1.0, got '1.2'" in done.stderr


def test_workflows_run_make() -> None:
    """Each step is a target that can be run anywhere."""
    makefile = (ROOT / "Makefile").read_text()
    workflows = list((ROOT / ".github" / "workflows").glob("*.yml"))
    steps = [step for path in workflows for step in re.findall(r"run: *(.*)", path.read_text())]
    assert steps
    for step in steps:
        found = re.fullmatch(r"make ([a-z]+)( [A-Z]+=.*)?", step)
        assert found is not None, step
        assert re.search(rf"^{found[1]}:", makefile, re.MULTILINE), step
