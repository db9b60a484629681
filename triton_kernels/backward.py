"""Backward kernels and their launcher.

With g = dy * weight, x_hat = (x - mean) * rstd, c1 = mean(g * x_hat) and c2 = mean(g) of a row:

    dx = rstd * (g - x_hat * c1 - c2)    dweight = sum over rows of dy * x_hat    dbias = sum of dy

Persistent programs own consecutive rows and keep dweight and dbias of those rows in registers; each
leaves one partial row, and one finalize kernel adds the partial rows of both in a fixed order.
`README.md` beside this file holds the derivation and the reason for partials.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .config import backward_config, finalize_tile, partial_rows, vector_elements
from .tile import chunk_columns, load_parameter, row_offsets, sum_pair, tile_mask


@triton.jit
def _load_chunk(
    x_rows,
    dy_rows,
    weight,
    mean,
    rstd,
    cols,
    mask,
    COMPUTE: tl.constexpr,
):
    """Load a [ROWS, BLOCK_N] chunk; return x_hat, dy and g = dy * weight."""
    x = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(COMPUTE)
    dy = tl.load(dy_rows + cols[None, :], mask=mask, other=0.0).to(COMPUTE)
    # Where the mask ends, x_hat is arbitrary: it is only ever multiplied by dy or g, which are 0.
    x_hat = (x - mean) * rstd
    if weight is None:
        return x_hat, dy, dy
    else:
        return x_hat, dy, dy * weight.to(COMPUTE)


# No value of M or of a stride may become part of what is compiled.
@triton.jit(do_not_specialize=("dy_stride", "x_stride", "steps"))
def layer_norm_bwd_sums_kernel(
    dy_ptr,  # [M, N], rows dy_stride apart
    x_ptr,  # [M, N], rows x_stride apart
    weight_ptr,  # [N] or None
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    c1_ptr,  # [M]
    c2_ptr,  # [M]
    dy_stride: tl.int64,
    x_stride: tl.int64,
    steps: tl.int32,  # chunks of a row; a constant would unroll the loop, and spill
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DY_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Write c1 and c2 of one row per program, for rows too long to keep on chip."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mean = tl.load(mean_ptr + rows)[:, None]
    rstd = tl.load(rstd_ptr + rows)[:, None]
    dy_rows = dy_ptr + row_offsets(rows, dy_stride, DY_VECTOR)
    x_rows = x_ptr + row_offsets(rows, x_stride, X_VECTOR)
    g_x_hat = tl.zeros((1, BLOCK_N), COMPUTE)
    g_sum = tl.zeros((1, BLOCK_N), COMPUTE)
    for i in tl.range(0, steps):
        cols = chunk_columns(i, BLOCK_N)
        mask = cols[None, :] < N
        weight = load_parameter(weight_ptr, cols, N, 1)
        x_hat, _, g = _load_chunk(x_rows, dy_rows, weight, mean, rstd, cols, mask, COMPUTE)
        g_x_hat += g * x_hat
        g_sum += g
    c1, c2 = sum_pair(g_x_hat, g_sum, 1, BLOCK_N)
    tl.store(c1_ptr + rows, c1 / N)
    tl.store(c2_ptr + rows, c2 / N)


@triton.jit(do_not_specialize=("M", "dy_stride", "x_stride", "rows_per_program"))
def layer_norm_bwd_kernel(
    dy_ptr,  # [M, N], rows dy_stride apart
    x_ptr,  # [M, N], rows x_stride apart
    weight_ptr,  # [N] or None
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    c1_ptr,  # [M]; None where the program holds whole rows and computes c1 and c2 itself
    c2_ptr,  # [M] or None
    dx_ptr,  # [M, N], contiguous, or None
    dweight_ptr,  # [programs, N] partials, or None
    dbias_ptr,  # [programs, N] partials, or None
    M: tl.int64,
    dy_stride: tl.int64,
    x_stride: tl.int64,
    rows_per_program: tl.int64,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    FORM: tl.constexpr,
    DY_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Write dx of a program's rows and the partial dweight and dbias of those rows.

    FORM "resident" keeps x_hat and g across the row sums, "reload" loads x and dy again, "split"
    works on one column block (grid axis 1) with row sums that are known already.
    """
    first_chunk = tl.program_id(1) if FORM == "split" else 0
    start = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(start + rows_per_program, M)

    weights = ()
    dweights = ()
    dbiases = ()
    for i in tl.static_range(CHUNKS):
        cols = chunk_columns(first_chunk + i, BLOCK_N)
        weights += (load_parameter(weight_ptr, cols, N, ROWS),)
        dweights += (tl.zeros((ROWS, BLOCK_N), COMPUTE),)
        dbiases += (tl.zeros((ROWS, BLOCK_N), COMPUTE),)

    for row in tl.range(start, end, ROWS, num_stages=NUM_STAGES):
        rows = tl.cast(row, tl.int64) + tl.arange(0, ROWS)
        mean = tl.load(mean_ptr + rows, mask=rows < end, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < end, other=0.0)[:, None]
        dy_rows = dy_ptr + row_offsets(rows, dy_stride, DY_VECTOR)
        x_rows = x_ptr + row_offsets(rows, x_stride, X_VECTOR)

        masks = ()
        x_hats = ()
        gs = ()
        g_x_hat = tl.zeros((ROWS, BLOCK_N), COMPUTE)
        g_sum = tl.zeros((ROWS, BLOCK_N), COMPUTE)
        next_dweights = ()
        next_dbiases = ()
        for i in tl.static_range(CHUNKS):
            cols = chunk_columns(first_chunk + i, BLOCK_N)
            masks += (tile_mask(rows, end, cols, N, ROWS),)
            x_hat, dy, g = _load_chunk(
                x_rows, dy_rows, weights[i], mean, rstd, cols, masks[i], COMPUTE
            )
            g_x_hat += g * x_hat
            g_sum += g
            next_dweights += (dweights[i] + dy * x_hat,)
            next_dbiases += (dbiases[i] + dy,)
            if FORM != "reload":
                x_hats += (x_hat,)
                gs += (g,)
        dweights = next_dweights
        dbiases = next_dbiases

        if dx_ptr is not None:
            if FORM == "split":
                c1 = tl.load(c1_ptr + rows, mask=rows < end, other=0.0)[:, None]
                c2 = tl.load(c2_ptr + rows, mask=rows < end, other=0.0)[:, None]
            else:
                c1, c2 = sum_pair(g_x_hat, g_sum, ROWS, BLOCK_N)
                c1 = (c1 / N)[:, None]
                c2 = (c2 / N)[:, None]
            dx_rows = dx_ptr + (rows * N)[:, None]
            for i in tl.static_range(CHUNKS):
                cols = chunk_columns(first_chunk + i, BLOCK_N)
                if FORM == "reload":
                    x_hat, _, g = _load_chunk(
                        x_rows, dy_rows, weights[i], mean, rstd, cols, masks[i], COMPUTE
                    )
                else:
                    x_hat = x_hats[i]
                    g = gs[i]
                dx = rstd * (g - (x_hat * c1 + c2))
                tl.store(dx_rows + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=masks[i])

    partial = tl.program_id(0).to(tl.int64) * N
    for i in tl.static_range(CHUNKS):
        cols = chunk_columns(first_chunk + i, BLOCK_N)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + partial + cols, tl.sum(dweights[i], axis=0), mask=cols < N)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + partial + cols, tl.sum(dbiases[i], axis=0), mask=cols < N)


