"""The CPU kernels against torch's operators, forward and backward, interleaved in one process.

    python bench/cpu_speed.py --threads 1 > bench/results/cpu_speed.txt
    python bench/cpu_speed.py --operators --threads 2 > bench/results/cpu_operators_2_threads.txt
    python bench/cpu_speed.py --uses --threads 1 > bench/results/cpu_uses.txt

The second calls torch's operators and the launchers themselves, without autograd. The third is what
`backends` chooses by: every use of the equation on few rows and on many, with the kernels and with
torch. One thread is timed by processor time, which other work on the machine disturbs least, more
by wall clock.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm
from fusednorm import ops
from fusednorm.spec import Spec

SHAPES = (
    *((64, 768), (512, 768), (2048, 768), (4096, 1024)),
    *((1024, 4096), (4096, 4096), (512, 8192), (65536, 64)),
)
USES_SHAPES = ((4, 64), (64, 768), (512, 768), (1024, 4096))
DTYPES = (torch.float32, torch.bfloat16)

Step = Callable[[], object]
Steps = tuple[Step, Step]


def norm_steps(rows: int, cols: int, dtype: torch.dtype) -> Steps:
    """Return layer norm as torch computes it and as the kernels do."""
    x, weight, bias, dy = _tensors(dtype, (rows, cols), (cols,), (cols,), (rows, cols))

    def step(norm: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(norm(x, (cols,), weight, bias), (x, weight, bias), dy)

    return lambda: step(F.layer_norm), lambda: step(fusednorm.layer_norm)


def add_norm_steps(rows: int, cols: int, dtype: torch.dtype) -> Steps:
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


def norm_operators(rows: int, cols: int, dtype: torch.dtype) -> Steps:
    """Return the two operators that torch has for layer norm, and the two launchers."""
    x, weight, bias, dy = _tensors(dtype, (rows, cols), (cols,), (cols,), (rows, cols))
    return _torch_operators(x, None, weight, bias, dy), _launchers(x, None, weight, bias, dy)


def add_norm_operators(rows: int, cols: int, dtype: torch.dtype) -> Steps:
    """Return the same with a residual stream: torch's operators and its additions."""
    sizes = ((rows, cols), (rows, cols), (cols,), (cols,), (rows, cols))
    tensors = _tensors(dtype, *sizes)
    return _torch_operators(*tensors), _launchers(*tensors)


def _torch_operators(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, dz: Tensor
) -> Step:
    shape = weight.shape

    @torch.no_grad()
    def step() -> object:
        h = x if residual is None else residual + x
        _, mean, rstd = torch.native_layer_norm(h, shape, weight, bias, 1e-5)
        backward = torch.ops.aten.native_layer_norm_backward
        dx, *others = backward(dz, h, shape, mean, rstd, weight, bias, [True] * 3)
        return (dx if residual is None else dx + dz), others

    return step


def _launchers(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, dz: Tensor
) -> Step:
    kernels = ops.kernels(x.device)
    assert kernels is not None
    dtype, parameters = x.dtype, (None, weight, bias, None, None, None)
    dh, h_dtype = (None, None) if residual is None else (dz, dtype)
    spec = Spec(tuple(weight.shape), 1e-5, False, 0.0, dtype, h_dtype, None)
    wanted = (True, False, False, True, True, False, False)

    @torch.no_grad()
    def step() -> object:
        _, h, mean, rstd = kernels.forward(x, residual, *parameters, *spec, True, True)
        tensors = (dz, dh, None, x if h is None else h, mean, rstd, *parameters)
        return kernels.backward(*tensors, spec[0], 0.0, dtype, dtype, None, wanted)

    return step


THROUGH_AUTOGRAD = (norm_steps, add_norm_steps)
OPERATORS = (norm_operators, add_norm_operators)


