"""The CPU kernels on arm64: compiled for it, and run by an emulator, with NEON's vectors."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DTYPES, assert_accurate, make_case
from torch import Tensor

from fusednorm.spec import compute_dtype

ROOT = Path(__file__).parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

# Unoptimised code is slow in an emulator, optimised code slow to compile.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wno-psabi", "-static", "-Icsrc")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the kernels and a main for arm64."""
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    target = tmp_path_factory.mktemp("neon") / "main"
    sources = ("tests/neon/main.cpp", "csrc/cpu/portable.cpp")
    subprocess.run([COMPILER, *FLAGS, *sources, "-o", str(target)], cwd=ROOT, check=True)
    return target


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def _norm(program: Path, x: Tensor, dz: Tensor, vectors: Sequence[Tensor], eps: float) -> Any:
    """Return z, dx, dweight and dbias."""
    number = 1 + (torch.float16, torch.bfloat16, torch.float32, torch.float64).index(x.dtype)
    rows, cols = x.shape
    command = [EMULATOR, str(program), str(number), str(rows), str(cols), repr(eps)]
    given = b"".join(map(_bytes, (x, dz, *vectors)))
    done = subprocess.run(command, input=given, capture_output=True, check=True)
    dtypes = (x.dtype,) * 2 + (compute_dtype(x.dtype, None),) * 2
    results, start = [], 0
    for dtype, shape in zip(dtypes, (x.shape, x.shape, (cols,), (cols,)), strict=True):
        size = torch.Size(shape).numel() * dtype.itemsize
        piece = bytearray(done.stdout[start : start + size])
        results.append(torch.frombuffer(piece, dtype=dtype).reshape(shape).to(x.dtype))
        start += size
    assert start == len(done.stdout)
    return results


class _OnArm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, program: Path
    ) -> Any:
        ctx.save_for_backward(x, weight, bias)
        ctx.arguments = eps, program
        return _norm(program, x, torch.zeros_like(x), (weight, bias), eps)[0]

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:  # type: ignore[override]
        x, *vectors = ctx.saved_tensors
        eps, program = ctx.arguments
        return (*_norm(program, x, dz, vectors, eps)[1:], None, None)


@pytest.mark.parametrize("cols", [3, 64, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_on_arm64(program: Path, dtype: torch.dtype, cols: int) -> None:
    """The budget of every other processor; rows in groups and alone, whole vectors and a rest."""
    torch.manual_seed(0)

    def on_arm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return _OnArm.apply(x, weight, bias, eps, program)

    def torchs(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

    assert_accurate(lambda: make_case(13, cols, dtype, torch.device("cpu")), on_arm, torchs)


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_on_arm64(program: Path, source: torch.dtype) -> None:
    """A column that is normalised alone is its bias: every half, widened and rounded again."""
    bias = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(source)
    bias = bias[bias.isfinite()]
    x = torch.ones(1, bias.numel(), dtype=source)
    z = _norm(program, x, x, (torch.ones_like(bias), bias), 1e-5)[0]
    assert torch.equal(z[0], bias)
