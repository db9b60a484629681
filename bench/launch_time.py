"""Host time of a call on its way to a GPU that is not there (tests/fake_gpu), interleaved.

Triton compiles for compute capability 9.0 and its launcher, or that of the extension, starts
nothing: what is left is what the host does.

    python bench/launch_time.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import fake_gpu

import fusednorm
from fusednorm import backends, ops, torch_operators

ROUNDS, CALLS = 30, 20
ROWS, COLS = 64, 1024
WAYS = ("triton", "python", "extension")


def steps() -> dict[str, Callable[[], object]]:
    """Return what to measure: each norm without a gradient, forward, and forward and backward."""
    x, residual, dy = (torch.ones(ROWS, COLS, dtype=torch.bfloat16) for _ in range(3))
    weight, bias = (torch.ones(COLS, dtype=torch.bfloat16) for _ in range(2))
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight, bias)]

    def layer_norm() -> Tensor:
        return fusednorm.layer_norm(x, (COLS,), weight, bias)

    def add_norm() -> tuple[Tensor, Tensor]:
        return fusednorm.add_layer_norm(x, residual, (COLS,), weight, bias)

    def no_grad(norm: Callable[[], object]) -> object:
        with torch.no_grad():
            return norm()

    def both(norm: Callable[[], object]) -> object:
        outputs = norm()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = leaves if len(outputs) > 1 else [x, weight, bias]
        return torch.autograd.grad(outputs, wanted, (dy,) * len(outputs))

    return {
        f"{norm.__name__} {name}": step
        for norm in (layer_norm, add_norm)
        for name, step in (
            ("no_grad", lambda norm=norm: no_grad(norm)),
            ("forward", norm),
            ("forward and backward", lambda norm=norm: both(norm)),
        )
    }


def seconds_per_call(step: Callable[[], object]) -> float:
    """Return the mean of one round, in time of this thread alone."""
    start = time.thread_time()
    for _ in range(CALLS):
        step()
    return (time.thread_time() - start) / CALLS


def operators() -> dict[str, Callable[[], object]]:
    """Return what a compiled graph calls, and torch's norm while enabled."""
    x, dy = (torch.ones(ROWS, COLS, dtype=torch.bfloat16) for _ in range(2))
    weight, bias = (torch.ones(COLS, dtype=torch.bfloat16) for _ in range(2))
    forward, backward = (ops.compiled[one] for one in (ops.layer_norm_fwd, ops.layer_norm_bwd))
    nothing, bf16 = (None, None, None), torch.bfloat16
    numbers = (COLS,), 1e-5, False, 0.0
    given = (x, None, None, weight, bias, *nothing, *numbers, bf16, None, None)
    _, _, mean, rstd = forward(*given)
    mask = [True, False, False, True, True, False, False]
    saved = (dy, None, None, x, mean, rstd, None, weight, bias, *nothing)
    options = (*numbers, bf16, bf16, None, mask)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]

    def norm() -> Tensor:
        rows, weight, bias = leaves
        return torch.nn.functional.layer_norm(rows, (COLS,), weight, bias)

    def both() -> object:
        return torch.autograd.grad(norm(), leaves, dy)

    return {
        "operator, forward": lambda: forward(*given),
        "operator, backward": lambda: backward(*saved, *options),
        "F.layer_norm, forward": norm,
        "F.layer_norm, forward and backward": both,
    }


def torchs_own() -> dict[str, Callable[[], object]]:
    """Return torch's norm of CPU tensors without rows: all that is left is the host's work."""
    leaves = [torch.ones(size, requires_grad=True) for size in ((0, COLS), (COLS,), (COLS,))]
    dy = torch.ones(0, COLS)

    def forward() -> Tensor:
        rows, weight, bias = leaves
        return torch.nn.functional.layer_norm(rows, (COLS,), weight, bias)

    return {
        "forward": forward,
        "forward and backward": lambda: torch.autograd.grad(forward(), leaves, dy),
    }


def print_operators() -> None:
    """Print the same of operators, by the extension on a hit and by Python."""
    extension = backends.own_operators()
    if extension is None:
        return
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS + 2):
        for name, step in torchs_own().items():
            times.setdefault((f"torch, no rows, {name}", ""), []).append(seconds_per_call(step))
    extension.serve_by_plans("CPU")
    registration = torch_operators._InPython("CPU")
    with fake_gpu.serving("extension"):
        for _ in range(ROUNDS + 2):
            for name, step in operators().items():
                for way, asked in (("python", "cuda"), ("extension", "triton")):
                    extension.ask(asked)  # Python serves what is asked of another backend
                    if way == "python" and name.startswith("F."):
                        continue
                    step()
                    times.setdefault((name, way), []).append(seconds_per_call(step))
    registration.remove()
    print()
    for (name, way), values in times.items():
        print(f"{name:38}{way:>10}{median(values[2:]) * 1e6:8.1f} us")


def nothing(*_: object) -> None:
    """Stand in for what says why Triton does not serve a device."""


def main() -> None:
    """Print the median of each step each way."""
    torch.set_num_threads(1)
    times: dict[tuple[str, str], list[float]] = {}
    with (
        mock.patch.dict(backends._TABLE, triton=backends._TABLE["triton"]._replace(unfit=nothing)),
        backends.use("triton"),
    ):
        for _ in range(ROUNDS + 2):
            for name, step in steps().items():
                for way in WAYS:
                    with fake_gpu.serving(way):
                        times.setdefault((name, way), []).append(seconds_per_call(step))
    print(f"triton {triton.__version__}, torch {torch.__version__}: medians, and of triton's")
    print(f"{'':34}" + "".join(f"{way:>20}" for way in WAYS))
    for name in steps():
        print(f"{name:34}", end="")
        for way in WAYS:
            rounds = list(zip(times[name, way], times[name, "triton"], strict=True))[2:]
            ratio = median(own / theirs for own, theirs in rounds)
            print(f"{median(own for own, _ in rounds) * 1e6:10.1f} us {ratio:6.2f}", end="")
        print()
    with (
        mock.patch.dict(backends._TABLE, triton=backends._TABLE["triton"]._replace(unfit=nothing)),
        backends.use("triton"),
    ):
        print_operators()


if __name__ == "__main__":
    main()
