"""What nvcc makes of the CUDA kernels: no spills, no stack; and which code they take for theirs."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fusednorm._C", reason="the compiled extension is not installed")

from cuda_resources import ARCHITECTURES, ROOT, SOURCES, resources, tiers

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("c++filt") is None,
    reason="needs nvcc, and c++filt to read its report",
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("direction", SOURCES)
def test_no_kernel_spills(direction: str, arch: str) -> None:
    """Every tier, five pairs of dtypes, with a residual stream and without, split and whole."""
    kernels = resources(SOURCES[direction], arch)
    split = {"forward": 1, "backward": 2}[direction]  # tiers that clusters may share
    whole = len(tiers(direction)) - (split - 1)
    finalize = {"forward": 0, "backward": 3}[direction]
    assert len(kernels) == (whole + split) * 5 * 2 + finalize
    assert [kernel for kernel in kernels if kernel.stack or kernel.spills] == []


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/cuda/gpu/device.h above a CUDA runtime whose device and code `choose` sets."""
    library = tmp_path_factory.mktemp("nvcc") / "processors.so"
    folder = Path(__file__).parent / "nvcc"
    # Where torch has CUDA its runtime is loaded, too: the stub's functions are to find one another.
    options = ["-Icsrc", "-arch=compute_80", "-cudart", "none", "-shared", "-Xcompiler", "-fPIC"]
    options += ["-Xlinker", "-Bsymbolic"]
    sources = [folder / "processors.cu", folder / "runtime.cpp"]
    subprocess.run(["nvcc", "-std=c++17", *options, *sources, "-o", library], cwd=ROOT, check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize(
    ("device", "code", "expected"),
    [(8, 80, False), (9, 80, False), (9, 90, True), (10, 80, False), (10, 100, True)],
)
def test_clusters_are_in_the_code_and_on_the_device(
    processors: ctypes.CDLL, device: int, code: int, expected: bool
) -> None:
    """PTX for 8.0 that a driver compiles for 9.0 knows no clusters: it would write beyond."""
    processors.choose(device, code)
    processors.have_clusters.restype = ctypes.c_bool
    assert processors.have_clusters() is expected
