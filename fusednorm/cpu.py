"""The launchers of the compiled CPU kernels: lay out, allocate, call.

Tensors go to the extension as addresses: the dispatcher would take longer over its arguments than
the kernels over a small tensor. A tuple that describes a tensor holds it, too, until the call ends.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusednorm import _C  # type: ignore[attr-defined]
from fusednorm.reference import Gradients, Mask, compute_dtype

_DTYPE = {None: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4}

_Rows = tuple[Tensor, int, int, int]
"""Tensor, address, elements from one row to the next, dtype."""

_Term = tuple[Tensor, int, int, int, bool]
"""Tensor, address, elements from one sample to the next, dtype, whether it is one number."""


def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    normalized_shape: tuple[int, ...],
    eps: float,
    rms: bool,
    dropout_p: float,
    out_dtype: torch.dtype,
    h_dtype: torch.dtype | None,
    x_hat_dtype: torch.dtype | None,
    save_stats: bool,
    store_h: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Run the forward kernel; see that of Triton for the arguments and the results."""
    rows, cols = _rows_and_columns(x, normalized_shape)
    compute = compute_dtype(x.dtype, h_dtype)
    z = _empty_like(x, out_dtype)
    h = mean = rstd = None
    if h_dtype is not None and store_h:
        h = _empty_like(x, h_dtype)
    if save_stats:
        rstd = torch.empty(rows, dtype=compute)
        mean = None if rms else torch.empty_like(rstd)
    if rows == 0 or cols == 0:
        return z, h, mean, rstd
    options = compute, x_hat_dtype, rms, seed, dropout_p
    _C.forward(
        *_problem(rows, cols, *options, gate, weight, bias, scale, shift),
        eps,
        None if shift is None else _term(shift, cols),
        _rows(x, rows, cols),
        None if residual is None else _rows(residual, rows, cols),
        _DTYPE[h_dtype],
        None if h is None else _rows(h, rows, cols),
        _rows(z, rows, cols),
        0 if mean is None else mean.data_ptr(),
        0 if rstd is None else rstd.data_ptr(),
    )
    return z, h, mean, rstd


def layer_norm_bwd(
    dz: Tensor | None,
    dh: Tensor | None,
    x: Tensor | None,
    h: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    normalized_shape: tuple[int, ...],
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    x_hat_dtype: torch.dtype | None,
    output_mask: Mask,
) -> Gradients:
    """Run the backward kernel; see that of Triton for the arguments and the results."""
    rows, cols = _rows_and_columns(h, normalized_shape)
    dx = _empty_like(h, x_dtype) if output_mask[0] else None
    dresidual = _empty_like(h, residual_dtype) if output_mask[1] else None
    dgate = dweight = dbias = dscale = dshift = None
    if gate is not None and output_mask[2]:
        dgate = _empty_like(gate, gate.dtype)
    if dz is not None:
        if weight is not None and output_mask[3]:
            dweight = _empty_like(weight, weight.dtype)
        if bias is not None and output_mask[4]:
            dbias = _empty_like(bias, bias.dtype)
        if scale is not None and output_mask[5]:
            dscale = _empty_like(scale, scale.dtype)
        if shift is not None and output_mask[6]:
            dshift = _empty_like(shift, shift.dtype)
    gradients = dx, dresidual, dgate, dweight, dbias, dscale, dshift
    if rows == 0 or cols == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return gradients
    options = rstd.dtype, x_hat_dtype, mean is None, seed, dropout_p
    _C.backward(
        *_problem(rows, cols, *options, gate, weight, bias, scale, shift),
        None if dz is None else _rows(dz, rows, cols),
        None if dh is None else _rows(dh, rows, cols),
        _rows(h, rows, cols),
        None if x is None or dgate is None else _rows(x, rows, cols),
        0 if mean is None else mean.data_ptr(),
        rstd.data_ptr(),
        None if dx is None else _rows(dx, rows, cols),
        None if dresidual is None else _rows(dresidual, rows, cols),
        None if dgate is None else _term(dgate, cols),
        None if dweight is None else _vector(dweight),
        None if dbias is None else _vector(dbias),
        None if dscale is None else _term(dscale, cols),
        None if dshift is None else _term(dshift, cols),
    )
    return gradients


def _rows_and_columns(x: Tensor, normalized_shape: tuple[int, ...]) -> tuple[int, int]:
    cols = math.prod(normalized_shape)
    if cols == 0:
        return math.prod(x.shape[: -len(normalized_shape)]), cols
    return x.numel() // cols, cols


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _problem(
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
    """Return what both kernels are given first."""
    samples = 1
    for term in (gate, scale, shift):
        if term is not None:
            samples = max(samples, term.shape[0])
    return (
        rows,
        cols,
        rows // samples,
        _DTYPE[compute],
        _DTYPE[x_hat_dtype],
        rms,
        0 if seed is None else seed.data_ptr(),
        dropout_p,
        None if gate is None else _term(gate, cols),
        None if weight is None else _vector(weight),
        None if bias is None else _vector(bias),
        None if scale is None else _term(scale, cols),
    )


def _rows(tensor: Tensor, rows: int, cols: int) -> _Rows:
    """Describe M rows of N columns; copy them where they are not evenly spaced and adjacent."""
    stride = cols
    if not tensor.is_contiguous():
        tensor = tensor.reshape(rows, cols)
        if cols > 1 and tensor.stride(1) != 1:
            tensor = tensor.contiguous()
        stride = tensor.stride(0)
    return tensor, tensor.data_ptr(), stride, _DTYPE[tensor.dtype]


def _vector(parameter: Tensor) -> _Term:
    """Describe a weight or a bias."""
    parameter = parameter.contiguous()
    return parameter, parameter.data_ptr(), 0, _DTYPE[parameter.dtype], False


def _term(term: Tensor, cols: int) -> _Term:
    """Describe a gate, scale or shift, [1 or S, N or 1]."""
    is_number = term.shape[1] < cols
    if not is_number and cols > 1 and term.stride(1) != 1:
        term = term.contiguous()
    stride = 0 if term.shape[0] == 1 else term.stride(0)
    return term, term.data_ptr(), stride, _DTYPE[term.dtype], is_number
