"""Nested tensors: what torch has operators for, and a refusal by name for the rest."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm
from fusednorm import backends

LAYOUTS = [torch.jagged, torch.strided]


def nested(layout: torch.layout, *, requires_grad: bool = False) -> Tensor:
    """Return two sequences of different lengths."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that the prototype will change
        return torch.nested.nested_tensor(
            [torch.randn(2, 8), torch.randn(3, 8)], layout=layout, requires_grad=requires_grad
        )


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Assert that two nested tensors hold the same numbers."""
    for ours, theirs in zip(actual.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_norm_and_residual(layout: torch.layout) -> None:
    """The norms of x, and of residual + x, are torch's, with their gradients."""
    x = nested(layout, requires_grad=True)
    residual = x.detach() * 2
    weight, bias = torch.randn(2, 8)
    assert_equal(fusednorm.layer_norm(x, 8, weight, bias), F.layer_norm(x, (8,), weight, bias))
    z, h = fusednorm.add_layer_norm(x, residual, 8, weight, bias)
    assert_equal(h, residual + x)
    assert_equal(z, F.layer_norm(residual + x, (8,), weight, bias))
    module = fusednorm.AddLayerNorm(8)
    (dx,) = torch.autograd.grad(module(x, residual).unbind()[1].square().sum(), x)
    assert any(bool(part.any()) for part in dx.unbind())


def test_rms_norm() -> None:
    """Torch has RMS norm for the jagged layout."""
    x, weight = nested(torch.jagged), torch.randn(8)
    assert_equal(fusednorm.rms_norm(x, 8, weight, 1e-6), F.rms_norm(x, (8,), weight, 1e-6))
    z, _ = fusednorm.add_rms_norm(x, x, 8, weight, 1e-6)
    assert_equal(z, F.rms_norm(x + x, (8,), weight, 1e-6))


REFUSED: dict[str, Any] = {
    "no gate with": lambda x: fusednorm.add_layer_norm(x, x, 8, gate=torch.ones(8)),
    "no scale with": lambda x: fusednorm.modulated_layer_norm(x, 8, None, torch.ones(8)),
    "no shift with": lambda x: fusednorm.add_rms_norm(x, x, 8, shift=torch.ones(8)),
    "no dropout with": lambda x: fusednorm.add_layer_norm(x, None, 8, dropout_p=0.5),
    "residual to be": lambda x: fusednorm.add_layer_norm(x, torch.ones(8), 8),
    "input of shape": lambda x: fusednorm.add_layer_norm(x, x, 9),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(layout: torch.layout, message: str) -> None:
    """What torch has no operators for names itself, before anything is computed."""
    with pytest.raises(ValueError, match=f"norm: expected .*{message}"):
        REFUSED[message](nested(layout))


def test_rms_norm_of_the_strided_layout() -> None:
    """Torch has none."""
    for norm in (fusednorm.rms_norm, lambda x, n: fusednorm.add_rms_norm(x, x, n)):
        with pytest.raises(ValueError, match="norm: expected a nested tensor of jagged layout"):
            norm(nested(torch.strided), 8)


def test_a_requested_backend() -> None:
    """The kernels know rows of one tensor; a request for them is refused."""
    for backend in backends.available():
        if backend in ("triton", "cpu"):
            with backends.use(backend), pytest.raises(ValueError, match="a nested tensor"):
                fusednorm.add_layer_norm(
                    nested(torch.strided), None, 8, residual_dtype=torch.float32
                )
