"""What setup.py builds with what is at hand, and what it says where something is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import setuptools

import fusednorm

ROOT = Path(__file__).resolve().parents[1]
VERSION = fusednorm.__version__


TREE = ["setup.py", "toolchain.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
TREE += ["csrc", "fusednorm", "triton_kernels"]
Build = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A Python of its own, in which nothing is installed but setuptools."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    packages = folder / "packages"
    packages.mkdir()
    installed = Path(setuptools.__file__).parents[1]
    for path in (*installed.glob("setuptools*"), installed / "_distutils_hack"):
        (packages / path.name).symlink_to(path)
    return SimpleNamespace(python=folder / "venv" / "bin" / "python", packages=packages)


@pytest.fixture
def build(bare_python: SimpleNamespace, tmp_path: Path) -> Build:
    """Run setup.py where torch and nvcc say that they are of these versions."""

    def run(
        *command: str,
        torch: str | None = "2.13.0",
        cuda: str | None = None,
        nvcc: str | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        if torch is not None:
            folder = tmp_path / "torch"
            folder.mkdir()
            (folder / "__init__.py").write_text("raise ImportError('a build imports no torch')")
            (folder / "version.py").write_text(f"__version__ = {torch!r}\ncuda = {cuda!r}\n")
        tools = tmp_path / "bin"
        tools.mkdir()
        if nvcc is not None:
            known = "7.5 8.0 8.6 9.0 9.0a" + (" 10.0" if nvcc >= "12.8" else "")
            text = NVCC.format(version=nvcc, known=known.replace(".", ""))
            (tools / "nvcc").write_text(text + RECORD)
            (tools / "nvcc").chmod(0o755)
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{tmp_path}:{bare_python.packages}",
            "CUDA_HOME": str(tmp_path),
        }
        tree = tmp_path / "tree"  # setuptools writes into it
        tree.mkdir()
        for name in TREE:
            (tree / name).symlink_to(ROOT / name)
        (tree / "setup.cfg").write_text("[egg_info]\ntag_build = \n")  # as every sdist has it
        return subprocess.run(
            [bare_python.python, *(command or ("setup.py", "--version"))],
            cwd=tree,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


# They write down what they are told to do and leave an empty file; this nvcc compiles for what it
# knows.
RECORD = """
echo "$0 $@" >> commands.txt
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then touch "$2"; fi; shift; done
"""
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "release {version}, V{version}.0"; exit; fi
for argument; do
  case $argument in arch=compute_*)
    number=${{argument#arch=compute_}}
    case " {known} " in
      *" ${{number%%,*}} "*) ;;
      *) echo "nvcc fatal: Unsupported gpu architecture '${{argument%%,*}}'" >&2; exit 1 ;;
    esac
  esac
done
"""


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("none", "no compiled extension (FUSEDNORM_BUILD=none)"),
        ("cpu", "building cpu (FUSEDNORM_BUILD=cpu): torch 2.13.0 and a C++17 compiler were"),
        ("auto", "building cpu (FUSEDNORM_BUILD=auto): torch 2.13.0 and a C++17 compiler were"),
    ],
)
def test_choice(build: Build, choice: str, message: str) -> None:
    """The build says what it makes, and why."""
    done = build(FUSEDNORM_BUILD=choice)
    assert done.returncode == 0, done.stderr
    assert message in done.stderr


def test_a_choice_that_there_is_not(build: Build) -> None:
    done = build(FUSEDNORM_BUILD="fast")
    assert done.returncode == 1
    assert "FUSEDNORM_BUILD: expected one of none, cpu, cuda, auto, got 'fast'" in done.stderr


BEFORE_CPP17 = '#!/bin/sh\necho "cc: error: unrecognized option -std=c++17" >&2\nexit 1\n'

