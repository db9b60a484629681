"""The tensor contract and every message that a user can meet."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import NoReturn

import torch
from torch import Tensor

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def fail(
    operation: str, expected: str, got: object, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise `error` in the one form that all messages have."""
    raise error(f"{operation}: expected {expected}, got {got}")


def check_layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[tuple[int, ...], float]:
    """Check the arguments of `layer_norm`; return `normalized_shape` as a tuple, and `eps`.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: A shape or a device does not fit.
    """
    op = "layer_norm"
    if not isinstance(input, Tensor):
        fail(op, "input to be a Tensor", type(input).__name__, TypeError)
    if input.dtype not in DTYPES:
        _fail_dtype(op, "input", input)
    if input.layout is not torch.strided and not input.is_nested:
        layout = str(input.layout).removeprefix("torch.")
        fail(op, "input of strided layout", layout, TypeError)
    shape = _shape_tuple(op, normalized_shape)
    if not shape:
        fail(op, "normalized_shape of at least one dimension", shape)
    if input.shape[-len(shape) :] != shape:
        fail(op, f"input of shape (*, {', '.join(map(str, shape))})", tuple(input.shape))
    if weight is not None:
        _check_parameter(op, "weight", weight, shape, input)
    if bias is not None:
        _check_parameter(op, "bias", bias, shape, input)
    return shape, eps if type(eps) is float else _float(op, "eps", eps)


def _check_parameter(
    op: str, name: str, parameter: Tensor, shape: tuple[int, ...], input: Tensor
) -> None:
    if not isinstance(parameter, Tensor):
        fail(op, f"{name} to be a Tensor or None", type(parameter).__name__, TypeError)
    if parameter.shape != shape:
        fail(op, f"{name} of shape {shape}", tuple(parameter.shape))
    if parameter.device != input.device:
        fail(op, f"{name} on {input.device}, where input is", parameter.device)
    if parameter.dtype not in DTYPES:
        _fail_dtype(op, name, parameter)


def _fail_dtype(op: str, name: str, tensor: Tensor) -> NoReturn:
    fail(
        op,
        f"{name} of dtype float16, bfloat16, float32 or float64",
        str(tensor.dtype).removeprefix("torch."),
        TypeError,
    )


def _shape_tuple(op: str, normalized_shape: object) -> tuple[int, ...]:
    if type(normalized_shape) is tuple:
        for size in normalized_shape:
            if type(size) is not int:
                break
        else:
            return normalized_shape
    sizes = (normalized_shape,) if _is_size(normalized_shape) else normalized_shape
    if (
        isinstance(sizes, Sequence)
        and not isinstance(sizes, str | bytes)
        and all(map(_is_size, sizes))
    ):
        # A SymInt stands for an int until a compiler knows it.
        return tuple(size if isinstance(size, torch.SymInt) else int(size) for size in sizes)  # type: ignore[misc]
    expected = "normalized_shape to be an int or a sequence of ints"
    fail(op, expected, repr(normalized_shape), TypeError)


def _is_size(value: object) -> bool:
    return isinstance(value, Integral | torch.SymInt) and not isinstance(value, bool)


def _float(op: str, name: str, value: object) -> float:
    """Take whatever is one number, as torch does: an int, NumPy's numbers, a tensor of one."""
    if isinstance(value, Real | torch.SymFloat) or (
        isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    ):
        return float(value)
    fail(op, f"{name} to be a float", type(value).__name__, TypeError)
