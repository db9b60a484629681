"""Every kernel once, on small inputs: what compute-sanitizer watches on a GPU.

compute-sanitizer python -m pytest -m every_kernel
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# Last, so that the installed package stays the one that is tested.
sys.path.append(str(Path(__file__).parents[1]))

from bench.cases import NORMS, Case, draw
from bench.measure import check
from bench.providers import find

pytestmark = pytest.mark.every_kernel

# Triton's kernels are slow in the interpreter, where the other tests run them.
BACKENDS = ("triton", "cuda") if torch.cuda.is_available() else ("cpu",)
# One N for each form of the kernels, and one that leaves no vector aligned.
COLS = (17, 256, 1025, 4096, 12288, 40000)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kernel_is_right(backend: str, norm: str, device: torch.device) -> None:
    found, missing = find([f"fusednorm-{backend}"], device)
    if missing:
        pytest.skip(missing[f"fusednorm-{backend}"])
    (provider,) = found
    if norm not in provider.norms:
        pytest.skip(f"the {backend} backend refuses it")
    generator = torch.Generator(device).manual_seed(0)
    for cols in COLS:
        case = Case(f"{norm}/both", 37, cols, "bfloat16", "bfloat16")
        with provider.scope():
            assert check(case, provider, draw(case, device, generator)) == "", cols
