"""What can be built here: the torch, the C++ compiler and the nvcc at hand, or what is missing."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

CHOICES = ("none", "cpu", "cuda", "auto")
# By what could be built without the thing that is missing; nothing helps on Windows.
REMEDIES = {
    "none": "install torch>=2.10 and a C++17 compiler, or set FUSEDNORM_BUILD=none",
    "cpu": "install a CUDA build of torch and the CUDA toolkit of the same major version, or set "
    "FUSEDNORM_BUILD=cpu",
    "win32": "set FUSEDNORM_BUILD=none",
}
CXX_PROBE = "#include <optional>\nint main() { return std::optional<int>(0).value(); }\n"
NVCC_PROBE = "#include <cuda_bf16.h>\n__global__ void kernel() {}\n"


class Missing(Exception):  # noqa: N818
    """What a build needs and does not find."""


class Torch(NamedTuple):
    """An installed torch: its folder, its version and that of its CUDA, if it has any."""

    root: Path
    version: str
    cuda: str | None


def find_torch() -> Torch:
    """Return the installed torch without importing it.

    An isolated build hides what is installed beside it. The kernels need torch's headers and a link
    against its stable interface, and the torch that will run them is the best to build with.
    """
    spec = PathFinder.find_spec("torch", [*sys.path, *site.getsitepackages()])
    if spec is None or spec.origin is None:
        raise Missing("torch is not installed")
    root = Path(spec.origin).parent
    found = runpy.run_path(str(root / "version.py"))
    if _version(found["__version__"]) < (2, 10):
        raise Missing(f"torch {found['__version__']} is older than 2.10")
    return Torch(root, found["__version__"], found["cuda"])


def check_compiler() -> None:
    """Raise Missing where there is no compiler for the kernels of the CPU."""
    if sys.platform == "win32":
        raise Missing("no kernels are built on Windows, they are written for GCC and Clang")
    command = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()
    if shutil.which(command[0]) is None:
        raise Missing(f"there is no C++ compiler ({command[0]})")
    if complaint := _complaint([*command, "-std=c++17"], ".cpp", CXX_PROBE):
        raise Missing(f"{command[0]} does not compile C++17: {complaint}")


def find_nvcc(torch: Torch) -> list[str]:
    """Return nvcc with the flags of every architecture, tried on a kernel."""
    if torch.cuda is None:
        raise Missing(f"torch {torch.version} has no CUDA")
    home = os.environ.get("CUDA_HOME")
    compiler = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if compiler is None:
        raise Missing("there is no nvcc (CUDA_HOME)")
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+\.\d+)", said.stdout)
    version = _version(found[1]) if found else (0, 0)
    if version[0] != _version(torch.cuda)[0]:
        number = found[1] if found else "of an unknown version"
        raise Missing(f"nvcc is {number} and torch has CUDA {torch.cuda}")
    command = [compiler, *_code_flags(version)]
    if complaint := _complaint(command, ".cu", NVCC_PROBE):
        raise Missing(f"nvcc does not compile for {' '.join(command[2::2])}: {complaint}")
    return command


def choose() -> tuple[Torch, list[str]] | None:
    """Return what to build with, None for no extension, and say why."""
    choice = os.environ.get("FUSEDNORM_BUILD") or "auto"
    if choice not in CHOICES:
        sys.exit(f"FUSEDNORM_BUILD: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "none":
        print("fusednorm: no compiled extension (FUSEDNORM_BUILD=none)", file=sys.stderr)
        return None
    kind, nvcc = "none", []
    try:
        torch = find_torch()
        check_compiler()
        kind, why = "cpu", f"torch {torch.version} and a C++17 compiler were found"
        if choice != "cpu":
            nvcc = find_nvcc(torch)
            kind, why = "cuda", f"{why}, and nvcc for {' '.join(nvcc[2::2])}"
    except Missing as missing:
        if choice != "auto":
            remedy = REMEDIES["win32" if sys.platform == "win32" else kind]
            sys.exit(f"FUSEDNORM_BUILD={choice}: {missing}; {remedy}")
        why = str(missing) if kind == "none" else f"{why}; no CUDA kernels: {missing}"
    print(f"fusednorm: building {kind} (FUSEDNORM_BUILD={choice}): {why}", file=sys.stderr)
    return None if kind == "none" else (torch, nvcc)


def requirements() -> list[str]:
    """Return what an isolated build has to install: torch, where it would be of use."""
    if os.environ.get("FUSEDNORM_BUILD") == "none":
        return []
    try:
        check_compiler()
    except Missing:
        return []
    try:
        find_torch()
    except Missing:
        return ["torch>=2.10"]
    return []


def local_version(torch: Torch, nvcc: list[str]) -> str:
    """Return what a build with CUDA kernels adds to the version, like +cu130."""
    return f"+cu{''.join(map(str, _version(torch.cuda)))}" if nvcc and torch.cuda else ""


def cuda_libraries(nvcc: str) -> list[str]:
    """Return the folders in which nvcc looks for CUDA's libraries."""
    done = subprocess.run([nvcc, "--dryrun", "any.cu"], capture_output=True, text=True, check=False)
    lines = re.findall("LIBRARIES=(.*)", done.stderr)
    return [folder.removeprefix("-L") for line in lines for folder in shlex.split(line)]


def _code_flags(nvcc: tuple[int, int]) -> list[str]:
    """Return nvcc's flags for TORCH_CUDA_ARCH_LIST, but for what is older than 8.0.

    Machine code for an architecture runs on later ones of the same major version. PTX, here that of
    the last one, is compiled by the driver for what comes after.
    """
    names = os.environ.get("TORCH_CUDA_ARCH_LIST")
    names = names or ("8.0;9.0;10.0+PTX" if nvcc >= (12, 8) else "8.0;9.0+PTX")
    flags = []
    for name in names.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise Missing(f"TORCH_CUDA_ARCH_LIST: expected numbers like 9.0+PTX, got {name!r}")
        if int(match[1]) >= 8:
            number = match[1] + match[2] + match[3]
            code = f"[sm_{number},compute_{number}]" if match[4] else f"sm_{number}"
            flags += ["-gencode", f"arch=compute_{number},code={code}"]
    if not flags:
        raise Missing(f"TORCH_CUDA_ARCH_LIST={names} names nothing from 8.0 on")
    return flags


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _complaint(command: list[str], suffix: str, text: str) -> str | None:
    """Return what a compiler says of a source, or None where it compiles it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe").with_suffix(suffix)
        source.write_text(text)
        command = [*command, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no word of why"]
    return next((line for line in lines if "error" in line or "fatal" in line), lines[-1])
