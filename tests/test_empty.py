"""No samples, no rows, no columns: every function, term and backend gives empty results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS, DEVICE
from torch import Tensor

import fusednorm
from fusednorm import backends

# x; each of these is a count that is 0.
SHAPES = {
    "no samples": (0, 4, 8),
    "no rows of a sample": (3, 0, 8),
    "no columns": (3, 4, 0),
    "no samples, one dimension": (0, 8),
    "nothing at all": (0, 0, 0),
}


def _terms(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every kind of term for x of `shape`."""
    ones = tuple(1 for _ in shape[1:-1])
    return {
        "vector": shape[-1:],
        "vector a sample": (shape[0], *ones, shape[-1]),
        "number a sample": (shape[0], *ones, 1),
    }


Call = Callable[[Tensor, Tensor], Any]


def _calls(cols: int) -> dict[str, Call]:
    return {
        "add_layer_norm": lambda x, t: fusednorm.add_layer_norm(
            x, x, cols, gate=t, scale=t, shift=t, dropout_p=0.5
        ),
        "add_rms_norm": lambda x, t: fusednorm.add_rms_norm(x, None, cols, gate=t, shift=t),
        "modulated_layer_norm": lambda x, t: fusednorm.modulated_layer_norm(x, cols, t, t),
        "layer_norm": lambda x, t: fusednorm.layer_norm(x, cols),
        "rms_norm": lambda x, t: fusednorm.rms_norm(x, cols),
    }


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("kind", ["vector", "vector a sample", "number a sample"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_backward(shape: tuple[int, ...], kind: str, backend: str | None) -> None:
    """Results have x's shape; gradients have the shapes of their tensors, and are 0."""
    size = _terms(shape)[kind]
    for name, call in _calls(shape[-1]).items():
        x = torch.zeros(shape, device=DEVICE, requires_grad=True)
        term = torch.zeros(size, device=DEVICE, requires_grad=True)
        with backends.use(backend or backends.choose(x, plain=False).backend):
            results = call(x, term)
            results = results if isinstance(results, tuple) else (results,)
            assert [result.shape for result in results] == [x.shape] * len(results), name
            if results[0].requires_grad:
                sum(result.sum() for result in results).backward()
        for tensor in (x, term):
            if tensor.grad is not None:
                assert tensor.grad.shape == tensor.shape
                assert not tensor.grad.any(), name


@pytest.mark.parametrize("kind", ["vector a sample", "number a sample"])
def test_terms_of_different_reach(kind: str) -> None:
    """A gate for all rows beside a scale for each of no samples."""
    shape = (0, 4, 8)
    x = torch.zeros(shape, requires_grad=True)
    gate, scale = torch.ones(8, requires_grad=True), torch.zeros(_terms(shape)[kind])
    for backend in BACKENDS:
        with backends.use(backend):
            z, _ = fusednorm.add_layer_norm(x, x, 8, gate=gate, scale=scale)
        (dgate,) = torch.autograd.grad(z.sum(), gate)
        assert torch.equal(dgate, torch.zeros(8))


def test_module_without_samples() -> None:
    """The module of adaptive layer norm, too."""
    norm = fusednorm.AdaLayerNorm(8, 3)
    z, gate = norm(torch.zeros(0, 4, 8), torch.zeros(0, 3))
    assert (z.shape, gate.shape) == ((0, 4, 8), (0, 1, 8))
    (z.sum() + gate.sum()).backward()
    for parameter in norm.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_transforms_without_samples() -> None:
    """Forward mode and `torch.func.grad` of an empty batch."""
    x, scale = torch.zeros(0, 4, 8), torch.zeros(0, 1, 8)

    def total(scale: Tensor) -> Tensor:
        return fusednorm.modulated_layer_norm(x, 8, None, scale).sum()

    assert torch.func.grad(total)(scale).shape == scale.shape
    assert torch.func.jvp(total, (scale,), (scale,))[1] == 0
