"""Forward kernel and its launcher: y = (x - mean) * rstd * weight + bias.

`README.md` beside this file derives the statistics and explains the tiling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .config import forward_config, vector_elements
from .tile import (
    chunk_columns,
    load_parameter,
    row_offsets,
    sum_chunks,
    sum_pair,
    tile_mask,
)


@triton.jit
def _store_chunk(
    centred,
    rstd,
    offset,
    weight_ptr,
    bias_ptr,
    y_ptr,
    rows,
    cols,
    mask,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Scale a [ROWS, BLOCK_N] chunk, centred up to `offset`, and store it as y."""
    y = centred * rstd[:, None] - offset[:, None]
    if weight_ptr is not None:
        y = y * load_parameter(weight_ptr, cols, N, ROWS).to(COMPUTE)
    if bias_ptr is not None:
        y = y + load_parameter(bias_ptr, cols, N, ROWS).to(COMPUTE)
    tl.store(y_ptr + (rows * N)[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


# No value of M or of a stride may become part of what is compiled.
@triton.jit(do_not_specialize=("M", "x_stride", "steps"))
def layer_norm_fwd_kernel(
    x_ptr,  # [M, N], rows x_stride apart
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], contiguous
    mean_ptr,  # [M], or None where nothing needs a gradient
    rstd_ptr,  # [M], or None
    M: tl.int64,
    x_stride: tl.int64,
    steps: tl.int32,  # chunks of a looped row; a constant would unroll the loop, and spill
    eps: tl.float64,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    LOOPED: tl.constexpr,
    X_VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_rows = x_ptr + row_offsets(rows, x_stride, X_VECTOR)

    if LOOPED:
        # Differences from the mean of the first chunk are small however large the mean is.
        first = chunk_columns(0, BLOCK_N)
        mask = tile_mask(rows, M, first, N, ROWS)
        first_x = tl.load(x_rows + first[None, :], mask=mask, other=0.0).to(COMPUTE)
        shift = tl.sum(first_x, axis=1) / BLOCK_N
        # One Welford accumulator per lane: no reduction across lanes until the row has been read.
        lane_mean = tl.zeros((ROWS, BLOCK_N), COMPUTE)
        lane_m2 = tl.zeros((ROWS, BLOCK_N), COMPUTE)
        lane_count = tl.zeros((ROWS, BLOCK_N), COMPUTE)
        for i in tl.range(0, steps):
            cols = chunk_columns(i, BLOCK_N)
            mask = tile_mask(rows, M, cols, N, ROWS)
            x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(COMPUTE)
            delta = tl.where(mask, x - shift[:, None] - lane_mean, 0.0)
            step = delta / (i + 1)
            lane_mean += step
            lane_m2 += delta * (delta - step)
            lane_count += mask.to(COMPUTE)
        correction = tl.sum(lane_mean * (lane_count / N), axis=1)
        offset = lane_mean - correction[:, None]
        var = tl.sum(offset * offset * lane_count + lane_m2, axis=1) / N
        rstd = tl.rsqrt(var + tl.full((ROWS,), eps, COMPUTE))
        for i in tl.range(0, steps):
            cols = chunk_columns(i, BLOCK_N)
            mask = tile_mask(rows, M, cols, N, ROWS)
            x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(COMPUTE)
            _store_chunk(
                x - shift[:, None],
                rstd,
                correction * rstd,
                weight_ptr,
                bias_ptr,
                y_ptr,
                rows,
                cols,
                mask,
                N,
                ROWS,
                COMPUTE,
            )
    else:
        masks = ()
        xs = ()
        for i in tl.static_range(CHUNKS):
            cols = chunk_columns(i, BLOCK_N)
            masks += (tile_mask(rows, M, cols, N, ROWS),)
            xs += (tl.load(x_rows + cols[None, :], mask=masks[i], other=0.0).to(COMPUTE),)
        shift = sum_chunks(xs) / N
        centred = ()
        residue = tl.zeros((ROWS, BLOCK_N), COMPUTE)
        squares = tl.zeros((ROWS, BLOCK_N), COMPUTE)
        for i in tl.static_range(CHUNKS):
            centred += (tl.where(masks[i], xs[i] - shift[:, None], 0.0),)
            residue += centred[i]
            squares += centred[i] * centred[i]
        residue_sum, squares_sum = sum_pair(residue, squares, ROWS, BLOCK_N)
        correction = residue_sum / N
        var = squares_sum / N - correction * correction
        rstd = tl.rsqrt(var + tl.full((ROWS,), eps, COMPUTE))
        for i in tl.static_range(CHUNKS):
            _store_chunk(
                centred[i],
                rstd,
                correction * rstd,
                weight_ptr,
                bias_ptr,
                y_ptr,
                rows,
                chunk_columns(i, BLOCK_N),
                masks[i],
                N,
                ROWS,
                COMPUTE,
            )

    if mean_ptr is not None:
        row_mask = rows < M
        tl.store(mean_ptr + rows, shift + correction, mask=row_mask)
        tl.store(rstd_ptr + rows, rstd, mask=row_mask)


def layer_norm_fwd(
    x: torch.Tensor,
    normalized_shape: tuple[int, ...],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    save_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Run the forward kernel.

    Args:
        x: [*, *normalized_shape], any strides; copied once where rows are not evenly spaced or
            columns not adjacent.
        normalized_shape: The trailing dimensions that form a row.
        weight: N elements of any float dtype, or None.
        bias: N elements of any float dtype, or None.
        eps: Added to the variance.
        out_dtype: dtype of y.
        save_stats: Whether mean and rstd are wanted.

    Returns:
        y of x's shape, contiguous; mean and rstd of shape [M] in the compute dtype, or None.
    """
    rows, cols = launch.rows_and_columns(x, normalized_shape)
    compute = launch.compute_dtype(x.dtype)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean = rstd = None
    if save_stats:
        mean = torch.empty(rows, dtype=compute, device=x.device)
        rstd = torch.empty_like(mean)
    if y.numel() == 0:
        return y, mean, rstd
    x = launch.as_rows(x, rows, cols)
    stride = launch.row_stride(x)
    arch = launch.architecture(x.device)
    config = forward_config(cols, x.element_size(), arch)
    tile = config.tile
    with launch.device_guard(x.device):
        layer_norm_fwd_kernel[(triton.cdiv(rows, tile.rows),)](
            x,
            launch.vector(weight),
            launch.vector(bias),
            y,
            mean,
            rstd,
            rows,
            stride,
            triton.cdiv(cols, tile.block_n),
            eps,
            N=cols,
            ROWS=tile.rows,
            BLOCK_N=tile.block_n,
            CHUNKS=tile.chunks,
            LOOPED=config.looped,
            X_VECTOR=vector_elements(stride, x.element_size()),
            COMPUTE=launch.TRITON_DTYPE[compute],
            **launch.options(tile.num_warps, arch),
        )
    return y, mean, rstd
