"""Torch's norms on the CPU: `fusednorm.enable()` against torch's own kernels, in one process.

    python -m bench.enabled [THREADS] > bench/results/cpu_enabled_2_threads.txt

Each cell is torch's time over ours, the median of interleaved rounds; with
MALLOC_MMAP_THRESHOLD_=4000000000 and MALLOC_TRIM_THRESHOLD_=4000000000 in the environment glibc
keeps its memory, and fresh pages no longer decide.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm

SIZES = (
    *((4, 64), (64, 768), (512, 768), (2048, 768), (4096, 1024)),
    *((1024, 4096), (4096, 4096), (512, 8192), (65536, 64)),
)
MODES = ("inference", "forward", "backward", "both")
ROUNDS, SECONDS = 11, 2e-3
# Calls until the heap has settled: after a change of sides the first ones meet fresh pages, and
# huge ones are made free at up to 50 ms each.
WARM = 6


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return torch's layer norm."""
    return F.layer_norm(x, weight.shape, weight, bias)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Return torch's RMS norm."""
    return F.rms_norm(x, weight.shape, weight)


def timed(call: Callable[[], object], times: int) -> float:
    """Return the seconds that a call takes, once it is warm.

    On one thread it is the processor's time, which those who share the machine do not change.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(WARM):
        call()
    start = clock()
    for _ in range(times):
        call()
    return (clock() - start) / times


def ratios(norm: Callable[..., Tensor], rows: int, cols: int, dtype: torch.dtype) -> list[float]:
    """Return torch's time over ours in each mode."""
    parameters = 2 if norm is layer_norm else 1
    leaves = [
        torch.randn(size, dtype=dtype, requires_grad=True)
        for size in ((rows, cols), *((cols,),) * parameters)
    ]
    dy = torch.randn(rows, cols, dtype=dtype)
    found = []
    for mode in MODES:
        graph: list[Tensor] = []

        def call(mode: str = mode, graph: list[Tensor] = graph) -> object:
            with torch.set_grad_enabled(mode != "inference"):
                y = graph[0] if graph else norm(*leaves)
            if mode in ("inference", "forward"):
                return y
            return torch.autograd.grad(y, leaves, dy, retain_graph=bool(graph))

        def side(times: int, mode: str = mode, graph: list[Tensor] = graph) -> float:
            if mode == "backward":
                graph[:] = [norm(*leaves)]
            return timed(call, times)

        times = max(1, int(SECONDS / side(1)))
        torchs, ours = [], []
        for _ in range(ROUNDS):
            torchs.append(side(times))
            with fusednorm.enable("cpu"):
                ours.append(side(times))
            graph.clear()
        found.append(statistics.median(a / b for a, b in zip(torchs, ours, strict=True)))
    return found


def main() -> None:
    """Print a table of each norm and dtype."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    torch.set_num_threads(threads)
    gc.disable()  # a collection takes longer than a call
    for _ in range(300):  # what each round leaves behind for a while must not split large blocks
        fusednorm.enable("cpu").disable()
    kept = "kept" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "not kept"
    print(f"torch {torch.__version__}, {threads} threads, memory {kept}: torch's time over ours")
    for norm in (layer_norm, rms_norm):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = f"{norm.__name__} {str(dtype).removeprefix('torch.')}"
            print(f"\n{name:20}" + "".join(f"{mode:>11}" for mode in MODES), flush=True)
            rows = []
            for size in SIZES:
                rows.append(ratios(norm, *size, dtype))
                label = f"{size[0]}x{size[1]}"
                print(f"{label:20}" + "".join(f"{value:11.2f}" for value in rows[-1]), flush=True)
            means = [
                math.exp(statistics.fmean(map(math.log, column)))
                for column in zip(*rows, strict=True)
            ]
            print(
                f"{'geometric mean':20}" + "".join(f"{value:11.2f}" for value in means), flush=True
            )


if __name__ == "__main__":
    main()
