"""Forward kernel and its launcher: the whole equation, with compile-time flags for its terms.

    h = residual + gate * dropout(x)    x_hat = (h - mean) * rstd    y = x_hat * weight + bias
    z = y * (1 + scale) + shift

`README.md` beside this file derives the statistics and explains the tiling.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fusednorm.spec import compute_dtype, drop_below, rows_and_columns

from . import launch, plans
from .config import forward_config
from .tile import (
    Dropout,
    Rows,
    Term,
    Tile,
    add_chunks,
    constants,
    corrects_mean,
    dropped_out,
    load_parameter,
    load_rows,
    load_term,
    rounded,
    row_offsets,
    silu,
    store_rows,
    sum_pair,
    take_chunk,
    widen,
    zeros,
)


class Stream(NamedTuple):
    """What h is made of; `silu` is the rows of a gate whose SiLU multiplies all of it."""

    x: Any
    residual: Any
    gate: Any
    dropout: Any
    silu: Any


class Norm(NamedTuple):
    """What x_hat becomes, and pointers to where z and h go; `silu` as in `Stream`."""

    weight: Any
    bias: Any
    scale: Any
    shift: Any
    silu: Any
    z: Any
    h: Any


@triton.jit
def _load_h(stream, tile, chunk, C: tl.constexpr):
    """Return a [ROWS, BLOCK_N] chunk of h = residual + gate * dropout(x), rounded as it is stored.

    Rounding first makes the statistics, and with them the backward, those of the h that the next
    layer sees. Where the mask ends, h is 0.
    """
    h = dropped_out(stream.dropout, tile, chunk, load_rows(stream.x, chunk, C), C)
    if stream.gate.ptr is not None:
        h *= widen(load_term(stream.gate, tile.samples, chunk.cols, C), C)
    if stream.residual.ptr is not None:
        h += load_rows(stream.residual, chunk, C)
    if stream.silu.ptr is not None:
        h *= silu(load_rows(stream.silu, chunk, C))
    return rounded(h, C.H_DTYPE)


@triton.jit
def _store_z(norm, tile, chunk, x_hat, C: tl.constexpr):
    """Store a [ROWS, BLOCK_N] chunk of z = (x_hat * weight + bias) * (1 + scale) + shift."""
    z = rounded(x_hat, C.X_HAT_DTYPE)
    if norm.weight is not None:
        z = z * widen(load_parameter(norm.weight, chunk, C), C)
    if norm.bias is not None:
        z = z + widen(load_parameter(norm.bias, chunk, C), C)
    if norm.scale.ptr is not None:
        scale = load_term(norm.scale, tile.samples, chunk.cols, C)
        z = z * (1.0 + widen(scale, C))
    if norm.shift.ptr is not None:
        z = z + widen(load_term(norm.shift, tile.samples, chunk.cols, C), C)
    if norm.silu.ptr is not None:
        z = z * silu(load_rows(norm.silu, chunk, C))
    store_rows(norm.z, tile, chunk, z, C)


@triton.jit
def _inverse_deviation(var, eps, C: tl.constexpr):
    """Return the [ROWS] rstd."""
    return tl.rsqrt(var + tl.full((C.ROWS,), eps, C.COMPUTE))


@triton.jit
def resident(stream, norm, tile, eps, RMS: tl.constexpr, C: tl.constexpr):
    """Normalise rows that stay in registers, and return their mean and rstd."""
    hs = ()
    for i in tl.static_range(C.CHUNKS):
        hs += (_load_h(stream, tile, take_chunk(tile, i, C), C),)
    centred, mean, correction, rstd = row_statistics(hs, tile, eps, RMS, C)
    for i in tl.static_range(C.CHUNKS):
        chunk = take_chunk(tile, i, C)
        store_rows(norm.h, tile, chunk, hs[i], C)
        _store_z(norm, tile, chunk, normalised(centred[i], correction, rstd, C), C)
    return mean, rstd


@triton.jit
def _first_mean(total, C: tl.constexpr):
    """Return the [ROWS] total / N; rounded once where nothing corrects it."""
    inverse = tl.full((C.ROWS,), 1.0 / C.N, C.COMPUTE)
    mean = total * inverse
    if not C.CORRECTED and C.N & (C.N - 1) != 0:
        remainder = tl.fma(-mean, tl.full((C.ROWS,), C.N, C.COMPUTE), total)
        mean = tl.fma(remainder, inverse, mean)
    return mean


@triton.jit
def row_statistics(hs, tile, eps, RMS: tl.constexpr, C: tl.constexpr):
    """Return the chunks of rows less a first mean, the mean, what is left of it in them, and rstd.

    The last three are [ROWS].
    """
    start = tl.zeros((C.ROWS,), C.COMPUTE)
    centred = hs
    if not RMS:
        start = _first_mean(tl.sum(add_chunks(hs), axis=1), C)
        centred = ()
        for i in tl.static_range(C.CHUNKS):
            # Rows that are not there are 0, and so is their mean.
            exists = take_chunk(tile, i, C).cols[None, :] < C.N
            centred += (tl.where(exists, hs[i] - start[:, None], 0.0),)
    squares = centred[0] * centred[0]
    for i in tl.static_range(1, C.CHUNKS):
        squares += centred[i] * centred[i]
    if C.CORRECTED:
        residue_sum, squares_sum = sum_pair(add_chunks(centred), squares, C)
        correction = residue_sum / C.N
        var = squares_sum / C.N - correction * correction
    else:
        correction = tl.zeros((C.ROWS,), C.COMPUTE)
        var = tl.sum(squares, axis=1) / C.N
    return centred, start + correction, correction, _inverse_deviation(var, eps, C)


@triton.jit
def normalised(centred, correction, rstd, C: tl.constexpr):
    """Return a chunk of x_hat from what `row_statistics` returns."""
    x_hat = centred * rstd[:, None]
    if C.CORRECTED:
        x_hat -= (correction * rstd)[:, None]
    return x_hat


@triton.jit
def looped(stream, norm, tile, eps, steps, RMS: tl.constexpr, C: tl.constexpr):
    """Normalise rows that are walked twice, chunk by chunk, and return their mean and rstd."""
    # Differences from the mean of the first chunk are small however large the mean is.
    first = _load_h(stream, tile, take_chunk(tile, 0, C), C)
    start = tl.sum(first, axis=1) / C.BLOCK_N
    # One Welford accumulator per lane: no reduction across lanes until the row has been read.
    lane_mean = zeros(C)
    lane_m2 = zeros(C)
    lane_count = zeros(C)
    for i in tl.range(0, steps):
        chunk = take_chunk(tile, i, C)
        h = _load_h(stream, tile, chunk, C)
        if RMS:
            lane_m2 += h * h
        else:
            delta = tl.where(chunk.mask, h - start[:, None] - lane_mean, 0.0)
            step = delta * (tl.full((1, 1), 1.0, C.COMPUTE) / (i + 1))
            lane_mean += step
            lane_m2 += delta * (delta - step)
            lane_count += chunk.mask.to(C.COMPUTE)
    if RMS:
        mean = tl.zeros((C.ROWS,), C.COMPUTE)
        var = tl.sum(lane_m2, axis=1) / C.N
    else:
        correction = tl.sum(lane_mean * (lane_count / C.N), axis=1)
        offset = lane_mean - correction[:, None]
        mean = start + correction
        var = tl.sum(offset * offset * lane_count + lane_m2, axis=1) / C.N
    rstd = _inverse_deviation(var, eps, C)
    for i in tl.range(0, steps):
        chunk = take_chunk(tile, i, C)
        h = _load_h(stream, tile, chunk, C)
        store_rows(norm.h, tile, chunk, h, C)
        if RMS:
            x_hat = h * rstd[:, None]
        else:
            x_hat = (h - start[:, None]) * rstd[:, None] - (correction * rstd)[:, None]
        _store_z(norm, tile, chunk, x_hat, C)
    return mean, rstd


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
    x_ptr,  # [M, N], rows x_stride apart
    residual_ptr,  # [M, N], rows residual_stride apart, or None
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
    residual_stride: tl.int64,
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
        Rows(x_ptr, row_offsets(rows, x_stride, X_VECTOR)),
        Rows(residual_ptr, row_offsets(rows, residual_stride, RESIDUAL_VECTOR)),
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
        x: [*, *normalized_shape], any strides; copied once where rows are not evenly spaced or
            columns not adjacent.
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
    x_rows, residual_rows = (launch.as_rows(t, rows, cols) for t in (x, residual))
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
            residual_rows.stride,
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
