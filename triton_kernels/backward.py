"""Backward kernels and their launcher: every gradient of the whole equation.

With dy = dz * (1 + scale), g = dy * weight, x_hat = (h - mean) * rstd, c1 = mean(g * x_hat) and
c2 = mean(g) of a row (0 for RMS), and dh the gradient of h as an output:

    dresidual = rstd * (g - x_hat * c1 - c2) + dh    dx = dresidual * gate * keep
    dgate = sum of dresidual * dropout(x)            keep = 0 or 1 / (1 - dropout_p)
    dweight = sum of dy * x_hat                      dscale = sum of dz * y
    dbias = sum of dy                                dshift = sum of dz

The last four follow from two sums over the rows of one sample, of dz * x_hat and of dz. Persistent
programs own consecutive rows of one sample and keep these sums in registers; each leaves one
partial row, and one finalize kernel adds the partial rows in a fixed order. `README.md` beside this
file holds the derivation and the reason for partials.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusednorm.spec import Gradients, rows_and_columns

from . import launch
from .config import backward_config, finalize_tile, partial_rows, vector_elements
from .tile import (
    cast,
    chunk_columns,
    kept,
    load_parameter,
    load_term,
    row_offsets,
    sum_pair,
    tile_mask,
)


@triton.jit
def _load_factor(
    weight_ptr,
    scale_ptr,
    scale_stride,
    samples,
    cols,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE_SCALAR: tl.constexpr,
    TERM_VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Return the tile of weight * (1 + scale), by which dz becomes g; one of them is there."""
    if scale_ptr is None:
        return load_parameter(weight_ptr, cols, N, ROWS)
    else:
        scale = load_term(scale_ptr, scale_stride, samples, cols, N, SCALE_SCALAR, TERM_VECTOR)
        factor = 1.0 + scale.to(COMPUTE)
        if weight_ptr is not None:
            factor *= load_parameter(weight_ptr, cols, N, ROWS).to(COMPUTE)
        return factor


@triton.jit
def _load_chunk(
    h_rows,
    dz_rows,
    factor,
    mean,
    rstd,
    cols,
    mask,
    COMPUTE: tl.constexpr,
):
    """Load a [ROWS, BLOCK_N] chunk; return x_hat, dz and g = dz * factor."""
    h = tl.load(h_rows + cols[None, :], mask=mask, other=0.0).to(COMPUTE)
    dz = tl.load(dz_rows + cols[None, :], mask=mask, other=0.0).to(COMPUTE)
    # Where the mask ends, x_hat is arbitrary: it is only ever multiplied by dz or g, which are 0.
    x_hat = h * rstd if mean is None else (h - mean) * rstd
    if factor is None:
        return x_hat, dz, dz
    else:
        return x_hat, dz, dz * factor.to(COMPUTE)


