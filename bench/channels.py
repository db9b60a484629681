"""LayerNorm over dimension 1 of NCHW on the CPU: ours against what models write, interleaved.

    python -m bench.channels [THREADS] > bench/results/cpu_channels.txt

`permute` is timm's and torchvision's LayerNorm2d, `formula` that of ConvNeXt's and SAM's own code.
Times are medians; with MALLOC_MMAP_THRESHOLD_=4000000000 and MALLOC_TRIM_THRESHOLD_=4000000000 in
the environment glibc keeps its memory, and fresh pages no longer decide.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm

from .text import table
from .timing import calls_within, interleave, median_seconds, ratio

BATCH = 8
# Channels and sides: ConvNeXt's stages, every width at every stage, and one small image.
SHAPES = (
    *((BATCH, channels, side) for side in (56, 28, 14, 7) for channels in (96, 192, 384, 768)),
    *((BATCH, 256, 32), (1, 64, 8)),
)
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS, SECONDS, EPS = 9, 4e-3, 1e-6


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the fused norm."""
    return fusednorm.layer_norm2d(x, weight, bias, EPS)


def permute(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return torch's layer norm between two permutations."""
    y = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, EPS)
    return y.permute(0, 3, 1, 2)


def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the equation, one operator after the other."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + EPS)
    return weight[:, None, None] * x + bias[:, None, None]


CONTESTANTS: dict[str, Callable[..., Tensor]] = {
    "ours": ours,
    "permute": permute,
    "formula": formula,
}


def seconds(shape: tuple[int, int, int], dtype: torch.dtype, train: bool) -> dict[str, list[float]]:
    """Return the seconds of each contestant's rounds, forward alone or forward and backward."""
    batch, channels, side = shape
    sizes = (batch, channels, side, side), (channels,), (channels,)
    leaves = [torch.randn(size, dtype=dtype, requires_grad=train) for size in sizes]
    dy = torch.randn(sizes[0], dtype=dtype)

    def measure(norm: Callable[..., Tensor]) -> Callable[[], dict[str, float]]:
        def call() -> object:
            y = norm(*leaves)
            return torch.autograd.grad(y, leaves, dy) if train else y

        call()
        # On one thread it is the processor's time, which those who share the machine do not change.
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        calls = calls_within(call, SECONDS, 200, clock)
        return lambda: {"time": median_seconds(call, calls, clock)}

    contestants = {name: measure(norm) for name, norm in CONTESTANTS.items()}
    return {name: times["time"] for name, times in interleave(contestants, ROUNDS).items()}


def main() -> None:
    """Print a table of each dtype and phase."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.set_num_threads(threads)
    kept = "kept" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "not kept"
    print(f"torch {torch.__version__}, {threads} threads, memory {kept}; microseconds of a call")
    for dtype in DTYPES:
        for train in (False, True):
            rows = []
            for shape in SHAPES:
                times = seconds(shape, dtype, train)
                cells = [f"{median(times[name]) * 1e6:.0f}" for name in CONTESTANTS]
                gains = [
                    f"{ratio(times[name], times['ours'])[0]:.2f}" for name in ("permute", "formula")
                ]
                batch, channels, side = shape
                rows.append([f"{batch}x{channels}x{side}x{side}", *cells, *gains])
            phase = "forward and backward" if train else "forward, no gradient"
            print(f"\n{str(dtype).removeprefix('torch.')}, {phase}")
            print(table(rows, ["shape", *CONTESTANTS, "permute/ours", "formula/ours"]), flush=True)


if __name__ == "__main__":
    main()
