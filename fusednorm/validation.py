"""The tensor contract and every message that a user can meet."""

from __future__ import annotations

from collections.abc import Sequence
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
) -> tuple[int, ...]:
    """Check the arguments of `layer_norm` and return `normalized_shape` as a tuple.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: A shape or a device does not fit.
    """
    op = "layer_norm"
    if not isinstance(input, Tensor):
        fail(op, "input to be a Tensor", type(input).__name__, TypeError)
    if input.dtype not in DTYPES:
        _fail_dtype(op, "input", input)
    shape = (
        normalized_shape if type(normalized_shape) is tuple else _shape_tuple(op, normalized_shape)
    )
    if not shape:
        fail(op, "normalized_shape of at least one dimension", shape)
    if input.shape[-len(shape) :] != shape:
        fail(op, f"input of shape (*, {', '.join(map(str, shape))})", tuple(input.shape))
    if weight is not None:
        _check_parameter(op, "weight", weight, shape, input)
    if bias is not None:
        _check_parameter(op, "bias", bias, shape, input)
    if not isinstance(eps, (float, int)):
        fail(op, "eps to be a float", type(eps).__name__, TypeError)
    return shape


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
    if isinstance(normalized_shape, int):
        return (normalized_shape,)
    if isinstance(normalized_shape, Sequence) and not isinstance(normalized_shape, str):
        return tuple(normalized_shape)
    fail(op, "normalized_shape to be an int or a sequence of ints", normalized_shape, TypeError)
