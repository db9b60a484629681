"""The oracle and the error budget that every numerical test shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm
from fusednorm import reference
from fusednorm.reference import Spec

INTERPRETED = not torch.cuda.is_available()

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Case:
    """The arguments of one call and the gradient of its output."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    eps: float = 1e-5

    @property
    def shape(self) -> tuple[int, ...]:
        """normalized_shape, which is the last dimension throughout."""
        return (self.x.shape[-1],)


Result = dict[str, Tensor]
Function = Callable[..., Tensor]


def make_case(
    rows: int | tuple[int, ...],
    cols: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    weight: bool = True,
    bias: bool = True,
    mean: float = 0.0,
) -> Case:
    """Draw fresh inputs of one dtype, with a random dy: dy = 1 would hide most errors of dx."""
    leading = (rows,) if isinstance(rows, int) else rows

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64)

    def put(value: Tensor) -> Tensor:
        return value.to(device, dtype)

    return Case(
        x=put(draw(*leading, cols) + mean),
        weight=put(draw(cols)) if weight else None,
        bias=put(draw(cols)) if bias else None,
        dy=put(draw(*leading, cols)),
    )


def plain_spec(shape: tuple[int, ...], eps: float, dtype: torch.dtype) -> Spec:
    """Return what a layer norm without any other term computes."""
    return Spec(shape, eps, False, 0.0, dtype, None, None)


def reference_layer_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return the layer norm of the plain-torch equation."""
    spec = plain_spec(shape, eps, x.dtype)
    return reference.layer_norm(x, None, None, weight, bias, None, None, None, spec)[0]


def run(function: Function, case: Case) -> Result:
    """Return y and every gradient of `function(x, shape, weight, bias, eps)`."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in (("x", case.x), ("weight", case.weight), ("bias", case.bias))
        if tensor is not None
    }
    y = function(leaves["x"], case.shape, leaves.get("weight"), leaves.get("bias"), case.eps)
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def oracle(case: Case) -> dict[str, np.ndarray]:
    """Return y and every gradient in extended precision (at least float64), in NumPy."""

    def wide(tensor: Tensor) -> np.ndarray:
        return tensor.detach().double().cpu().numpy().astype(np.longdouble)

    x, dy = wide(case.x), wide(case.dy)
    rows = tuple(range(x.ndim - 1))
    centred = x - x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + np.longdouble(case.eps))
    x_hat = centred * rstd
    y, g = x_hat, dy
    result = {}
    if case.weight is not None:
        y, g = x_hat * wide(case.weight), dy * wide(case.weight)
        result["dweight"] = (dy * x_hat).sum(rows)
    if case.bias is not None:
        y = y + wide(case.bias)
        result["dbias"] = dy.sum(rows)
    c1, c2 = (g * x_hat).mean(-1, keepdims=True), g.mean(-1, keepdims=True)
    return result | {"y": y, "dx": rstd * (g - x_hat * c1 - c2)}


def errors(result: Result, truth: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the largest error of each tensor; a NaN counts as infinite."""
    assert result.keys() == truth.keys()
    largest = {}
    for name, tensor in result.items():
        assert tensor.shape == truth[name].shape, name
        got = tensor.double().cpu().numpy().astype(np.longdouble)
        error = np.abs(got - truth[name])
        largest[name] = float(np.max(np.where(np.isnan(error), np.inf, error), initial=0.0))
    return largest


def rounding(dtype: torch.dtype, truth: np.ndarray) -> float:
    """Return one rounding to `dtype` at the largest value of `truth`.

    Half a unit in the last place; a whole one in the interpreter, where NumPy has no fused
    multiply-add.
    """
    unit = torch.finfo(dtype).eps * (1.0 if INTERPRETED else 0.5)
    return unit * float(np.max(np.abs(truth), initial=0.0))


def assert_accurate(
    draw: Callable[[], Case],
    ours: Function = fusednorm.layer_norm,
    theirs: Function = F.layer_norm,
    draws: int = 1,
) -> None:
    """Assert that no tensor is further from the truth than torch's plus one rounding.

    Torch's error is a property of the shape and the dtype, and the largest one of a few draws is as
    often lucky as not; it is taken over eight times as many as ours has to stand.

    Args:
        draw: Makes fresh inputs.
        ours: The function under test.
        theirs: The torch computation in the same dtype whose error sets the budget.
        draws: How many inputs `ours` is judged on.
    """
    budget: dict[str, float] = {}
    largest: dict[str, float] = {}
    units: dict[str, float] = {}
    for index in range(8 * draws):
        case = draw()
        truth = oracle(case)
        _raise(budget, errors(run(theirs, case), truth))
        if index < draws:
            result = run(ours, case)
            _raise(largest, errors(result, truth))
            _raise(units, {name: rounding(result[name].dtype, truth[name]) for name in truth})
    for name, error in largest.items():
        allowed = budget[name] + units[name]
        assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g}"


def _raise(largest: dict[str, float], values: dict[str, float]) -> None:
    for name, value in values.items():
        largest[name] = max(value, largest.get(name, 0.0))
