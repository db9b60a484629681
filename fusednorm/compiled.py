"""What the launchers of the compiled kernels share: allocation, and tensors as addresses.

The dispatcher would take longer over the arguments than the kernels over a small tensor. A tuple
that describes a tensor holds it, too, until the call ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusednorm.spec import Gradients, Mask

DTYPE = {None: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4}

Rows = tuple[Tensor, int, int, int]
"""Tensor, address, elements from one row to the next, dtype."""

Term = tuple[Tensor, int, int, int, bool]
"""Tensor, address, elements from one sample to the next, dtype, whether it is one number."""


def allocate_outputs(
    x: Tensor,
    rows: int,
    compute: torch.dtype,
    rms: bool,
    out_dtype: torch.dtype,
    h_dtype: torch.dtype | None,
    save_stats: bool,
    store_h: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Allocate z and, where they are wanted, h, mean and rstd."""
    h = mean = rstd = None
    if h_dtype is not None and store_h:
        h = _empty_like(x, h_dtype)
    if save_stats:
        rstd = x.new_empty(rows, dtype=compute)
        mean = None if rms else torch.empty_like(rstd)
    return _empty_like(x, out_dtype), h, mean, rstd


def allocate_gradients(
    h: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    parameters: tuple[Tensor | None, ...],
    output_mask: Mask,
    through_z: bool,
) -> Gradients:
    """Allocate dx, dresidual and those of gate, weight, bias, scale and shift that are wanted.

    Without a gradient of z there is none but those of x, residual and gate.
    """
    gate, weight, bias, scale, shift = parameters
    wants_dx, wants_dresidual, wants_dgate, *wants = output_mask
    wants_dweight, wants_dbias, wants_dscale, wants_dshift = wants if through_z else (False,) * 4
    return (
        _empty_like(h, dtypes[0]) if wants_dx else None,
        _empty_like(h, dtypes[1]) if wants_dresidual else None,
        None if gate is None or not wants_dgate else _empty_like(gate, gate.dtype),
        None if weight is None or not wants_dweight else _empty_like(weight, weight.dtype),
        None if bias is None or not wants_dbias else _empty_like(bias, bias.dtype),
        None if scale is None or not wants_dscale else _empty_like(scale, scale.dtype),
        None if shift is None or not wants_dshift else _empty_like(shift, shift.dtype),
    )


def zero(gradients: Gradients) -> Gradients:
    """Fill the gradients of a tensor without elements."""
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()
    return gradients


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype is dtype and tensor.is_contiguous():
        return torch.empty_like(tensor)  # takes a third less time than with keywords
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


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
    samples = 1
    for term in (gate, scale, shift):
        if term is not None:
            samples = max(samples, term.shape[0])
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