# What is there, what is missing, and what could still be built.
MISSING = {
    "torch": ({"torch": None}, "torch is not installed", "none"),
    "newer torch": ({"torch": "2.9.1+cu128"}, "torch 2.9.1+cu128 is older than 2.10", "none"),
    "compiler": ({"CXX": "no-such-c++"}, "there is no C++ compiler (no-such-c++)", "none"),
    "newer compiler": ({"CXX": "old-c++"}, "does not compile C++17: cc: error: unrec", "none"),
    "CUDA in torch": ({"nvcc": "13.0"}, "torch 2.13.0 has no CUDA", "cpu"),
    "nvcc": ({"cuda": "13.0"}, "there is no nvcc (CUDA_HOME)", "cpu"),
    "nvcc of torch": (
        {"cuda": "13.0", "nvcc": "12.9"},
        "nvcc is 12.9 and torch has CUDA 13.0",
        "cpu",
    ),
    "architectures": (
        {"cuda": "13.0", "nvcc": "13.0", "TORCH_CUDA_ARCH_LIST": "7.0 7.5+PTX"},
        "TORCH_CUDA_ARCH_LIST=7.0 7.5+PTX names nothing from 8.0 on",
        "cpu",
    ),
    "numbers": (
        {"cuda": "13.0", "nvcc": "13.0", "TORCH_CUDA_ARCH_LIST": "Hopper"},
        "TORCH_CUDA_ARCH_LIST: expected numbers like 9.0+PTX, got 'Hopper'",
        "cpu",
    ),
    "newer nvcc": (
        {"cuda": "12.4", "nvcc": "12.4", "TORCH_CUDA_ARCH_LIST": "8.0;10.0"},
        "nvcc fatal: Unsupported gpu architecture 'arch=compute_100'",
        "cpu",
    ),
}


@pytest.mark.parametrize("choice", ["auto", "cuda"])
@pytest.mark.parametrize(("given", "message", "rest"), MISSING.values(), ids=MISSING)
def test_what_is_missing(
    build: Build, tmp_path: Path, given: dict[str, str], message: str, rest: str, choice: str
) -> None:
    """The automatic build makes the rest; one that was asked for stops and names the remedy."""
    if given.get("CXX") == "old-c++":
        compiler = tmp_path / "old-c++"
        compiler.write_text(BEFORE_CPP17)
        compiler.chmod(0o755)
        given = {"CXX": str(compiler)}
    done = build(FUSEDNORM_BUILD=choice, **given)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    if choice == "auto":
        assert done.returncode == 0
        assert f"building {rest} (FUSEDNORM_BUILD=auto)" in done.stderr
    else:
        assert done.returncode == 1
        assert f"or set FUSEDNORM_BUILD={rest}" in done.stderr


@pytest.mark.parametrize(
    ("nvcc", "asked", "expected"),
    [
        ("13.0", "", ["sm_80", "sm_90", "[sm_100,compute_100]"]),
        ("12.4", "", ["sm_80", "[sm_90,compute_90]"]),
        ("13.0", "5.2 7.5 8.6 9.0a+PTX", ["sm_86", "[sm_90a,compute_90a]"]),
    ],
)
def test_architectures(build: Build, nvcc: str, asked: str, expected: list[str]) -> None:
    """Those that nvcc has, and of those that are asked for what is not older than 8.0."""
    done = build(cuda=nvcc, nvcc=nvcc, TORCH_CUDA_ARCH_LIST=asked)
    assert "building cuda (FUSEDNORM_BUILD=auto)" in done.stderr
    assert re.findall(r"code=(\S+)", done.stderr) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"torch": None}, ["torch>=2.10"]),
        ({"torch": "2.9.0"}, ["torch>=2.10"]),
        ({"torch": "2.10.0"}, []),
        ({"torch": None, "FUSEDNORM_BUILD": "none"}, []),
        ({"torch": None, "CXX": "no-such-c++"}, []),
    ],
)
def test_what_an_isolated_build_installs(
    build: Build, given: dict[str, str | None], expected: list[str]
) -> None:
    """Torch, but only where kernels can be built and none is installed."""
    ask = "from setuptools import build_meta; print(build_meta.get_requires_for_build_wheel())"
    done = build("-c", ask, **given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(expected)


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """toolchain.py, where torch has no CUDA."""
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "toolchain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_torch", lambda: module.Torch(ROOT, "2.13.0", None))
    monkeypatch.setenv("FUSEDNORM_BUILD", "auto")
    return module


