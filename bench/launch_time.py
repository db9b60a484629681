"""Host time of a call on its way to a GPU that is not there (tests/fake_gpu), interleaved.

Triton compiles for compute capability 9.0 and its launcher, or that of the extension, starts
nothing: what is left is what the host does.

    python -m bench.launch_time >> bench/results/launch_time.txt
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import fake_gpu

import fusednorm
from fusednorm import backends, channels, gated, ops, torch_operators

from .timing import interleave, loop_seconds, ratio

ROUNDS, CALLS = 30, 20
ROWS, COLS = 64, 1024
WAYS = ("triton", "python", "extension")

Ways = dict[str, Callable[[], AbstractContextManager[object]]]
"""What is entered around a call, by the name of who then serves it."""


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


def graph_calls() -> dict[str, Callable[[], object]]:
    """Return the calls of our operators as a compiled graph makes them."""
    bf16, nothing = torch.bfloat16, (None, None, None)
    x, dy, gate_input = (torch.ones(ROWS, COLS, dtype=bf16) for _ in range(3))
    image, dimage = (torch.ones(1, COLS, ROWS, dtype=bf16) for _ in range(2))
    weight, bias = (torch.ones(COLS, dtype=bf16) for _ in range(2))
    mean, rstd = torch.zeros(ROWS), torch.ones(ROWS)
    numbers, sizes = ((COLS,), 1e-5, False, 0.0), ((COLS,), COLS, 1e-5, True, True)
    mask = [True, False, False, True, True, False, False]
    saved = (x, mean, rstd, None, weight, bias, *nothing)
    arguments = {
        ops.layer_norm_fwd: (x, None, None, weight, bias, *nothing, *numbers, bf16, None, None),
        ops.layer_norm_bwd: (dy, None, None, *saved, *numbers, bf16, bf16, None, mask),
        gated.gated_norm_fwd: (x, gate_input, weight, None, *sizes, bf16, None),
        gated.gated_norm_bwd: (
            *(dy, x, gate_input, None, rstd, weight, None, *sizes, None),
            [True, True, True, False],
        ),
        channels.layer_norm2d_fwd: (image, weight, bias, 1e-5, False, bf16),
        channels.layer_norm2d_bwd: (
            *(dimage, image, mean, rstd, weight, bias, 1e-5, False),
            [True, True, True],
        ),
    }
    return {
        operator._opname: functools.partial(ops.compiled[operator], *given)
        for operator, given in arguments.items()
    }


def torch_calls(rows: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return the calls of torch's norm."""
    leaves = [
        torch.ones(size, dtype=dtype, requires_grad=True)
        for size in ((rows, COLS), (COLS,), (COLS,))
    ]
    dy = torch.ones(rows, COLS, dtype=dtype)

    def forward() -> Tensor:
        x, weight, bias = leaves
        return torch.nn.functional.layer_norm(x, (COLS,), weight, bias)

    return {
        "F.layer_norm, forward": forward,
        "F.layer_norm, forward and backward": lambda: torch.autograd.grad(forward(), leaves, dy),
    }


def report(steps: Mapping[str, Callable[[], object]], ways: Ways) -> None:
    """Print the median of each step each way, in time of this thread, and that over the first's."""

    def measure(step: Callable[[], object]) -> dict[str, float]:
        seconds = {}
        for way, scope in ways.items():
            with scope():
                step()
                seconds[way] = loop_seconds(step, CALLS, clock=time.thread_time)
        return seconds

    contestants = {name: functools.partial(measure, step) for name, step in steps.items()}
    print(f"{'':34}" + "".join(f"{way:>20}" for way in ways))
    for name, times in interleave(contestants, ROUNDS).items():
        first = next(iter(times.values()))
        cells = (
            f"{median(own) * 1e6:10.1f} us {ratio(own, first)[0]:6.2f}" for own in times.values()
        )
        print(f"{name:34}{''.join(cells)}", flush=True)


def report_operators(extension: Any) -> None:
    """Print the same of operators: by Python, which serves what another backend is asked for."""

    @contextlib.contextmanager
    def asking(backend: str) -> Iterator[None]:
        extension.ask(backend)
        yield

    calls, own = graph_calls(), extension.own_operator_calls()
    python: Ways = {"python": functools.partial(asking, "cuda")}
    by_extension: Ways = {"extension": functools.partial(asking, "triton")}
    extension.serve_by_plans("CPU")
    with fake_gpu.serving("extension"):
        print("\nwhat a compiled graph calls")
        report({name: call for name, call in calls.items() if name in own}, python | by_extension)
        report({name: call for name, call in calls.items() if name not in own}, python)
        print("\nwhile enabled")
        registration = torch_operators._InPython("CPU")
        report(torch_calls(ROWS, torch.bfloat16), by_extension)
        registration.remove()


def main() -> None:
    """Print what each way costs."""
    torch.set_num_threads(1)
    fit = backends._TABLE["triton"]._replace(unfit=lambda device: None)
    print(
        f"triton {triton.__version__}, torch {torch.__version__}; medians, and of the first way's"
    )
    with mock.patch.dict(backends._TABLE, triton=fit), backends.use("triton"):
        report(steps(), {way: functools.partial(fake_gpu.serving, way) for way in WAYS})
        if (extension := backends.own_operators()) is not None:
            report_operators(extension)
    print("\nof CPU tensors without rows: torch's own work on the host")
    report(torch_calls(0, torch.float32), {"torch": contextlib.nullcontext})


if __name__ == "__main__":
    main()
