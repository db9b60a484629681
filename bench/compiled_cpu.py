"""Compiled norms on the CPU: our operators in a graph against the code that inductor writes.

    python -m bench.compiled_cpu [THREADS] [norms] [steps] > bench/results/compiled_cpu.txt

Medians of interleaved rounds in one process, forward and backward; the last column is inductor's
time over ours. A first run compiles, and what is compiled is kept on disk for the second.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednorm
from fusednorm import backends

SIZES = ((6144, 1024), (512, 768))
ROUNDS, SECONDS = 7, 0.03

# Batch, context, layers, heads, width: that of `make train`, and one of larger norms.
MODELS = ((16, 128, 4, 4, 128), (4, 256, 2, 8, 512))
VOCABULARY = 96


def layer_norm(x: Tensor, _: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return torch's layer norm."""
    return F.layer_norm(x, weight.shape, weight, bias)


def rms_norm(x: Tensor, _: Tensor, weight: Tensor, __: Tensor) -> Tensor:
    """Return torch's RMS norm."""
    return F.rms_norm(x, weight.shape, weight)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm of a sum, and the sum."""
    h = x + residual
    return F.layer_norm(h, weight.shape, weight, bias), h


def our_layer_norm(x: Tensor, _: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return our layer norm."""
    return fusednorm.layer_norm(x, weight.shape, weight, bias)


def our_rms_norm(x: Tensor, _: Tensor, weight: Tensor, __: Tensor) -> Tensor:
    """Return our RMS norm."""
    return fusednorm.rms_norm(x, weight.shape, weight)


def our_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return both results of our Add & Norm."""
    return fusednorm.add_layer_norm(x, residual, weight.shape, weight, bias)


NORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "layer_norm": (layer_norm, our_layer_norm),
    "rms_norm": (rms_norm, our_rms_norm),
    "add_layer_norm": (add_norm, our_add_norm),
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function whose own operators, if any, run in the CPU kernels."""
    graph = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*arguments: Any) -> Any:
        with backends.use("cpu"):
            return graph(*arguments)

    return call


def both(norm: Callable[..., Any], leaves: list[Tensor], dy: Tensor) -> Callable[[], object]:
    """Return a forward and backward of a norm."""

    def call() -> object:
        outputs = norm(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, leaves, (dy,) * len(outputs), allow_unused=True)

    return call


def interleaved(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = {}
    for name, call in calls.items():
        for _ in range(2):
            start = time.perf_counter()
            call()
        counts[name] = max(1, int(SECONDS / (time.perf_counter() - start)))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            times[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(values) for name, values in times.items()}


def print_norms() -> None:
    """Print inductor's time, ours and their ratio for each norm."""
    print(f"{'forward and backward':40}{'inductor':>12}{'ours':>12}{'ratio':>8}")
    for name, functions in NORMS.items():
        for rows, cols in SIZES:
            for dtype in (torch.float32, torch.bfloat16):
                torch._dynamo.reset()
                leaves = [
                    torch.randn(size, dtype=dtype, requires_grad=True)
                    for size in ((rows, cols), (rows, cols), (cols,), (cols,))
                ]
                dy = torch.randn(rows, cols, dtype=dtype)
                pair = zip(("inductor", "ours"), functions, strict=True)
                found = interleaved(
                    {side: both(compiled(function), leaves, dy) for side, function in pair}
                )
                label = f"{name} {rows}x{cols} {str(dtype).removeprefix('torch.')}"
                print(line(label, found["inductor"], found["ours"]), flush=True)


def line(label: str, theirs: float, ours: float) -> str:
    """Return one line of a table."""
    return f"{label:40}{theirs * 1e6:9.0f} us{ours * 1e6:9.0f} us{theirs / ours:8.2f}"


def step_of(model: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Return a training step without its optimizer."""

    def loss(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(tokens)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    graph = compiled(loss)

    def call() -> None:
        graph(tokens).backward()
        model.zero_grad()

    return call


def print_steps() -> None:
    """Print the same of a whole step of the example's model, its norms fused with sums or not."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    train_gpt = importlib.import_module("train_gpt")

    def ours(norm: nn.LayerNorm, branch: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        stream = branch if stream is None else stream + branch
        shape = norm.normalized_shape
        return fusednorm.layer_norm(stream, shape, norm.weight, norm.bias, norm.eps), stream

    ways = {"inductor": train_gpt.add_then_norm, "ours": ours, "fused": train_gpt.fused_add_norm}
    print(f"\n{'training step':40}{'inductor':>12}{'ours':>12}{'ratio':>8}")
    for batch, context, layers, heads, width in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            torch._dynamo.reset()
            tokens = torch.randint(VOCABULARY, (batch, context))
            steps = {}
            for name, way in ways.items():
                torch.manual_seed(0)
                model = train_gpt.GPT(VOCABULARY, context, layers, heads, width)
                model.add_norm = way
                steps[name] = step_of(model, tokens, dtype)
            found = interleaved(steps)
            size = f"{batch}x{context}x{width} {str(dtype).removeprefix('torch.')}"
            for name, label in (("ours", "layer_norm"), ("fused", "add_layer_norm")):
                print(line(f"{label} {size}", found["inductor"], found[name]), flush=True)


def main() -> None:
    """Print the tables that are asked for."""
    threads, *wanted = sys.argv[1:] or ["1"]
    torch.set_num_threads(int(threads))
    print(f"torch {torch.__version__}, {threads} threads")
    if not wanted or "norms" in wanted:
        print_norms()
    if not wanted or "steps" in wanted:
        print_steps()


if __name__ == "__main__":
    main()
