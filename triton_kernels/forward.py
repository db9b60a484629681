"""Forward kernel and its launcher: the whole equation, with compile-time flags for its terms.

    h = residual + gate * dropout(x)    x_hat = (h - mean) * rstd    y = x_hat * weight + bias
    z = y * (1 + scale) + shift

`README.md` beside this file derives the statistics and explains the tiling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusednorm.spec import compute_dtype, rows_and_columns

from . import launch
from .config import forward_config, vector_elements
from .tile import (
    cast,
    chunk_columns,
    kept,
    load_parameter,
    load_term,
    row_offsets,
    sum_chunks,
    sum_pair,
    tile_mask,
)


@triton.jit
def _load_h(
    x_rows,
    residual_rows,
    gate_ptr,
    gate_stride,
    seed,
    drop_below,
    inverse_keep,
    rows,
    samples,
    chunk,
    mask,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATE_SCALAR: tl.constexpr,
    TERM_VECTOR: tl.constexpr,
    H_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Return a [ROWS, BLOCK_N] chunk of h = residual + gate * dropout(x), rounded as it is stored.

    Rounding first makes the statistics, and with them the backward, those of the h that the next
    layer sees. Where the mask ends, h is 0.
    """
    cols = chunk_columns(chunk, BLOCK_N)
    h = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(COMPUTE)
    if seed is not None:
        keep = kept(seed, rows, chunk, drop_below, ROWS, BLOCK_N)
        h = tl.where(keep, h * tl.full((ROWS, 1), inverse_keep, COMPUTE), 0.0)
    if gate_ptr is not None:
        h *= load_term(gate_ptr, gate_stride, samples, cols, N, GATE_SCALAR, TERM_VECTOR).to(
            COMPUTE
        )
    if residual_rows is not None:
        h += tl.load(residual_rows + cols[None, :], mask=mask, other=0.0).to(COMPUTE)
    if H_DTYPE is not None:
        h = cast(h, H_DTYPE).to(COMPUTE)
    return h