@triton.jit
def _sum_partials(
    partial_ptr, out_ptr, partials, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), partial_ptr.dtype.element_ty)
    for first in tl.range(0, partials, ROWS):
        rows = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        mask = (rows[:, None] < partials) & (cols[None, :] < N)
        total += tl.load(partial_ptr + (rows * N)[:, None] + cols[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if out_ptr.dtype.element_ty.primitive_bitwidth == 16:
        result = result.to(tl.float32)  # there is no direct way from float64
    tl.store(out_ptr + cols, result.to(out_ptr.dtype.element_ty), mask=cols < N)


@triton.jit(do_not_specialize=("partials",))
def layer_norm_bwd_finalize_kernel(
    dweight_partial_ptr,  # [partials, N] or None
    dbias_partial_ptr,  # [partials, N] or None
    dweight_ptr,  # [N] or None
    dbias_ptr,  # [N] or None
    partials: tl.int64,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Add the partial rows of dweight (grid axis 1 = 0) and of dbias (the other) and cast them."""
    if dweight_ptr is not None and dbias_ptr is not None:
        if tl.program_id(1) == 0:
            _sum_partials(dweight_partial_ptr, dweight_ptr, partials, N, ROWS, COLS)
        else:
            _sum_partials(dbias_partial_ptr, dbias_ptr, partials, N, ROWS, COLS)
    elif dweight_ptr is not None:
        _sum_partials(dweight_partial_ptr, dweight_ptr, partials, N, ROWS, COLS)
    else:
        _sum_partials(dbias_partial_ptr, dbias_ptr, partials, N, ROWS, COLS)


def layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    normalized_shape: tuple[int, ...],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_mask: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Run the backward kernels: one for most rows, one more for very long rows, one to finalize.

    Args:
        dy: Gradient of y, of x's shape and any strides; never written to.
        x: [*, *normalized_shape], the input of the forward, any strides.
        normalized_shape: The trailing dimensions that form a row.
        mean: [M] row means from the forward.
        rstd: [M] reciprocal standard deviations from the forward.
        weight: N elements, or None.
        bias: N elements, or None; only its shape and dtype are used.
        output_mask: Which of dx, dweight and dbias are wanted.

    Returns:
        dx in x's shape and dtype, contiguous; dweight and dbias in the shape and dtype of their
        parameters; None where not wanted.
    """
    rows, cols = launch.rows_and_columns(x, normalized_shape)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if output_mask[0] else None
    want_dweight = weight is not None and output_mask[1]
    want_dbias = bias is not None and output_mask[2]
    make = torch.empty if rows > 0 else torch.zeros
    dweight = make(weight.shape, dtype=weight.dtype, device=x.device) if want_dweight else None
    dbias = make(bias.shape, dtype=bias.dtype, device=x.device) if want_dbias else None
    if rows == 0 or cols == 0 or not any((output_mask[0], want_dweight, want_dbias)):
        return dx, dweight, dbias

    x, dy = launch.as_rows(x, rows, cols), launch.as_rows(dy, rows, cols)
    weight = launch.vector(weight)
    arch = launch.architecture(x.device)
    config = backward_config(cols, x.element_size(), arch)
    tile = config.tile
    column_blocks = triton.cdiv(cols, tile.block_n) if config.form == "split" else 1
    rows_per_program = tile.rows * triton.cdiv(
        triton.cdiv(rows, partial_rows(rows, x.element_size(), column_blocks, config, arch)),
        tile.rows,
    )
    programs = triton.cdiv(rows, rows_per_program)
    partial_shape = (programs, cols)
    dweight_partial = mean.new_empty(partial_shape) if want_dweight else None
    dbias_partial = mean.new_empty(partial_shape) if want_dbias else None

    layout = {
        "N": cols,
        "DY_VECTOR": vector_elements(launch.row_stride(dy), dy.element_size()),
        "X_VECTOR": vector_elements(launch.row_stride(x), x.element_size()),
        "COMPUTE": launch.TRITON_DTYPE[mean.dtype],
    }
    strides = (launch.row_stride(dy), launch.row_stride(x))
    c1 = c2 = None
    with launch.device_guard(x.device):
        if config.sums is not None and dx is not None:
            c1, c2 = torch.empty_like(mean), torch.empty_like(mean)
            layer_norm_bwd_sums_kernel[(rows,)](
                dy,
                x,
                weight,
                mean,
                rstd,
                c1,
                c2,
                *strides,
                triton.cdiv(cols, config.sums.block_n),
                BLOCK_N=config.sums.block_n,
                **layout,
                **launch.options(config.sums.num_warps, arch),
            )
        layer_norm_bwd_kernel[(programs, column_blocks)](
            dy,
            x,
            weight,
            mean,
            rstd,
            c1,
            c2,
            dx,
            dweight_partial,
            dbias_partial,
            rows,
            *strides,
            rows_per_program,
            ROWS=tile.rows,
            BLOCK_N=tile.block_n,
            CHUNKS=tile.chunks,
            FORM=config.form,
            NUM_STAGES=config.num_stages,
            **layout,
            **launch.options(tile.num_warps, arch),
        )
        if want_dweight or want_dbias:
            tile = finalize_tile(cols, arch)
            blocks = triton.cdiv(cols, tile.block_n)
            layer_norm_bwd_finalize_kernel[(blocks, int(want_dweight) + int(want_dbias))](
                dweight_partial,
                dbias_partial,
                dweight,
                dbias,
                programs,
                N=cols,
                ROWS=tile.rows,
                COLS=tile.block_n,
                **launch.options(tile.num_warps, arch),
            )
    return dx, dweight, dbias
