"""Host time of a small call against `nn.LayerNorm`, interleaved in one process.

A 4 x 64 tensor on the CPU costs next to nothing to normalise: what is left is the way there.

    python bench/host_time.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

import fusednorm

ROUNDS = 40
CALLS = 200


def forward(norm: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    """Call the module with autograd recording."""
    norm(x)


def forward_and_backward(norm: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    """Call the module and differentiate by its input, weight and bias."""
    torch.autograd.grad(norm(x), (x, *norm.parameters()), dy)


def seconds_per_call(
    step: Callable[..., None], norm: nn.Module, x: torch.Tensor, dy: torch.Tensor
) -> float:
    """Return the mean over one round."""
    start = time.perf_counter()
    for _ in range(CALLS):
        step(norm, x, dy)
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    """Print the median of each module and of the ratio round by round."""
    torch.set_num_threads(1)
    x, dy = torch.randn(4, 64, requires_grad=True), torch.randn(4, 64)
    norms = (nn.LayerNorm(64), fusednorm.LayerNorm(64))
    print(f"{'':24}{'nn.LayerNorm':>14}{'fusednorm':>14}{'ratio':>8}")
    for step in (forward, forward_and_backward):
        rounds = [
            [seconds_per_call(step, norm, x, dy) for norm in norms] for _ in range(ROUNDS + 1)
        ][1:]  # the first one warms up
        torchs, ours = (median(column) for column in zip(*rounds, strict=True))
        ratio = median(our / their for their, our in rounds)
        name = step.__name__.replace("_", " ")
        print(f"{name:24}{torchs * 1e6:11.1f} us{ours * 1e6:11.1f} us{ratio:8.2f}")


if __name__ == "__main__":
    main()
