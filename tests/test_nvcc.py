"""The CUDA kernels compile for every architecture, without spills and without a stack."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("fusednorm._C", reason="the compiled extension is not installed")

from cuda_resources import ARCHITECTURES, SOURCES, resources, tiers

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
