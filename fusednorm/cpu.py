"""The launchers of the compiled CPU kernels: lay out, allocate, call."""

from __future__ import annotations

import torch
from torch import Tensor

from fusednorm import _C  # type: ignore[attr-defined]
from fusednorm.compiled import (
    DTYPE,
    address,
    allocate_gradients,
    allocate_outputs,
    describe_rows,
    describe_term,
    describe_vector,
    problem,
    zero,
)
from fusednorm.spec import Gradients, Mask, compute_dtype, rows_and_columns


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
    rows, cols = rows_and_columns(x, normalized_shape)
    compute = compute_dtype(x.dtype, h_dtype)
    wanted = out_dtype, h_dtype, save_stats, store_h
    z, h, mean, rstd = allocate_outputs(x, rows, compute, rms, *wanted)
    if rows == 0 or cols == 0:
        return z, h, mean, rstd
    options = compute, x_hat_dtype, rms, seed, dropout_p
    _C.forward(
        *problem(rows, cols, *options, gate, weight, bias, scale, shift),
        eps,
        describe_term(shift, cols),
        describe_rows(x, rows, cols),
        describe_rows(residual, rows, cols),
        DTYPE[h_dtype],
        describe_rows(h, rows, cols),
        describe_rows(z, rows, cols),
        address(mean),
        address(rstd),
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
    rows, cols = rows_and_columns(h, normalized_shape)
    dtypes, parameters = (x_dtype, residual_dtype), (gate, weight, bias, scale, shift)
    gradients = allocate_gradients(h, dtypes, parameters, output_mask, dz is not None)
    if rows == 0 or cols == 0:
        return zero(gradients)
    dx, dresidual, dgate, dweight, dbias, dscale, dshift = gradients
    options = rstd.dtype, x_hat_dtype, mean is None, seed, dropout_p
    _C.backward(
        *problem(rows, cols, *options, gate, weight, bias, scale, shift),
        describe_rows(dz, rows, cols),
        describe_rows(dh, rows, cols),
        describe_rows(h, rows, cols),
        None if dgate is None else describe_rows(x, rows, cols),
        address(mean),
        rstd.data_ptr(),
        describe_rows(dx, rows, cols),
        describe_rows(dresidual, rows, cols),
        describe_term(dgate, cols),
        describe_vector(dweight),
        describe_vector(dbias),
        describe_term(dscale, cols),
        describe_term(dshift, cols),
    )
    return gradients
