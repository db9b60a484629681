"""The tensor contract and every message that a user can meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import NoReturn, TypeGuard

import torch
from torch import Tensor

from fusednorm.observers import shape_of

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def fail(
    operation: str, expected: str, got: object, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise `error` in the one form that all messages have."""
    raise error(f"{operation}: expected {expected}, got {got}")


def check_norm(
    op: str,
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[tuple[int, ...], float]:
    """Check what every norm takes; return `normalized_shape` as a tuple, and `eps`.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: A shape or a device does not fit.
    """
    _check_tensor(op, "input", input)
    if input.layout is not torch.strided and not input.is_nested:
        layout = str(input.layout).removeprefix("torch.")
        fail(op, "input of strided layout", layout, TypeError)
    shape = _shape_tuple(op, normalized_shape)
    if not shape:
        fail(op, "normalized_shape of at least one dimension", shape)
    if (sizes := _sizes(op, input, len(shape)))[-len(shape) :] != shape:
        fail(op, f"input of shape (*, {', '.join(map(str, shape))})", sizes)
    if weight is not None:
        _check_companion(op, "weight", weight, input, shape)
    if bias is not None:
        _check_companion(op, "bias", bias, input, shape)
    return shape, eps if type(eps) is float else _float(op, "eps", eps)


def check_channel_norm(
    op: str, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> float:
    """Check what a norm over dimension 1 takes; return `eps`.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: A shape or a device does not fit.
    """
    _check_tensor(op, "input", input)
    if input.layout is not torch.strided or input.is_nested:
        layout = "nested" if input.is_nested else str(input.layout).removeprefix("torch.")
        fail(op, "input of strided layout", layout, TypeError)
    sizes = tuple(shape_of(input))
    if len(sizes) < 2:
        fail(op, "input of shape (B, C, *)", sizes)
    if weight is not None:
        _check_companion(op, "weight", weight, input, sizes[1:2])
    if bias is not None:
        _check_companion(op, "bias", bias, input, sizes[1:2])
    return _float(op, "eps", eps)


def _sizes(op: str, input: Tensor, count: int) -> tuple[int, ...]:
    """Return the shape of `input`, or the last `count` sizes of a nested tensor."""
    if not input.is_nested or input.layout is not torch.strided:
        return tuple(shape_of(input))
    try:
        return tuple(input.size(-i) for i in range(count, 0, -1))
    except RuntimeError:
        fail(op, f"a nested tensor whose last {count} sizes are one number each", "others")


def check_residual(op: str, residual: Tensor | None, input: Tensor) -> None:
    """Check that there is no residual or that it fits `input`."""
    if residual is None:
        return
    if input.is_nested:
        _check_tensor(op, "residual", residual, " or None")
        if not residual.is_nested or residual.layout is not input.layout:
            fail(op, "residual to be a nested tensor like input", type(residual).__name__)
        if residual.layout is torch.jagged and residual.shape != input.shape:
            fail(op, f"residual of shape {tuple(input.shape)}", tuple(residual.shape))
        return _check_device(op, "residual", residual, input)
    _check_companion(op, "residual", residual, input, tuple(shape_of(input)))


def check_gate_input(op: str, gate_input: Tensor, input: Tensor) -> None:
    """Check what the SiLU is taken of, which has the shape of `input`."""
    _check_tensor(op, "gate_input", gate_input)
    if input.is_nested or gate_input.is_nested:
        fail(op, "no gate_input with a nested tensor", "one")
    _check_companion(op, "gate_input", gate_input, input, tuple(shape_of(input)))


def check_group_size(op: str, group_size: int | None, cols: int) -> int:
    """Return how many columns have statistics of their own: all of a row, or a divisor of it."""
    if group_size is None:
        return cols
    if not _is_size(group_size):
        fail(op, "group_size to be an int or None", type(group_size).__name__, TypeError)
    if group_size < 1 or cols % group_size != 0:
        fail(op, f"group_size that divides the {cols} columns of a row", group_size)
    return group_size


def check_residual_dtype(op: str, dtype: torch.dtype | None) -> None:
    """Check the dtype that the caller wants the residual stream in."""
    if dtype is not None and dtype not in DTYPES:
        fail(
            op,
            "residual_dtype to be None, float16, bfloat16, float32 or float64",
            dtype,
            TypeError,
        )


def check_dropout(op: str, dropout_p: float) -> float:
    """Return the rate of dropout, which leaves something: p = 1 would divide by 0."""
    p = _float(op, "dropout_p", dropout_p)
    if not 0 <= p < 1:
        fail(op, "dropout_p in [0, 1)", p)
    return p


def check_terms(
    op: str, input: Tensor, shape: tuple[int, ...], **terms: Tensor | None
) -> list[Tensor | None]:
    """Return each term as [1 or S, N or 1]: S samples of consecutive rows of `input`."""
    if input.is_nested:
        for name, term in terms.items():
            if term is not None:
                fail(op, f"no {name} with a nested tensor", "one")
    sizes = {
        name: _term_size(op, name, term, input, shape)
        for name, term in terms.items()
        if term is not None
    }
    if not sizes:
        return [*terms.values()]
    samples = max([1, *(rows for rows, _ in sizes.values())])
    flat: list[Tensor | None] = []
    for name, term in terms.items():
        if term is not None:
            rows, _ = sizes[name]
            term = term.reshape(sizes[name])
            if rows not in (0, 1, samples):
                term = term.repeat_interleave(samples // rows, 0)
        flat.append(term)
    return flat


def _term_size(
    op: str, name: str, term: Tensor, input: Tensor, shape: tuple[int, ...]
) -> tuple[int, int]:
    """Return over how many samples, and how many columns, a term has numbers of its own."""
    _check_tensor(op, name, term, " or None")
    _check_device(op, name, term, input)
    batch = tuple(shape_of(input)[: input.dim() - len(shape)])
    sizes = (*(1,) * (input.dim() - term.dim()), *shape_of(term))
    leading, trailing = sizes[: len(batch)], sizes[len(batch) :]
    sampled = max([0, *(i + 1 for i, size in enumerate(leading) if size != 1)])
    if (
        len(sizes) != input.dim()
        or (trailing != shape and any(size != 1 for size in trailing))
        or leading[:sampled] != batch[:sampled]
    ):
        sample = (*batch[:1], *(1 for _ in batch[1:]))
        shapes = f"{shape}, {sample + shape} or {sample + tuple(1 for _ in shape)}"
        fail(op, f"{name} of shape {shapes}", tuple(term.shape))
    return math.prod(leading), math.prod(trailing)


def _check_tensor(op: str, name: str, tensor: Tensor, alternative: str = "") -> None:
    if not isinstance(tensor, Tensor):
        fail(op, f"{name} to be a Tensor{alternative}", type(tensor).__name__, TypeError)
    if tensor.dtype not in DTYPES:
        dtype = str(tensor.dtype).removeprefix("torch.")
        fail(op, f"{name} of dtype float16, bfloat16, float32 or float64", dtype, TypeError)


def _check_device(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        fail(op, f"{name} on {input.device}, where input is", tensor.device)


def _check_companion(
    op: str, name: str, tensor: Tensor, input: Tensor, shape: tuple[int, ...]
) -> None:
    """Check a tensor that has to have a certain shape."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
        _check_tensor(op, name, tensor, " or None")
    if shape_of(tensor) != shape:
        fail(op, f"{name} of shape {shape}", tuple(tensor.shape))
    _check_device(op, name, tensor, input)


def is_shape(normalized_shape: object) -> TypeGuard[tuple[int, ...]]:
    """Return whether it is a tuple of ints, and none that torch would take for ints."""
    if type(normalized_shape) is not tuple:
        return False
    for size in normalized_shape:  # noqa: SIM110  (all() takes three times as long)
        if type(size) is not int:
            return False
    return True


def _shape_tuple(op: str, normalized_shape: object) -> tuple[int, ...]:
    if is_shape(normalized_shape):
        return normalized_shape
    if type(normalized_shape) is int:
        return (normalized_shape,)
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
