"""Forward kernel and its launcher: the whole equation, with compile-time flags for its terms.

    h = residual + gate * dropout(x)    x_hat = (h - mean) * rstd    y = x_hat * weight + bias
    z = y * (1 + scale) + shift

`normalise.py` holds the arithmetic; `README.md` beside this file explains it, and the tiling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusednorm.spec import compute_dtype, drop_below, rows_and_columns

from . import launch, plans
from .config import forward_config
from .normalise import Norm, Stream, looped, resident
from .tile import Dropout, Rows, Term, Tile, constants, corrects_mean, row_offsets


# No value of M or of a stride may become part of what is compiled.
@triton.jit(
    do_not_specialize=(
        "M",
        "x_stride",
        "residual_stride",
        "gate_stride",
        "scale_stride",
        "shift_stride",
        "rows_per_sample",
        "steps",
        "drop_below",
    )
)
def layer_norm_fwd_kernel(
    x_ptr,  # [M, N], rows x_stride apart but for x_jumps
    residual_ptr,  # [M, N], rows residual_stride apart but for residual_jumps, or None
    gate_ptr,  # a vector [N] or a number for each sample, gate_stride apart, or None
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    scale_ptr,  # as gate
    shift_ptr,  # as gate
    seed_ptr,  # one int64, or None without dropout
    z_ptr,  # [M, N], contiguous
    h_ptr,  # [M, N], contiguous, or None where h is not wanted or is x
    mean_ptr,  # [M], or None where nothing needs a gradient, and for RMS
    rstd_ptr,  # [M], or None where nothing needs a gradient
    M: tl.int64,
    x_stride: tl.int64,
    x_jumps,  # `jump_arguments`, or None
    residual_stride: tl.int64,
    residual_jumps,
    gate_stride: tl.int64,
    scale_stride: tl.int64,
    shift_stride: tl.int64,
    rows_per_sample: tl.int64,
    steps: tl.int32,  # chunks of a looped row; a constant would unroll the loop, and spill
    drop_below: tl.int64,  # random words below it drop their element
    inverse_keep: tl.float64,  # 1 / (1 - dropout_p)
    eps: tl.float64,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    LOOPED: tl.constexpr,
    RMS: tl.constexpr,
    SAMPLED: tl.constexpr,  # some term differs from sample to sample
    GATE_SCALAR: tl.constexpr,
    SCALE_SCALAR: tl.constexpr,
    SHIFT_SCALAR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    RESIDUAL_VECTOR: tl.constexpr,
    TERM_VECTOR: tl.constexpr,
    H_DTYPE: tl.constexpr,  # dtype that h is rounded to; None where h is x
    X_HAT_DTYPE: tl.constexpr,  # dtype that x_hat is rounded to, or None
    COMPUTE: tl.constexpr,
):
    X_DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    CORRECTED: tl.constexpr = corrects_mean(
        RMS, N, X_DTYPE if H_DTYPE is None else H_DTYPE, z_ptr.dtype.element_ty, COMPUTE
    )
    C: tl.constexpr = constants(
        N, ROWS, BLOCK_N, CHUNKS, TERM_VECTOR, COMPUTE, H_DTYPE, X_HAT_DTYPE, CORRECTED
    )
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    samples = tl.zeros((ROWS,), tl.int64)
    if SAMPLED:
        samples = tl.minimum(rows, M - 1) // rows_per_sample
    tile = Tile(rows, M, samples, 0)
    stream = Stream(
        Rows(x_ptr, row_offsets(rows, x_stride, X_VECTOR, x_jumps)),
        Rows(residual_ptr, row_offsets(rows, residual_stride, RESIDUAL_VECTOR, residual_jumps)),
        Term(gate_ptr, gate_ptr if GATE_SCALAR else None, gate_stride),
        Dropout(seed_ptr, drop_below, inverse_keep),
        Rows(None, None),
    )
    scale = Term(scale_ptr, scale_ptr if SCALE_SCALAR else None, scale_stride)
    shift = Term(shift_ptr, shift_ptr if SHIFT_SCALAR else None, shift_stride)
    norm = Norm(weight_ptr, bias_ptr, scale, shift, Rows(None, None), z_ptr, h_ptr)
    if LOOPED:
        mean, rstd = looped(stream, norm, tile, eps, steps, RMS, C)
    else:
        mean, rstd = resident(stream, norm, tile, eps, RMS, C)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@plans.repeated("triton_forward", tensors=8, device_of=0)
def layer_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    seed: torch.Tensor | None,
    normalized_shape: tuple[int, ...],
    eps: float,
    rms: bool,
    dropout_p: float,
    out_dtype: torch.dtype,
    h_dtype: torch.dtype | None,
    x_hat_dtype: torch.dtype | None,
    save_stats: bool,
    store_h: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Run the forward kernel.

    Args:
        x: [*, *normalized_shape], any strides; copied once where columns are not adjacent or rows
            jump in more than two places.
        residual: Of x's shape, any float dtype and strides, or None.
        gate: [1 or S, N or 1] with S samples of M / S consecutive rows each, or None.
        weight: N elements of any float dtype, or None.
        bias: N elements of any float dtype, or None.
        scale: As gate; all terms that differ between samples have the same S.
        shift: As scale.
        seed: One int64, the key of dropout, or None without dropout.
        normalized_shape: The trailing dimensions that form a row.
        eps: Added to the variance.
        rms: Whether the mean is taken as 0.
        dropout_p: The share of elements to drop where there is a seed.
        out_dtype: dtype of z.
        h_dtype: dtype that h is rounded to; None where h is x.
        x_hat_dtype: dtype that x_hat is rounded to before the affine part, or None.
        save_stats: Whether mean and rstd are wanted.
        store_h: Whether h is wanted, if it is not x.

    Returns:
        z of x's shape, contiguous; h likewise, or None; mean (None for RMS) and rstd of shape [M]
        in the compute dtype, or None.
    """
    rows, cols = rows_and_columns(x, normalized_shape)
    compute = compute_dtype(x.dtype, h_dtype)
    z = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    h = mean = rstd = None
    if h_dtype is not None and store_h:
        h = torch.empty(x.shape, dtype=h_dtype, device=x.device)
    if save_stats:
        rstd = torch.empty(rows, dtype=compute, device=x.device)
        mean = None if rms else torch.empty_like(rstd)
    if z.numel() == 0:
        return z, h, mean, rstd
    x_rows, residual_rows = (launch.as_rows(t, normalized_shape) for t in (x, residual))
    terms = launch.terms(rows, cols, gate, scale, shift)
    gate, scale, shift = terms.tensors
    arch = launch.architecture(x.device)
    config = forward_config(cols, launch.itemsize(compute, z, h), arch)
    tile = config.tile
    with launch.device_guard(x.device):
        plans.start(
            layer_norm_fwd_kernel,
            (-(-rows // tile.rows),),
            x_rows.tensor,
            residual_rows.tensor,
            gate,
            launch.vector(weight),
            launch.vector(bias),
            scale,
            shift,
            seed,
            z,
            h,
            mean,
            rstd,
            rows,
            x_rows.stride,
            x_rows.jumps,
            residual_rows.stride,
            residual_rows.jumps,
            *terms.strides,
            terms.rows_per_sample,
            -(-cols // tile.block_n),
            drop_below(dropout_p),
            1.0 / (1.0 - dropout_p),
            eps,
            N=cols,
            ROWS=tile.rows,
            BLOCK_N=tile.block_n,
            CHUNKS=tile.chunks,
            LOOPED=config.looped,
            RMS=rms,
            X_VECTOR=x_rows.vector,
            RESIDUAL_VECTOR=residual_rows.vector,
            H_DTYPE=launch.TRITON_DTYPE[h_dtype],
            X_HAT_DTYPE=launch.TRITON_DTYPE[x_hat_dtype],
            COMPUTE=launch.TRITON_DTYPE[compute],
            **terms.constants,
            **launch.options(tile.num_warps, arch, cluster=tile.cluster),
        )
    return z, h, mean, rstd
