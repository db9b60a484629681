"""Compiles kernels for the host that stands in for a GPU (tests/simt), once for all workers."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
SIMT = ROOT / "tests" / "simt"
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "simt"

FLAGS = [
    *("-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fPIC"),
    "-DPy_LIMITED_API=0x030a0000",
    "-ftrivial-auto-var-init=pattern",  # what a kernel does not set is not 0 by chance
    *(f"-I{folder}" for folder in (SIMT, CSRC, sysconfig.get_paths()["include"])),
]


def compile_for_host(*sources: Path) -> Path:
    """Return a library of the sources and of the machine that runs their kernels."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the host stands in for a GPU on Linux, where there is g++")
    compiled = [*sources, SIMT / "machine.cpp"]
    files = sorted(path for folder in (SIMT, CSRC) for path in folder.rglob("*.*"))
    contents = b"".join(path.read_bytes() for path in (*files, Path(__file__)))
    key = hashlib.sha256(contents + repr(compiled).encode()).hexdigest()[:16]
    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / f"{sources[0].stem}-{key}.so"
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            _build(compiled, library)
    return library


def load_host_kernels() -> ModuleType:
    """Return the functions of csrc/cuda_ops.cpp with a host in place of the GPU."""
    kernels = [CSRC / "cuda" / f"{name}.cu" for name in ("forward", "backward")]
    library = compile_for_host(SIMT / "extension.cpp", CSRC / "cuda_ops.cpp", *kernels)
    spec = importlib.util.spec_from_file_location("simt", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(sources: list[Path], library: Path) -> None:
    objects = [library.with_name(f"{library.stem}-{source.stem}.o") for source in sources]

    def compile_one(source: Path, to: Path) -> None:
        subprocess.run(["g++", *FLAGS, "-x", "c++", "-c", source, "-o", to], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    unfinished = library.with_suffix(".part")
    subprocess.run(["g++", "-shared", *objects, "-o", unfinished], check=True)
    unfinished.rename(library)
    for path in objects:
        path.unlink()