def test_on_windows(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No kernels and nothing to install for them; who asks for them is told what to set."""
    monkeypatch.setattr(sys, "platform", "win32")
    assert toolchain.choose() is None
    why = "no kernels are built on Windows, they are written for GCC and Clang"
    said = capsys.readouterr().err
    assert said == f"fusednorm: building none (FUSEDNORM_BUILD=auto): {why}\n"
    assert toolchain.requirements() == []
    monkeypatch.setenv("FUSEDNORM_BUILD", "cpu")
    with pytest.raises(SystemExit) as stopped:
        toolchain.choose()
    assert stopped.value.code == f"FUSEDNORM_BUILD=cpu: {why}; set FUSEDNORM_BUILD=none"


def test_on_macos(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those for the CPU; torch has no CUDA there."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert toolchain.choose() is not None
    said = capsys.readouterr().err
    assert said.startswith("fusednorm: building cpu (FUSEDNORM_BUILD=auto): torch 2.13.0 and a C++")
    assert said.endswith("no CUDA kernels: torch 2.13.0 has no CUDA\n")


@pytest.mark.parametrize(
    ("where", "levels"),
    [
        ("linux-x86_64", 3),
        ("linux-aarch64", 0),
        ("macosx-11.0-arm64", 0),
        ("macosx-11-universal2", 0),
    ],
)
def test_levels_are_those_of_the_platform(build: Build, where: str, levels: int) -> None:
    """A build for another processor has the portable kernels, and no word of the rest."""
    ask = (
        "import setup, toolchain; "
        "made = setup.extension(toolchain.find_torch(), []); "
        "print(sum('/avx' in source for source in made.sources), "
        "('FUSEDNORM_X86', None) in made.define_macros)"
    )
    done = build("-c", ask, _PYTHON_HOST_PLATFORM=where)
    assert done.stdout.split() == [str(levels), str(levels > 0)], done.stderr


def test_the_sdist_is_the_same_everywhere(build: Build, tmp_path: Path) -> None:
    """Without a local version, which every wheel that is made of it would have, and with csrc."""
    done = build("setup.py", "sdist", cuda="13.0", nvcc="13.0", FUSEDNORM_BUILD="cuda")
    assert done.returncode == 0, done.stderr
    [sdist] = (tmp_path / "tree" / "dist").glob("*")
    assert sdist.name == f"fusednorm-{VERSION}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        said = archive.extractfile(f"fusednorm-{VERSION}/setup.cfg")
        assert said is not None
        assert b"cu130" not in said.read()
    sources = [path for end in ("cpp", "cu", "h") for path in (ROOT / "csrc").rglob(f"*.{end}")]
    needed = {path.relative_to(ROOT).as_posix() for path in sources}
    assert needed | {"setup.py", "toolchain.py", "pyproject.toml"} <= names


def test_what_is_compiled_and_how(build: Build, tmp_path: Path) -> None:
    """Each source once, with the flags of its level; kernels of CUDA by nvcc; all of it linked."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh" + RECORD)
    compiler.chmod(0o755)
    done = build(
        *("setup.py", "bdist_wheel"),
        cuda="13.0",
        nvcc="13.0",
        CXX=str(compiler),
        CC=str(compiler),
        FUSEDNORM_BUILD="cuda",
    )
    assert done.returncode == 0, done.stderr
    tree = tmp_path / "tree"
    commands = (tree / "commands.txt").read_text().splitlines()
    by_source = {
        found[1]: command
        for command in commands
        if (found := re.search(r" -c (csrc/\S+)", command)) is not None
    }
    sources = [path for end in ("cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{end}")]
    if platform.machine() != "x86_64":
        sources = [path for path in sources if not path.stem.startswith("avx")]
    assert sorted(by_source) == sorted(path.relative_to(ROOT).as_posix() for path in sources)
    for source, command in by_source.items():
        assert ("/nvcc " in command) == source.endswith(".cu"), source
        assert ("-mavx2" in command) == ("/avx" in source), source
        assert ("-mavx512bf16" in command) == source.endswith("_bf16.cpp"), source
    objects = {Path(source).with_suffix(".o").as_posix() for source in by_source}
    linked = commands[-1]
    assert all(one in linked for one in (*objects, "-lcudart_static", "-ltorch_cpu"))
    [wheel] = (tree / "dist").glob("*.whl")
    assert wheel.name.startswith(f"fusednorm-{VERSION}+cu130-cp310-abi3-")
