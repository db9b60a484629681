"""The launchers of the compiled CUDA kernels: check, lay out, allocate, launch.

They have LayerNorm, RMSNorm, residual and dropout for rows of one dtype; Triton's kernels have the
rest of the equation.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fusednorm import _C  # type: ignore[attr-defined]
from fusednorm.compiled import (
    DTYPE,
    address,
    allocate_gradients,
    allocate_outputs,
    describe_rows,
    describe_vector,
    problem,
    zero,
)
from fusednorm.spec import Gradients, Mask, rows_and_columns
from fusednorm.validation import fail

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    """Run the forward kernel; see that of Triton for the arguments and the results.

    Raises:
        ValueError: The kernels do not have what is asked for.
    """
    rows, cols = rows_and_columns(x, normalized_shape)
    with _current(x.device):
        _check(x, (residual,), (out_dtype, h_dtype), (gate, scale, shift), x_hat_dtype, cols)
        _check_parameters(x, weight, bias)
        wanted = out_dtype, h_dtype, save_stats, store_h
        z, h, mean, rstd = allocate_outputs(x, rows, torch.float32, rms, *wanted)
        if rows == 0 or cols == 0:
            return z, h, mean, rstd
        options = torch.float32, None, rms, seed, dropout_p
        _C.cuda_forward(
            *problem(rows, cols, *options, None, weight, bias, None, None),
            eps,
            None,  # shift
            describe_rows(x, rows, cols),
            describe_rows(residual, rows, cols),
            DTYPE[h_dtype],
            describe_rows(h, rows, cols),
            describe_rows(z, rows, cols),
            address(mean),
            address(rstd),
            _stream(x.device),
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
    """Run the backward kernels; see those of Triton for the arguments and the results.

    Raises:
        ValueError: The kernels do not have what is asked for.
    """
    rows, cols = rows_and_columns(h, normalized_shape)
    with _current(h.device):
        dtypes = x_dtype, residual_dtype
        _check(h, (dz, dh), dtypes, (gate, scale, shift), x_hat_dtype, cols)
        _check_parameters(h, weight, bias)
        parameters = None, weight, bias, None, None
        gradients = allocate_gradients(h, dtypes, parameters, output_mask, dz is not None)
        if rows == 0 or cols == 0:
            return zero(gradients)
        dx, dresidual, _, dweight, dbias, *_ = gradients
        partials = None
        if dweight is not None or dbias is not None:
            has_stream = dh is not None or dresidual is not None or seed is not None
            count = _C.cuda_partial_rows(rows, cols, DTYPE[h.dtype], has_stream)
            partials = torch.empty((count, 2, cols), dtype=torch.float32, device=h.device)
        options = torch.float32, None, mean is None, seed, dropout_p
        _C.cuda_backward(
            *problem(rows, cols, *options, None, weight, bias, None, None),
            describe_rows(dz, rows, cols),
            describe_rows(dh, rows, cols),
            describe_rows(h, rows, cols),
            None,  # x
            address(mean),
            address(rstd),
            describe_rows(dx, rows, cols),
            describe_rows(dresidual, rows, cols),
            describe_vector(dweight),
            describe_vector(dbias),
            address(partials),
            0 if partials is None else partials.shape[0],
            _stream(h.device),
        )
    return gradients


def _check(
    rows: Tensor,
    other_rows: tuple[Tensor | None, ...],
    other_dtypes: tuple[torch.dtype | None, ...],
    terms: tuple[Tensor | None, ...],
    x_hat_dtype: torch.dtype | None,
    cols: int,
) -> None:
    """Refuse what the kernels do not have, before anything is allocated."""
    for name, term in zip(("gate", "scale", "shift"), terms, strict=True):
        if term is not None:
            fail("cuda backend", f"no {name}, which the triton backend has", "one")
    if x_hat_dtype is not None:
        fail("cuda backend", "no dtype that x_hat is rounded to", x_hat_dtype)
    if rows.dtype not in _DTYPES:
        fail("cuda backend", "rows of float16, bfloat16 or float32", rows.dtype)
    others = [None if tensor is None else tensor.dtype for tensor in other_rows]
    for dtype in (*others, *other_dtypes):
        if dtype is not None and dtype != rows.dtype:
            fail("cuda backend", f"rows of one dtype, {rows.dtype}", dtype)
    widest = _C.cuda_widest_rows()
    if cols > widest:
        fail("cuda backend", f"at most {widest} columns on this device", cols)


def _check_parameters(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    dtypes = {parameter.dtype for parameter in (weight, bias) if parameter is not None}
    if len(dtypes) > 1 or not dtypes <= {rows.dtype, torch.float32}:
        expected = f"weight and bias of one dtype, {rows.dtype} or float32"
        fail("cuda backend", expected, " and ".join(sorted(map(str, dtypes))))


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` the one in use, which the extension launches on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    """Return the address of the stream that torch launches on."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
