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
    """Every tier and dtype: of the forward with and without a stream; and the finalize kernel."""
    kernels = resources(SOURCES[direction], arch)
    expected = {
        "forward": 3 * 2 * len(tiers("forward")),
        "backward": 3 * len(tiers("backward")) + 1,
    }
    assert len(kernels) == expected[direction]
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


def test_cuda_is_asked_how_many_clusters_run_at_a_time(processors: ctypes.CDLL) -> None:
    """Once for each kind of launch, after the kernel may have the shared memory it asks for."""
    processors.choose(9, 90)
    assert processors.resident(4, 100_000) == 1004
    assert processors.resident(8, 1000) == 1008
    assert processors.resident(1, 1000) == 3 * 132
    questions = processors.questions()
    assert processors.resident(4, 100_000) == 1004
    assert processors.questions() == questions == 3