@triton.jit
def _store_chunk(
    z_ptr,
    h_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    scale_stride,
    shift_ptr,
    shift_stride,
    h,
    centred,
    rstd,
    offset,
    rows,
    samples,
    chunk,
    mask,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE_SCALAR: tl.constexpr,
    SHIFT_SCALAR: tl.constexpr,
    TERM_VECTOR: tl.constexpr,
    X_HAT_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Scale a [ROWS, BLOCK_N] chunk, centred up to `offset`, to z; store z, and h where wanted."""
    cols = chunk_columns(chunk, BLOCK_N)
    places = (rows * N)[:, None] + cols[None, :]
    if h_ptr is not None:
        tl.store(h_ptr + places, cast(h, h_ptr.dtype.element_ty), mask=mask)
    z = centred * rstd[:, None]
    if offset is not None:
        z -= offset[:, None]
    if X_HAT_DTYPE is not None:
        z = cast(z, X_HAT_DTYPE).to(COMPUTE)
    if weight_ptr is not None:
        z = z * load_parameter(weight_ptr, cols, N, ROWS).to(COMPUTE)
    if bias_ptr is not None:
        z = z + load_parameter(bias_ptr, cols, N, ROWS).to(COMPUTE)
    if scale_ptr is not None:
        scale = load_term(scale_ptr, scale_stride, samples, cols, N, SCALE_SCALAR, TERM_VECTOR)
        z = z * (1.0 + scale.to(COMPUTE))
    if shift_ptr is not None:
        shift = load_term(shift_ptr, shift_stride, samples, cols, N, SHIFT_SCALAR, TERM_VECTOR)
        z = z + shift.to(COMPUTE)
    tl.store(z_ptr + places, cast(z, z_ptr.dtype.element_ty), mask=mask)


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
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    samples = tl.zeros((ROWS,), tl.int64)
    if SAMPLED:
        samples = tl.minimum(rows, M - 1) // rows_per_sample
    x_rows = x_ptr + row_offsets(rows, x_stride, X_VECTOR)
    residual_rows = residual_ptr
    if residual_ptr is not None:
        residual_rows = residual_ptr + row_offsets(rows, residual_stride, RESIDUAL_VECTOR)

    seed = seed_ptr
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    if LOOPED:
        # Differences from the mean of the first chunk are small however large the mean is.
        mask = tile_mask(rows, M, chunk_columns(0, BLOCK_N), N, ROWS)
        first = _load_h(
            x_rows,
            residual_rows,
            gate_ptr,
            gate_stride,
            seed,
            drop_below,
            inverse_keep,
            rows,
            samples,
            0,
            mask,
            N,
            ROWS,
            BLOCK_N,
            GATE_SCALAR,
            TERM_VECTOR,
            H_DTYPE,
            COMPUTE,
        )
        shift = tl.sum(first, axis=1) / BLOCK_N
        # One Welford accumulator per lane: no reduction across lanes until the row has been read.
        lane_mean = tl.zeros((ROWS, BLOCK_N), COMPUTE)
        lane_m2 = tl.zeros((ROWS, BLOCK_N), COMPUTE)
        lane_count = tl.zeros((ROWS, BLOCK_N), COMPUTE)
        for i in tl.range(0, steps):
            mask = tile_mask(rows, M, chunk_columns(i, BLOCK_N), N, ROWS)
            h = _load_h(
                x_rows,
                residual_rows,
                gate_ptr,
                gate_stride,
                seed,
                drop_below,
                inverse_keep,
                rows,
                samples,
                i,
                mask,
                N,
                ROWS,
                BLOCK_N,
                GATE_SCALAR,
                TERM_VECTOR,
                H_DTYPE,
                COMPUTE,
            )
            if RMS:
                lane_m2 += h * h
            else:
                delta = tl.where(mask, h - shift[:, None] - lane_mean, 0.0)
                step = delta / (i + 1)
                lane_mean += step
                lane_m2 += delta * (delta - step)
                lane_count += mask.to(COMPUTE)
        if RMS:
            var = tl.sum(lane_m2, axis=1) / N
        else:
            correction = tl.sum(lane_mean * (lane_count / N), axis=1)
            offset = lane_mean - correction[:, None]
            var = tl.sum(offset * offset * lane_count + lane_m2, axis=1) / N
        rstd = tl.rsqrt(var + tl.full((ROWS,), eps, COMPUTE))
        for i in tl.range(0, steps):
            mask = tile_mask(rows, M, chunk_columns(i, BLOCK_N), N, ROWS)
            h = _load_h(
                x_rows,
                residual_rows,
                gate_ptr,
                gate_stride,
                seed,
                drop_below,
                inverse_keep,
                rows,
                samples,
                i,
                mask,
                N,
                ROWS,
                BLOCK_N,
                GATE_SCALAR,
                TERM_VECTOR,
                H_DTYPE,
                COMPUTE,
            )
            _store_chunk(
                z_ptr,
                h_ptr,
                weight_ptr,
                bias_ptr,
                scale_ptr,
                scale_stride,
                shift_ptr,
                shift_stride,
                h,
                h if RMS else h - shift[:, None],
                rstd,
                None if RMS else correction * rstd,
                rows,
                samples,
                i,
                mask,
                N,
                ROWS,
                BLOCK_N,
                SCALE_SCALAR,
                SHIFT_SCALAR,
                TERM_VECTOR,
                X_HAT_DTYPE,
                COMPUTE,
            )
    else:
        masks = ()
        hs = ()
        for i in tl.static_range(CHUNKS):
            masks += (tile_mask(rows, M, chunk_columns(i, BLOCK_N), N, ROWS),)
            hs += (
                _load_h(
                    x_rows,
                    residual_rows,
                    gate_ptr,
                    gate_stride,
                    seed,
                    drop_below,
                    inverse_keep,
                    rows,
                    samples,
                    i,
                    masks[i],
                    N,
                    ROWS,
                    BLOCK_N,
                    GATE_SCALAR,
                    TERM_VECTOR,
                    H_DTYPE,
                    COMPUTE,
                ),
            )
        squares = tl.zeros((ROWS, BLOCK_N), COMPUTE)
        if RMS:
            centred = hs
            for i in tl.static_range(CHUNKS):
                squares += hs[i] * hs[i]
            var = tl.sum(squares, axis=1) / N
        else:
            shift = sum_chunks(hs) / N
            centred = ()
            residue = tl.zeros((ROWS, BLOCK_N), COMPUTE)
            for i in tl.static_range(CHUNKS):
                centred += (tl.where(masks[i], hs[i] - shift[:, None], 0.0),)
                residue += centred[i]
                squares += centred[i] * centred[i]
            residue_sum, squares_sum = sum_pair(residue, squares, ROWS, BLOCK_N)
            correction = residue_sum / N
            var = squares_sum / N - correction * correction
        rstd = tl.rsqrt(var + tl.full((ROWS,), eps, COMPUTE))
        for i in tl.static_range(CHUNKS):
            _store_chunk(
                z_ptr,
                h_ptr,
                weight_ptr,
                bias_ptr,
                scale_ptr,
                scale_stride,
                shift_ptr,
                shift_stride,
                hs[i],
                centred[i],
                rstd,
                None if RMS else correction * rstd,
                rows,
                samples,
                i,
                masks[i],
                N,
                ROWS,
                BLOCK_N,
                SCALE_SCALAR,
                SHIFT_SCALAR,
                TERM_VECTOR,
                X_HAT_DTYPE,
                COMPUTE,
            )

    row_mask = rows < M
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, shift + correction, mask=row_mask)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=row_mask)


@launch.native("triton_forward", tensors=8, device_of=0)
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
    x = launch.as_rows(x, rows, cols)
    stride = launch.row_stride(x)
    residual_stride, residual_vector = 0, 1
    if residual is not None:
        residual = launch.as_rows(residual, rows, cols)
        residual_stride = launch.row_stride(residual)
        residual_vector = vector_elements(residual_stride, residual.element_size())
    terms = launch.terms(rows, cols, gate, scale, shift)
    gate, scale, shift = terms.tensors
    arch = launch.architecture(x.device)
    config = forward_config(cols, launch.itemsize(compute, z, h), arch)
    tile = config.tile
    with launch.device_guard(x.device):
        launch.start(
            layer_norm_fwd_kernel,
            (-(-rows // tile.rows),),
            x,
            residual,
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
            stride,
            residual_stride,
            *terms.strides,
            terms.rows_per_sample,
            -(-cols // tile.block_n),
            launch.drop_below(dropout_p),
            1.0 / (1.0 - dropout_p),
            eps,
            N=cols,
            ROWS=tile.rows,
            BLOCK_N=tile.block_n,
            CHUNKS=tile.chunks,
            LOOPED=config.looped,
            RMS=rms,
            X_VECTOR=vector_elements(stride, x.element_size()),
            RESIDUAL_VECTOR=residual_vector,
            H_DTYPE=launch.TRITON_DTYPE[h_dtype],
            X_HAT_DTYPE=launch.TRITON_DTYPE[x_hat_dtype],
            COMPUTE=launch.TRITON_DTYPE[compute],
            **terms.constants,
            **launch.options(tile.num_warps, arch),
        )
    return z, h, mean, rstd