# No value of M or of a stride may become part of what is compiled.
@triton.jit(do_not_specialize=("dz_stride", "h_stride", "scale_stride", "rows_per_sample", "steps"))
def layer_norm_bwd_sums_kernel(
    dz_ptr,  # [M, N], rows dz_stride apart
    h_ptr,  # [M, N], rows h_stride apart
    weight_ptr,  # [N] or None
    scale_ptr,  # a vector [N] or a number for each sample, scale_stride apart, or None
    mean_ptr,  # [M], or None for RMS
    rstd_ptr,  # [M]
    c1_ptr,  # [M]
    c2_ptr,  # [M], or None for RMS
    dz_stride: tl.int64,
    h_stride: tl.int64,
    scale_stride: tl.int64,
    rows_per_sample: tl.int64,
    steps: tl.int32,  # chunks of a row; a constant would unroll the loop, and spill
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SAMPLED: tl.constexpr,
    SCALE_SCALAR: tl.constexpr,
    DZ_VECTOR: tl.constexpr,
    H_VECTOR: tl.constexpr,
    TERM_VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Write c1 and c2 of one row per program, for rows too long to keep on chip."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    samples = rows // rows_per_sample if SAMPLED else tl.zeros((1,), tl.int64)
    mean = None
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + rows)[:, None]
    rstd = tl.load(rstd_ptr + rows)[:, None]
    dz_rows = dz_ptr + row_offsets(rows, dz_stride, DZ_VECTOR)
    h_rows = h_ptr + row_offsets(rows, h_stride, H_VECTOR)
    g_x_hat = tl.zeros((1, BLOCK_N), COMPUTE)
    g_sum = tl.zeros((1, BLOCK_N), COMPUTE)
    for i in tl.range(0, steps):
        cols = chunk_columns(i, BLOCK_N)
        mask = cols[None, :] < N
        factor = None
        if weight_ptr is not None or scale_ptr is not None:
            factor = _load_factor(
                weight_ptr,
                scale_ptr,
                scale_stride,
                samples,
                cols,
                N,
                1,
                SCALE_SCALAR,
                TERM_VECTOR,
                COMPUTE,
            )
        x_hat, _, g = _load_chunk(h_rows, dz_rows, factor, mean, rstd, cols, mask, COMPUTE)
        g_x_hat += g * x_hat
        g_sum += g
    if c2_ptr is None:
        tl.store(c1_ptr + rows, tl.sum(g_x_hat, axis=1) / N)
    else:
        c1, c2 = sum_pair(g_x_hat, g_sum, 1, BLOCK_N)
        tl.store(c1_ptr + rows, c1 / N)
        tl.store(c2_ptr + rows, c2 / N)


