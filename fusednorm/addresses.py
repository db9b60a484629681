"""How tensors go to the compiled extension: as addresses, strides and dtypes.

The dispatcher would take longer over the arguments than the kernels over a small tensor. A tuple
that describes a tensor holds it, too, until the call ends.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPE = {None: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4}

Rows = tuple[Tensor, int, int, int]
"""Tensor, address, elements from one row to the next, dtype."""

Term = tuple[Tensor, int, int, int, bool]
"""Tensor, address, elements from one sample to the next, dtype, whether it is one number."""


def rows_and_columns(x: Tensor, normalized_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return M and N."""
    return math.prod(x.shape[: x.dim() - len(normalized_shape)]), math.prod(normalized_shape)


def problem(
    rows: int,
    cols: int,
    compute: torch.dtype,
    x_hat_dtype: torch.dtype | None,
    rms: bool,
    seed: Tensor | None,
    dropout_p: float,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[object, ...]:
    """Return what every kernel is given first."""
    samples = max([term.shape[0] for term in (gate, scale, shift) if term is not None], default=1)
    return (
        rows,
        cols,
        rows // samples,
        DTYPE[compute],
        DTYPE[x_hat_dtype],
        rms,
        address(seed),
        dropout_p,
        describe_term(gate, cols),
        describe_vector(weight),
        describe_vector(bias),
        describe_term(scale, cols),
    )


def describe_rows(tensor: Tensor | None, rows: int, cols: int) -> Rows | None:
    """Describe M rows of N columns; copy them where they are not evenly spaced and adjacent."""
    if tensor is None:
        return None
    stride = cols
    if not tensor.is_contiguous():
        tensor = tensor.reshape(rows, cols)
        if cols > 1 and tensor.stride(1) != 1:
            tensor = tensor.contiguous()
        stride = tensor.stride(0)
    return tensor, tensor.data_ptr(), stride, DTYPE[tensor.dtype]


def describe_vector(parameter: Tensor | None) -> Term | None:
    """Describe a weight or a bias."""
    if parameter is None:
        return None
    parameter = parameter.contiguous()
    return parameter, parameter.data_ptr(), 0, DTYPE[parameter.dtype], False


def describe_term(term: Tensor | None, cols: int) -> Term | None:
    """Describe a gate, scale or shift, [1 or S, N or 1]."""
    if term is None:
        return None
    is_number = term.shape[1] < cols
    if not is_number and cols > 1 and term.stride(1) != 1:
        term = term.contiguous()
    stride = 0 if term.shape[0] == 1 else term.stride(0)
    return term, term.data_ptr(), stride, DTYPE[term.dtype], is_number


def address(tensor: Tensor | None) -> int:
    """Return where a tensor starts; 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()
