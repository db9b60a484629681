"""What `mkdocs` needs to know of this repository: its pages, and formulas without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unicodedata import lookup

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# The pages, and what they link to. They keep their places, so that one link is right on the site
# and in the repository; one that leads to nothing here stops the strict build.
PATTERNS = (
    *(
        "*.md",
        "LICENSE",
        "docs/*.md",
        "docs/*.ipynb",
        "docs/images/*",
        "docs/*.css",
        "docs/*.csv",
        "docs/*.png",
    ),
    *("csrc/README.md", "triton_kernels/README.md", "bench/NOTES.md", "bench/results/*"),
    *("examples/*.py", "tests/*.py", "fusednorm/*.py", "triton_kernels/*.py"),
)
DIRECTIVE = re.compile(r"^\.\. math::\n((?:(?: +.*)?\n)+?)(?=\n?\S|\Z)", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Let a fence named `math`, which GitHub knows as well, become MathML."""
    fence = {"name": "math", "class": "math", "format": _fence}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Put the files of the repository in the place of those of `docs`."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    sources = sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)})
    return Files(
        [
            File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, False)
            for path in sources
        ]
        + theme
    )


def _fence(source: str, *_: Any, **__: Any) -> str:
    if "&" in source:  # lines of an equation, set at their sign
        source = r"\begin{aligned}" + source + r"\end{aligned}"
    return f'<div class="math">{convert(source, display="block")}</div>'


class Docstrings(griffe.Extension):
    """Turns the few roles and directives of Sphinx in docstrings into Markdown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is None:
            return
        text = DIRECTIVE.sub(lambda m: _fence(" ".join(m[1].split())) + "\n", obj.docstring.value)
        text = re.sub(r":math:`\\(\w+)`", lambda m: lookup(f"GREEK SMALL LETTER {m[1]}"), text)
        text = re.sub(r"^\.\. code-block:: python\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"^Example:", "Examples:", text, flags=re.MULTILINE)
        text = re.sub(r"`([^`<]+?)\s*<(https?:[^`>]*)>`__", r"[\1](\2)", text)
        obj.docstring.value = re.sub(r":\w+:`([^`]*)`", r"`\1`", text)