@triton.jit(
    do_not_specialize=(
        "M",
        "dz_stride",
        "dh_stride",
        "h_stride",
        "x_stride",
        "gate_stride",
        "scale_stride",
        "rows_per_sample",
        "programs_per_sample",
        "rows_per_program",
        "drop_below",
    )
)
def layer_norm_bwd_kernel(
    dz_ptr,  # [M, N], rows dz_stride apart, or None where z was not used
    dh_ptr,  # [M, N], rows dh_stride apart, or None where h was not used
    h_ptr,  # [M, N], rows h_stride apart
    x_ptr,  # [M, N], rows x_stride apart; None unless dgate is wanted
    gate_ptr,  # a vector [N] or a number for each sample, gate_stride apart, or None
    weight_ptr,  # [N] or None
    scale_ptr,  # as gate
    seed_ptr,  # one int64, or None without dropout
    mean_ptr,  # [M], or None for RMS
    rstd_ptr,  # [M]
    c1_ptr,  # [M]; None where the program holds whole rows and computes c1 and c2 itself
    c2_ptr,  # [M] or None
    dx_ptr,  # [M, N], contiguous, or None
    dresidual_ptr,  # [M, N], contiguous, or None
    dz_x_hat_ptr,  # [programs, N] partial sums of dz * x_hat, or None
    dz_sum_ptr,  # [programs, N] partial sums of dz, or None
    dgate_ptr,  # [programs, N] partials, or None
    M: tl.int64,
    dz_stride: tl.int64,
    dh_stride: tl.int64,
    h_stride: tl.int64,
    x_stride: tl.int64,
    gate_stride: tl.int64,
    scale_stride: tl.int64,
    rows_per_sample: tl.int64,
    programs_per_sample: tl.int64,
    rows_per_program: tl.int64,
    drop_below: tl.int64,  # random words below it drop their element
    inverse_keep: tl.float64,  # 1 / (1 - dropout_p)
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    FORM: tl.constexpr,
    SAMPLED: tl.constexpr,  # some term differs from sample to sample
    GATE_SCALAR: tl.constexpr,
    SCALE_SCALAR: tl.constexpr,
    DZ_VECTOR: tl.constexpr,
    DH_VECTOR: tl.constexpr,
    H_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    TERM_VECTOR: tl.constexpr,
    X_HAT_DTYPE: tl.constexpr,  # dtype that the forward rounds x_hat to, or None
    COMPUTE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Write dx and dresidual of a program's rows, and the partial sums over those rows.

    FORM "resident" keeps x_hat and g across the row sums, "reload" loads h and dz again, "split"
    works on one column block (grid axis 1) with row sums that are known already.
    """
    first_chunk = tl.program_id(1) if FORM == "split" else 0
    program = tl.program_id(0).to(tl.int64)
    samples = tl.zeros((ROWS,), tl.int64)
    if SAMPLED:
        sample = program // programs_per_sample
        samples += sample
        start = sample * rows_per_sample + (program % programs_per_sample) * rows_per_program
        end = tl.minimum(start + rows_per_program, (sample + 1) * rows_per_sample)
    else:
        start = program * rows_per_program
        end = tl.minimum(start + rows_per_program, M)

    factors = ()
    gates = ()
    dz_x_hats = ()
    dz_sums = ()
    dgates = ()
    for i in tl.static_range(CHUNKS):
        cols = chunk_columns(first_chunk + i, BLOCK_N)
        # A tuple cannot hold None.
        if weight_ptr is not None or scale_ptr is not None:
            factors += (
                _load_factor(
                    weight_ptr,
                    scale_ptr,
                    scale_stride,
                    samples,
                    cols,
                    N,
                    ROWS,
                    SCALE_SCALAR,
                    TERM_VECTOR,
                    COMPUTE,
                ),
            )
        if gate_ptr is not None:
            gates += (load_term(gate_ptr, gate_stride, samples, cols, N, GATE_SCALAR, TERM_VECTOR),)
        dz_x_hats += (tl.zeros((ROWS, BLOCK_N), COMPUTE),)
        dz_sums += (tl.zeros((ROWS, BLOCK_N), COMPUTE),)
        dgates += (tl.zeros((ROWS, BLOCK_N), COMPUTE),)

    for row in tl.range(start, end, ROWS, num_stages=NUM_STAGES):
        rows = tl.cast(row, tl.int64) + tl.arange(0, ROWS)
        masks = ()
        for i in tl.static_range(CHUNKS):
            cols = chunk_columns(first_chunk + i, BLOCK_N)
            masks += (tile_mask(rows, end, cols, N, ROWS),)

        if dz_ptr is not None:
            mean = None
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + rows, mask=rows < end, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + rows, mask=rows < end, other=0.0)[:, None]
            dz_rows = dz_ptr + row_offsets(rows, dz_stride, DZ_VECTOR)
            h_rows = h_ptr + row_offsets(rows, h_stride, H_VECTOR)
            x_hats = ()
            gs = ()
            g_x_hat = tl.zeros((ROWS, BLOCK_N), COMPUTE)
            g_sum = tl.zeros((ROWS, BLOCK_N), COMPUTE)
            next_dz_x_hats = ()
            next_dz_sums = ()
            for i in tl.static_range(CHUNKS):
                cols = chunk_columns(first_chunk + i, BLOCK_N)
                factor = None if weight_ptr is None and scale_ptr is None else factors[i]
                x_hat, dz, g = _load_chunk(
                    h_rows, dz_rows, factor, mean, rstd, cols, masks[i], COMPUTE
                )
                g_x_hat += g * x_hat
                g_sum += g
                rounded = x_hat
                if X_HAT_DTYPE is not None:
                    rounded = cast(x_hat, X_HAT_DTYPE).to(COMPUTE)
                next_dz_x_hats += (dz_x_hats[i] + dz * rounded,)
                next_dz_sums += (dz_sums[i] + dz,)
                if FORM != "reload":
                    x_hats += (x_hat,)
                    gs += (g,)
            dz_x_hats = next_dz_x_hats
            dz_sums = next_dz_sums

        if dx_ptr is not None or dresidual_ptr is not None or dgate_ptr is not None:
            if dz_ptr is not None:
                c2 = None
                if FORM == "split":
                    c1 = tl.load(c1_ptr + rows, mask=rows < end, other=0.0)
                    if c2_ptr is not None:
                        c2 = tl.load(c2_ptr + rows, mask=rows < end, other=0.0)
                elif mean_ptr is None:
                    c1 = tl.sum(g_x_hat, axis=1) / N
                else:
                    c1, c2 = sum_pair(g_x_hat, g_sum, ROWS, BLOCK_N)
                    c1 = c1 / N
                    c2 = c2 / N
            places = (rows * N)[:, None]
            next_dgates = ()
            for i in tl.static_range(CHUNKS):
                cols = chunk_columns(first_chunk + i, BLOCK_N)
                dh = tl.zeros((ROWS, BLOCK_N), COMPUTE)
                if dz_ptr is not None:
                    if FORM == "reload":
                        factor = None if weight_ptr is None and scale_ptr is None else factors[i]
                        x_hat, _, g = _load_chunk(
                            h_rows, dz_rows, factor, mean, rstd, cols, masks[i], COMPUTE
                        )
                    else:
                        x_hat = x_hats[i]
                        g = gs[i]
                    if c2 is None:
                        dh = rstd * (g - x_hat * c1[:, None])
                    else:
                        dh = rstd * (g - (x_hat * c1[:, None] + c2[:, None]))
                if dh_ptr is not None:
                    dh_rows = dh_ptr + row_offsets(rows, dh_stride, DH_VECTOR)
                    dh += tl.load(dh_rows + cols[None, :], mask=masks[i], other=0.0).to(COMPUTE)
                if dresidual_ptr is not None:
                    tl.store(
                        dresidual_ptr + places + cols[None, :],
                        cast(dh, dresidual_ptr.dtype.element_ty),
                        mask=masks[i],
                    )
                if seed_ptr is not None:
                    # Read outside of the loop, its key schedule would keep 20 registers.
                    seed = tl.load(seed_ptr)
                    keep = kept(seed, rows, first_chunk + i, drop_below, ROWS, BLOCK_N)
                    dh = tl.where(keep, dh * tl.full((ROWS, 1), inverse_keep, COMPUTE), 0.0)
                if dgate_ptr is not None:
                    x_rows = x_ptr + row_offsets(rows, x_stride, X_VECTOR)
                    x = tl.load(x_rows + cols[None, :], mask=masks[i], other=0.0).to(COMPUTE)
                    next_dgates += (dgates[i] + dh * x,)
                if gate_ptr is not None:
                    dh *= gates[i].to(COMPUTE)
                if dx_ptr is not None:
                    tl.store(
                        dx_ptr + places + cols[None, :],
                        cast(dh, dx_ptr.dtype.element_ty),
                        mask=masks[i],
                    )
            if dgate_ptr is not None:
                dgates = next_dgates

    partial = program * N
    for i in tl.static_range(CHUNKS):
        cols = chunk_columns(first_chunk + i, BLOCK_N)
        if dz_x_hat_ptr is not None:
            tl.store(dz_x_hat_ptr + partial + cols, tl.sum(dz_x_hats[i], axis=0), mask=cols < N)
        if dz_sum_ptr is not None:
            tl.store(dz_sum_ptr + partial + cols, tl.sum(dz_sums[i], axis=0), mask=cols < N)
        if dgate_ptr is not None:
            tl.store(dgate_ptr + partial + cols, tl.sum(dgates[i], axis=0), mask=cols < N)


@triton.jit
def _sum_partials(
    partial_ptr,
    first,
    count,
    cols,
    scale_ptr,
    scale_stride,
    partials_per_scale,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SCALE_SCALAR: tl.constexpr,
    TERM_VECTOR: tl.constexpr,
):
    """Return the [COLS] sums of `count` partial rows, each times its 1 + scale if there is one."""
    DTYPE: tl.constexpr = partial_ptr.dtype.element_ty
    total = tl.zeros((ROWS, COLS), DTYPE)
    for step in tl.range(0, count, ROWS):
        places = tl.cast(step, tl.int64) + tl.arange(0, ROWS)
        mask = (places[:, None] < count) & (cols[None, :] < N)
        offsets = ((first + places) * N)[:, None] + cols[None, :]
        partial = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        if scale_ptr is not None:
            samples = tl.minimum(places, count - 1) // partials_per_scale
            factor = load_term(scale_ptr, scale_stride, samples, cols, N, SCALE_SCALAR, TERM_VECTOR)
            partial *= 1.0 + factor.to(DTYPE)
        total += partial
    return tl.sum(total, axis=0)


@triton.jit
def _finalize_parameter(
    out_ptr,
    partial_ptr,
    partials,
    scale_ptr,
    scale_stride,
    partials_per_scale,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SCALE_SCALAR: tl.constexpr,
    TERM_VECTOR: tl.constexpr,
):
    """Store dweight or dbias of a column block: the sum of all partial rows times 1 + scale."""
    cols = chunk_columns(tl.program_id(1), COLS)
    first = tl.zeros((), tl.int64)
    total = _sum_partials(
        partial_ptr,
        first,
        partials,
        cols,
        scale_ptr,
        scale_stride,
        partials_per_scale,
        N,
        ROWS,
        COLS,
        SCALE_SCALAR,
        TERM_VECTOR,
    )
    tl.store(out_ptr + cols, cast(total, out_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def _term_columns(
    partial_ptr,
    factor_ptr,
    addend_ptr,
    addend_factor_ptr,
    first,
    count,
    cols,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Return the [COLS] sums of partial rows times factor, plus the addend's times its own."""
    total = _sum_partials(partial_ptr, first, count, cols, None, 0, 1, N, ROWS, COLS, False, 1)
    if factor_ptr is not None:
        total *= tl.load(factor_ptr + cols, mask=cols < N, other=0.0).to(total.dtype)
    if addend_ptr is not None:
        addend = _sum_partials(addend_ptr, first, count, cols, None, 0, 1, N, ROWS, COLS, False, 1)
        factor = tl.load(addend_factor_ptr + cols, mask=cols < N, other=0.0)
        total += addend * factor.to(total.dtype)
    return total


@triton.jit
def _finalize_term(
    out_ptr,
    partial_ptr,
    factor_ptr,
    addend_ptr,
    addend_factor_ptr,
    sample,
    count,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SCALAR: tl.constexpr,
):
    """Store the gradient of a term's vector, one column block of it, or of its one number."""
    block = tl.program_id(1)
    sample = sample.to(tl.int64)
    first = sample * count
    if SCALAR:
        if block == 0:
            # N numbers become one, where those of a vector are sums over a few programs.
            total = tl.zeros((COLS,), tl.float64)
            for i in tl.range(0, tl.cdiv(N, COLS)):
                columns = _term_columns(
                    partial_ptr,
                    factor_ptr,
                    addend_ptr,
                    addend_factor_ptr,
                    first,
                    count,
                    chunk_columns(i, COLS),
                    N,
                    ROWS,
                    COLS,
                )
                total += columns.to(tl.float64)
            tl.store(out_ptr + sample, cast(tl.sum(total, axis=0), out_ptr.dtype.element_ty))
    else:
        cols = chunk_columns(block, COLS)
        total = _term_columns(
            partial_ptr,
            factor_ptr,
            addend_ptr,
            addend_factor_ptr,
            first,
            count,
            cols,
            N,
            ROWS,
            COLS,
        )
        places = sample * N + cols
        tl.store(out_ptr + places, cast(total, out_ptr.dtype.element_ty), mask=cols < N)


@triton.jit(
    do_not_specialize=(
        "partials",
        "scale_stride",
        "scale_samples",
        "shift_samples",
        "gate_samples",
    )
)
def layer_norm_bwd_finalize_kernel(
    dz_x_hat_ptr,  # [partials, N] or None
    dz_sum_ptr,  # [partials, N] or None
    dgate_partial_ptr,  # [partials, N] or None
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    scale_ptr,  # a vector [N] or a number for each of scale_samples, scale_stride apart, or None
    dweight_ptr,  # [N] or None
    dbias_ptr,  # [N] or None
    dscale_ptr,  # [scale_samples, N or 1] or None
    dshift_ptr,  # [shift_samples, N or 1] or None
    dgate_ptr,  # [gate_samples, N or 1] or None
    partials: tl.int64,
    scale_stride: tl.int64,
    scale_samples: tl.int64,
    shift_samples: tl.int64,
    gate_samples: tl.int64,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    GATE_SCALAR: tl.constexpr,
    SCALE_SCALAR: tl.constexpr,
    SHIFT_SCALAR: tl.constexpr,
    TERM_VECTOR: tl.constexpr,
):
    """Add up partial rows. Grid axis 0 walks the rows of every output, axis 1 the column blocks.

    The partial rows of a sample are consecutive.
    """
    job = tl.program_id(0)
    partials_per_scale = partials // scale_samples
    if dweight_ptr is not None:
        if job == 0:
            _finalize_parameter(
                dweight_ptr,
                dz_x_hat_ptr,
                partials,
                scale_ptr,
                scale_stride,
                partials_per_scale,
                N,
                ROWS,
                COLS,
                SCALE_SCALAR,
                TERM_VECTOR,
            )
        job -= 1
    if dbias_ptr is not None:
        if job == 0:
            _finalize_parameter(
                dbias_ptr,
                dz_sum_ptr,
                partials,
                scale_ptr,
                scale_stride,
                partials_per_scale,
                N,
                ROWS,
                COLS,
                SCALE_SCALAR,
                TERM_VECTOR,
            )
        job -= 1
    if dscale_ptr is not None:
        if (job >= 0) & (job < scale_samples):
            _finalize_term(
                dscale_ptr,
                dz_x_hat_ptr,
                weight_ptr,
                None if bias_ptr is None else dz_sum_ptr,
                bias_ptr,
                job,
                partials // scale_samples,
                N,
                ROWS,
                COLS,
                SCALE_SCALAR,
            )
        job -= scale_samples.to(tl.int32)
    if dshift_ptr is not None:
        if (job >= 0) & (job < shift_samples):
            _finalize_term(
                dshift_ptr,
                dz_sum_ptr,
                None,
                None,
                None,
                job,
                partials // shift_samples,
                N,
                ROWS,
                COLS,
                SHIFT_SCALAR,
            )
        job -= shift_samples.to(tl.int32)
    if dgate_ptr is not None:
        if (job >= 0) & (job < gate_samples):
            _finalize_term(
                dgate_ptr,
                dgate_partial_ptr,
                None,
                None,
                None,
                job,
                partials // gate_samples,
                N,
                ROWS,
                COLS,
                GATE_SCALAR,
            )


@launch.native("triton_backward", tensors=12, device_of=3)
def layer_norm_bwd(
    dz: torch.Tensor | None,
    dh: torch.Tensor | None,
    x: torch.Tensor | None,
    h: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    seed: torch.Tensor | None,
    normalized_shape: tuple[int, ...],
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    x_hat_dtype: torch.dtype | None,
    output_mask: tuple[bool, bool, bool, bool, bool, bool, bool],
) -> Gradients:
    """Run the backward kernels: one for most rows, one more for very long rows, one to finalize.

    Args:
        dz: Gradient of z, of x's shape and any strides, or None; never written to.
        dh: Gradient of h as an output, likewise, or None.
        x: The input of the forward; needed for dgate only.
        h: The stream that the forward normalised, [*, *normalized_shape] with any strides.
        mean: [M] row means from the forward, or None for RMS.
        rstd: [M] reciprocal standard deviations from the forward.
        gate: [1 or S, N or 1], or None.
        weight: N elements, or None.
        bias: N elements, or None.
        scale: [1 or S, N or 1], or None.
        shift: [1 or S, N or 1], or None; only its shape and dtype are used.
        seed: What the forward got.
        normalized_shape: The trailing dimensions that form a row.
        dropout_p: What the forward got.
        x_dtype: dtype of dx.
        residual_dtype: dtype of dresidual.
        x_hat_dtype: What the forward got.
        output_mask: Which of dx, dresidual, dgate, dweight, dbias, dscale and dshift are wanted.
            Without gate and dropout dx and dresidual are equal but for their dtypes.

    Returns:
        The gradients in the order of `output_mask`, dx and dresidual in h's shape, the others in
        the shape and dtype of their tensors, all contiguous; None where not wanted, and for the
        last four where dz is None.
    """
    rows, cols = rows_and_columns(h, normalized_shape)
    shapes = (h, h, gate, weight, bias, scale, shift)
    dtypes = (x_dtype, residual_dtype)
    results: list[torch.Tensor | None] = []
    for index, (like, wanted) in enumerate(zip(shapes, output_mask, strict=True)):
        if not wanted or like is None or (index > 2 and dz is None):
            results.append(None)
            continue
        make = torch.empty if rows > 0 and cols > 0 else torch.zeros
        dtype = dtypes[index] if index < 2 else like.dtype
        results.append(make(like.shape, dtype=dtype, device=h.device))
    gradients: Gradients = tuple(results)  # type: ignore[assignment]
    if rows > 0 and cols > 0 and any(gradient is not None for gradient in gradients):
        _launch(
            gradients,
            dz,
            dh,
            x,
            h,
            mean,
            rstd,
            weight,
            bias,
            seed,
            dropout_p,
            x_hat_dtype,
            launch.terms(rows, cols, gate, scale, shift),
            rows,
            cols,
        )
    return gradients


def _strided(x: torch.Tensor | None, rows: int, cols: int) -> tuple[torch.Tensor | None, int, int]:
    """Return a tensor as [M, N], the distance of its rows, and the elements of one access."""
    if x is None:
        return None, 0, 1
    x = launch.as_rows(x, rows, cols)
    stride = launch.row_stride(x)
    return x, stride, vector_elements(stride, x.element_size())


def _launch(
    gradients: Gradients,
    dz: torch.Tensor | None,
    dh: torch.Tensor | None,
    x: torch.Tensor | None,
    h: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    x_hat_dtype: torch.dtype | None,
    terms: launch.Terms,
    rows: int,
    cols: int,
) -> None:
    """Fill the gradients, of which at least one is wanted and none is empty."""
    dx, dresidual, dgate, dweight, dbias, dscale, dshift = gradients
    through_rows = not (dx is None and dresidual is None and dgate is None)
    gate, scale, _ = terms.tensors
    gate_stride, scale_stride, _ = terms.strides
    if dgate is None:
        x = None
    dz, dz_stride, dz_vector = _strided(dz, rows, cols)
    dh, dh_stride, dh_vector = _strided(dh if through_rows else None, rows, cols)
    h, h_stride, h_vector = _strided(h, rows, cols)
    x, x_stride, x_vector = _strided(x, rows, cols)
    weight, bias = launch.vector(weight), launch.vector(bias)

    arch = launch.architecture(h.device)
    written = (dx, dresidual) if dx is not None or dresidual is not None else (h,)
    config = backward_config(
        cols,
        launch.itemsize(rstd.dtype, *written),
        arch,
        sum(tensor.element_size() for tensor in (dz, dh, h, x) if tensor is not None),
        gate_gradient=dgate is not None,
    )
    tile = config.tile
    column_blocks = -(-cols // tile.block_n) if config.form == "split" else 1
    partials = partial_rows(rows, h.element_size(), column_blocks, config, arch)
    # Programs own rows of one sample each, so that partial rows belong to samples.
    wanted_per_sample = -(-partials // terms.samples)
    rows_per_program = -(-terms.rows_per_sample // wanted_per_sample)
    rows_per_program = -(-rows_per_program // tile.rows) * tile.rows
    programs_per_sample = -(-terms.rows_per_sample // rows_per_program)
    programs = programs_per_sample * terms.samples

    def partial(wanted: bool) -> torch.Tensor | None:
        return launch.scratch(rstd, programs, cols) if wanted else None

    dscale_needs_sum = dscale is not None and bias is not None
    dz_x_hat = partial(dweight is not None or dscale is not None)
    dz_sum = partial(dbias is not None or dshift is not None or dscale_needs_sum)
    dgate_partial = partial(dgate is not None)

    constants = dict(terms.constants)
    shift_scalar = constants.pop("SHIFT_SCALAR")
    layout = {"N": cols, "DZ_VECTOR": dz_vector, "H_VECTOR": h_vector} | {
        "COMPUTE": launch.TRITON_DTYPE[rstd.dtype]
    }
    c1 = c2 = None
    with launch.device_guard(h.device):
        if config.sums is not None and through_rows and dz is not None:
            c1 = launch.scratch(rstd, rows)
            c2 = None if mean is None else launch.scratch(rstd, rows)
            launch.start(
                layer_norm_bwd_sums_kernel,
                (rows,),
                dz,
                h,
                weight,
                scale,
                mean,
                rstd,
                c1,
                c2,
                dz_stride,
                h_stride,
                scale_stride,
                terms.rows_per_sample,
                -(-cols // config.sums.block_n),
                BLOCK_N=config.sums.block_n,
                SAMPLED=constants["SAMPLED"],
                SCALE_SCALAR=constants["SCALE_SCALAR"],
                TERM_VECTOR=constants["TERM_VECTOR"],
                **layout,
                **launch.options(config.sums.num_warps, arch),
            )
        launch.start(
            layer_norm_bwd_kernel,
            (programs, column_blocks),
            dz,
            dh,
            h,
            x,
            gate,
            weight,
            scale,
            seed,
            mean,
            rstd,
            c1,
            c2,
            dx,
            dresidual,
            dz_x_hat,
            dz_sum,
            dgate_partial,
            rows,
            dz_stride,
            dh_stride,
            h_stride,
            x_stride,
            gate_stride,
            scale_stride,
            terms.rows_per_sample,
            programs_per_sample,
            rows_per_program,
            launch.drop_below(dropout_p),
            1.0 / (1.0 - dropout_p),
            ROWS=tile.rows,
            BLOCK_N=tile.block_n,
            CHUNKS=tile.chunks,
            FORM=config.form,
            DH_VECTOR=dh_vector,
            X_VECTOR=x_vector,
            X_HAT_DTYPE=launch.TRITON_DTYPE[x_hat_dtype],
            NUM_STAGES=config.num_stages,
            **layout,
            **constants,
            **launch.options(tile.num_warps, arch, config.programs_per_processor),
        )
        jobs = (dweight is not None) + (dbias is not None)
        term_rows = [
            1 if gradient is None else gradient.shape[0] for gradient in (dscale, dshift, dgate)
        ]
        jobs += sum(
            rows
            for rows, gradient in zip(term_rows, (dscale, dshift, dgate), strict=True)
            if gradient is not None
        )
        if jobs == 0:
            return
        tile = finalize_tile(cols, arch)
        launch.start(
            layer_norm_bwd_finalize_kernel,
            (jobs, -(-cols // tile.block_n)),
            dz_x_hat,
            dz_sum,
            dgate_partial,
            weight,
            bias,
            scale,
            dweight,
            dbias,
            dscale,
            dshift,
            dgate,
            programs,
            scale_stride,
            1 if scale is None else scale.shape[0],
            *term_rows[1:],
            N=cols,
            ROWS=tile.rows,
            COLS=tile.block_n,
            GATE_SCALAR=constants["GATE_SCALAR"],
            SCALE_SCALAR=constants["SCALE_SCALAR"],
            SHIFT_SCALAR=shift_scalar,
            TERM_VECTOR=constants["TERM_VECTOR"],
            **launch.options(tile.num_warps, arch),
        )