def uses(rows: int, cols: int, dtype: torch.dtype) -> dict[str, Steps]:
    """Return every use with the torch backend and with the cpu backend."""
    stream, vector = (1, rows, cols), (1, 1, cols)
    x, residual, dz, dh = _tensors(dtype, stream, stream, stream, stream)
    weight, bias, scale, shift, gate = _tensors(dtype, (cols,), (cols,), vector, vector, vector)

    def steps(norm: Callable[..., Any], *inputs: Tensor) -> Steps:
        def step() -> object:
            result = norm()
            outputs = result if isinstance(result, tuple) else (result,)
            return torch.autograd.grad(outputs, inputs, (dz, dh)[: len(outputs)])

        return _with("torch", step), _with("cpu", step)

    def add(*inputs: Tensor, **options: Any) -> Steps:
        norm = fusednorm.add_layer_norm
        return steps(
            lambda: norm(x, residual, cols, weight, bias, **options),
            *(x, residual, weight, bias, *inputs),
        )

    ada = {"scale": scale, "shift": shift}
    return {
        "layer norm": steps(lambda: fusednorm.layer_norm(x, cols, weight, bias), x, weight, bias),
        "RMS norm": steps(lambda: fusednorm.rms_norm(x, cols, weight), x, weight),
        "add & norm": add(),
        "add & RMS norm": steps(
            lambda: fusednorm.add_rms_norm(x, residual, cols, weight), x, residual, weight
        ),
        "with dropout": add(dropout_p=0.1),
        "with a gate": add(gate, gate=gate),
        "AdaLN": steps(
            lambda: fusednorm.modulated_layer_norm(x, cols, shift, scale), x, shift, scale
        ),
        "AdaLN-Zero": add(gate, scale, shift, gate=gate, **ada),
    }


def _with(backend: str, step: Step) -> Step:
    def run() -> object:
        with fusednorm.backends.use(backend):
            return step()

    return run


def _tensors(dtype: torch.dtype, *sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def compare(steps: Steps, rounds: int) -> tuple[float, float, float]:
    """Return the median seconds of each, and the median ratio of the rounds."""
    theirs, ours = steps
    for step in (*steps, *steps):
        step()
    calls = min(300, max(1, round(0.02 / seconds(theirs, 1))))
    pairs = [(seconds(theirs, calls), seconds(ours, calls)) for _ in range(rounds)]
    return (
        median(pair[0] for pair in pairs),
        median(pair[1] for pair in pairs),
        median(pair[0] / pair[1] for pair in pairs),
    )


def seconds(step: Step, calls: int) -> float:
    """Return the mean over some calls."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(calls):
        step()
    return (clock() - start) / calls


def show(name: str, dtype: torch.dtype, size: str, theirs: float, ours: float, by: float) -> None:
    """Print one cell."""
    dtype_name = str(dtype).removeprefix("torch.")
    times = f"{theirs * 1e3:9.3f} ms{ours * 1e3:9.3f} ms"
    print(f"{name:15}{dtype_name:9}{size:>13}{times}{by:7.2f}x", flush=True)


def main() -> None:
    """Print every cell, and the geometric mean of each column of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--operators", action="store_true", help="without autograd")
    parser.add_argument("--uses", action="store_true", help="every use, on some shapes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"torch {torch.__version__}, {arguments.threads} threads, load before {load}")
    for dtype in DTYPES:
        if arguments.uses:
            for rows, cols in USES_SHAPES:
                for name, steps in uses(rows, cols, dtype).items():
                    show(name, dtype, f"{rows} x {cols}", *compare(steps, arguments.rounds))
            continue
        makers = OPERATORS if arguments.operators else THROUGH_AUTOGRAD
        for name, make in zip(("layer norm", "add & norm"), makers, strict=True):
            ratios = []
            for rows, cols in SHAPES:
                with fusednorm.backends.use("cpu"):
                    theirs, ours, ratio = compare(make(rows, cols, dtype), arguments.rounds)
                ratios.append(ratio)
                show(name, dtype, f"{rows} x {cols}", theirs, ours, ratio)
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            dtype_name = str(dtype).removeprefix("torch.")
            print(f"{name:15}{dtype_name:9}{'geometric mean':>44}{mean:7.2f}x", flush=True)
    print(f"load after {', '.join(f'{value:.1f}' for value in os.getloadavg())}")


if __name__ == "__main__":
    main()
