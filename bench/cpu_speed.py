"""Forward and backward of the CPU kernels against torch's operators, interleaved in one process.

python bench/cpu_speed.py [--threads 2] [--rounds 15] [--dtypes float32 bfloat16]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm

SHAPES = (
    *((64, 768), (512, 768), (2048, 768), (4096, 1024)),
    *((1024, 4096), (4096, 4096), (512, 8192), (65536, 64)),
)

Step = Callable[[], object]


def norm_steps(rows: int, cols: int, dtype: torch.dtype) -> tuple[Step, Step]:
    """Return layer norm, forward and backward, as torch computes it and as the kernels do."""
    x, weight, bias, dy = _tensors(dtype, (rows, cols), (cols,), (cols,), (rows, cols))

    def step(norm: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(norm(x, (cols,), weight, bias), (x, weight, bias), dy)

    return lambda: step(F.layer_norm), lambda: step(fusednorm.layer_norm)


def add_norm_steps(rows: int, cols: int, dtype: torch.dtype) -> tuple[Step, Step]:
    """Return the Add & Norm of a pre-norm block, of which z and h are used."""
    sizes = ((rows, cols), (rows, cols), (cols,), (cols,), (rows, cols), (rows, cols))
    x, residual, weight, bias, dz, dh = _tensors(dtype, *sizes)
    inputs = (x, residual, weight, bias)

    def unfused() -> object:
        h = residual + F.dropout(x, 0.0)
        z = F.layer_norm(h, (cols,), weight, bias)
        return torch.autograd.grad((z, h), inputs, (dz, dh))

    def fused() -> object:
        outputs = fusednorm.add_layer_norm(x, residual, cols, weight, bias)
        return torch.autograd.grad(outputs, inputs, (dz, dh))

    return unfused, fused


def _tensors(dtype: torch.dtype, *sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def compare(theirs: Step, ours: Step, rounds: int) -> tuple[float, float, float]:
    """Return the median seconds of each, and the median ratio of the rounds."""
    theirs(), ours()
    calls = max(1, round(0.02 / seconds(theirs, 1)))
    pairs = [(seconds(theirs, calls), seconds(ours, calls)) for _ in range(rounds)]
    return (
        median(pair[0] for pair in pairs),
        median(pair[1] for pair in pairs),
        median(pair[0] / pair[1] for pair in pairs),
    )


def seconds(step: Step, calls: int) -> float:
    """Return the mean over some calls."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def main() -> None:
    """Print every cell, and the geometric mean of each column of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--force", action="store_true", help="the kernels for small tensors too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with fusednorm.backends.use("cpu") if arguments.force else contextlib.nullcontext():
        for name, make in (("layer norm", norm_steps), ("add & norm", add_norm_steps)):
            for dtype in arguments.dtypes:
                ratios = []
                for rows, cols in SHAPES:
                    steps = make(rows, cols, getattr(torch, dtype))
                    theirs, ours, ratio = compare(*steps, arguments.rounds)
                    ratios.append(ratio)
                    print(
                        f"{name}  {dtype:9}{rows:6} x {cols:<5}"
                        f"{theirs * 1e3:9.3f} ms{ours * 1e3:9.3f} ms{ratio:7.2f}x"
                    )
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                print(f"{name}  {dtype:9}{'geometric mean':>14}{mean:33.2f}x")


if __name__ == "__main__":
    main()
