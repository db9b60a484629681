"""Backward kernels and their launcher: every gradient of the whole equation.

With dy = dz * (1 + scale), d = h - mean, x_hat = d * rstd, e = dy * weight * rstd and, of a row,
c1 = mean(e * d) * rstd^2 and c2 = mean(e) (0 for RMS), and dh the gradient of h as an output:

    dresidual = e - d * c1 - c2 + dh           dx = dresidual * gate * keep
    dgate = sum of dresidual * dropout(x)      keep = 0 or 1 / (1 - dropout_p)
    dweight = sum of dy * x_hat                dscale = sum of dz * y
    dbias = sum of dy                          dshift = sum of dz

The last four follow from two sums over the rows of one sample, of dz * x_hat and of dz. Persistent
programs own consecutive rows of one sample and keep these sums in registers; each leaves one
partial row, and the kernel of finalize.py adds the partial rows in a fixed order. Where every row
is a sample, dgate, dscale and dshift are no sums: they are stored as they are, and the two sums are
of dy * x_hat and dy. `README.md` beside this file holds the derivation and the reason for partials.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusednorm.spec import Gradients, Mask, drop_below, rows_and_columns

from . import launch, plans
from .config import Architecture, RowTile, backward_config, share_out
from .differentiate import RowTerms, Streams, Sums, Terms, load_chunk, take_tile, without_dz
from .finalize import launch_finalize
from .gradients import load_column, load_factor, row_factors, store_partial
from .tile import (
    Dropout,
    Rows,
    Term,
    Tile,
    chunk_columns,
    constants,
    load_term,
    row_offsets,
    take_chunk,
    zeros,
)


# No value of M or of a stride may become part of what is compiled.
@triton.jit(do_not_specialize=("dz_stride", "h_stride", "scale_stride", "rows_per_sample", "steps"))
def layer_norm_bwd_sums_kernel(
    dz_ptr,  # [M, N], rows dz_stride apart but for dz_jumps
    h_ptr,  # [M, N], rows h_stride apart but for h_jumps
    weight_ptr,  # [N] or None
    scale_ptr,  # a vector [N] or a number for each sample, scale_stride apart, or None
    mean_ptr,  # [M], or None for RMS
    rstd_ptr,  # [M]
    c1_ptr,  # [M]
    c2_ptr,  # [M], or None for RMS
    dz_stride: tl.int64,
    dz_jumps,  # `jump_arguments`, or None
    h_stride: tl.int64,
    h_jumps,
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
    C: tl.constexpr = constants(N, 1, BLOCK_N, 1, TERM_VECTOR, COMPUTE)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    samples = row // rows_per_sample if SAMPLED else tl.zeros((1,), tl.int64)
    tile = Tile(row, row + 1, samples, 0)
    scale = Term(scale_ptr, scale_ptr if SCALE_SCALAR else None, scale_stride)
    mean = None
    if mean_ptr is not None:
        mean = load_column(mean_ptr, tile)
    streams = Streams(
        h=Rows(h_ptr, row_offsets(row, h_stride, H_VECTOR, h_jumps)),
        dz=Rows(dz_ptr, row_offsets(row, dz_stride, DZ_VECTOR, dz_jumps)),
        dh=None,
        x=None,
        mean=mean,
        rstd=load_column(rstd_ptr, tile),
        dx=None,
        dresidual=None,
        own=None,
    )
    e_d = zeros(C)
    e_sum = zeros(C)
    for i in tl.range(0, steps):
        tile = Tile(row, row + 1, samples, i)
        factors = ()
        if weight_ptr is not None or scale_ptr is not None:
            chunk = take_chunk(tile, 0, C)
            factors = (load_factor(weight_ptr, scale, samples, chunk, C),)
        d, e, _, _ = load_chunk(streams, factors, 0, tile, False, C)
        e_d += e * d
        e_sum += e
    c1, c2 = row_factors(streams, e_d, e_sum, C)
    tl.store(c1_ptr + row[:, None], c1)
    if c2_ptr is not None:
        tl.store(c2_ptr + row[:, None], c2)


@triton.jit(
    do_not_specialize=(
        *("M", "dz_stride", "dh_stride", "h_stride", "x_stride", "gate_stride", "scale_stride"),
        *("rows_per_sample", "programs_per_sample", "rows_per_program", "drop_below"),
    )
)
def layer_norm_bwd_kernel(
    dz_ptr,  # [M, N], rows dz_stride apart but for dz_jumps, or None where z was not used
    dh_ptr,  # likewise, or None where h was not used
    h_ptr,  # likewise
    x_ptr,  # likewise; None unless dgate is wanted
    gate_ptr,  # a vector [N] or a number for each sample, gate_stride apart, or None
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None; None unless dscale_ptr is wanted
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
    dgate_ptr,  # [programs, N] partials or, of rows with their own terms, [M, N]; or None
    dscale_ptr,  # [M, N], contiguous, of rows with their own terms; or None
    dshift_ptr,  # likewise
    M: tl.int64,
    dz_stride: tl.int64,
    dz_jumps,  # `jump_arguments`, or None
    dh_stride: tl.int64,
    dh_jumps,
    h_stride: tl.int64,
    h_jumps,
    x_stride: tl.int64,
    x_jumps,
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
    OWN_TERMS: tl.constexpr,  # gate and scale are [M, N]
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

    FORM "resident" keeps d and e across the row sums, "reload" loads h and dz again, "split"
    works on one column block with row sums that are known already.
    """
    C: tl.constexpr = constants(
        N, ROWS, BLOCK_N, CHUNKS, TERM_VECTOR, COMPUTE, None, X_HAT_DTYPE, OWN_TERMS=OWN_TERMS
    )
    # One axis of the grid holds all programs: the others end at 65535.
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N if FORM == "split" else 1
    program = (tl.program_id(0) // BLOCKS).to(tl.int64)
    first_chunk = tl.program_id(0) % BLOCKS
    samples = tl.zeros((ROWS,), tl.int64)
    if SAMPLED:
        sample = program // programs_per_sample
        samples += sample
        start = sample * rows_per_sample + (program % programs_per_sample) * rows_per_program
        end = tl.minimum(start + rows_per_program, (sample + 1) * rows_per_sample)
    else:
        start = program * rows_per_program
        end = tl.minimum(start + rows_per_program, M)

    gate = Term(None if OWN_TERMS else gate_ptr, gate_ptr if GATE_SCALAR else None, gate_stride)
    scale = Term(
        None if OWN_TERMS else scale_ptr, scale_ptr if SCALE_SCALAR else None, scale_stride
    )
    tile = Tile(start + tl.arange(0, ROWS), end, samples, first_chunk)
    factors = ()
    gates = ()
    nothing = ()
    for i in tl.static_range(CHUNKS):
        chunk = take_chunk(tile, i, C)
        if weight_ptr is not None or scale.ptr is not None:
            factors += (load_factor(weight_ptr, scale, samples, chunk, C),)
        if gate.ptr is not None:
            gates += (load_term(gate, samples, chunk.cols, C),)
        nothing += (zeros(C),)
    terms = Terms(factors, gates, Dropout(seed_ptr, drop_below, inverse_keep))
    sums = Sums(nothing, nothing, nothing)

    for row in tl.range(start, end, ROWS, num_stages=NUM_STAGES):
        rows = tl.cast(row, tl.int64) + tl.arange(0, ROWS)
        tile = Tile(rows, end, samples, first_chunk)
        mean = None
        if mean_ptr is not None:
            mean = load_column(mean_ptr, tile)
        own = None
        if OWN_TERMS:
            own = RowTerms(
                Rows(gate_ptr, row_offsets(rows, gate_stride, TERM_VECTOR)),
                Rows(scale_ptr, row_offsets(rows, scale_stride, TERM_VECTOR)),
                *(bias_ptr, dgate_ptr, dscale_ptr, dshift_ptr),
            )
        streams = Streams(
            h=Rows(h_ptr, row_offsets(rows, h_stride, H_VECTOR, h_jumps)),
            dz=Rows(dz_ptr, row_offsets(rows, dz_stride, DZ_VECTOR, dz_jumps)),
            dh=Rows(dh_ptr, row_offsets(rows, dh_stride, DH_VECTOR, dh_jumps)),
            x=Rows(x_ptr, row_offsets(rows, x_stride, X_VECTOR, x_jumps)),
            mean=mean,
            rstd=load_column(rstd_ptr, tile),
            dx=dx_ptr,
            dresidual=dresidual_ptr,
            own=own,
        )
        c1 = None
        c2 = None
        if c1_ptr is not None:
            c1 = load_column(c1_ptr, tile)
            c2 = c1
        if c2_ptr is not None:
            c2 = load_column(c2_ptr, tile)
        if dz_ptr is None:
            sums = without_dz(streams, terms, sums, tile, C)
        else:
            sums = take_tile(streams, terms, sums, tile, c1, c2, FORM == "reload", C)

    partial = program * N
    for i in tl.static_range(CHUNKS):
        cols = chunk_columns(first_chunk + i, BLOCK_N)
        store_partial(dz_x_hat_ptr, partial, cols, sums.dz_x_hat[i], N)
        store_partial(dz_sum_ptr, partial, cols, sums.dz[i], N)
        if not OWN_TERMS:
            store_partial(dgate_ptr, partial, cols, sums.dgate[i], N)


@plans.repeated("triton_backward", tensors=12, device_of=3)
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
    parameters = (gate, weight, bias, scale, shift)
    mask = output_mask if dz is not None else (*output_mask[:3], False, False, False, False)
    gradients = _allocate(h, parameters, (x_dtype, residual_dtype), mask)
    if rows == 0 or cols == 0 or all(gradient is None for gradient in gradients):
        return gradients
    dx, dresidual, dgate, dweight, dbias, dscale, dshift = gradients
    through_rows = not (dx is None and dresidual is None and dgate is None)
    terms = launch.terms(rows, cols, gate, scale, shift)
    own_terms = terms.of_rows(rows, cols)
    own, summed = (None, None, None), gradients
    if own_terms:
        own, summed = (dgate, dscale, dshift), (dx, dresidual, None, dweight, dbias, None, None)
    weight, bias = launch.vector(weight), launch.vector(bias)
    dz_rows, dh_rows, h_rows, x_rows = streams = [
        launch.as_rows(tensor, normalized_shape)
        for tensor in (dz, dh if through_rows else None, h, x if dgate is not None else None)
    ]

    arch = launch.architecture(h.device)
    written = (dx, dresidual) if dx is not None or dresidual is not None else (h,)
    config = backward_config(
        cols,
        launch.itemsize(rstd.dtype, *written),
        arch,
        sum(stream.tensor.element_size() for stream in streams if stream.tensor is not None),
        gate_gradient=dgate is not None,
        own_bytes=sum(t.element_size() for t in terms.tensors[:2] if t is not None and own_terms),
    )
    tile = config.tile
    # Programs own rows of one sample each, so that partial rows belong to samples.
    samples = 1 if own_terms else terms.samples
    sample_rows, blocks = rows // samples, config.column_blocks(cols)
    shares = share_out(sample_rows, h.element_size(), blocks * samples, config, arch)
    programs = shares.programs * samples

    def partial(needed: bool) -> torch.Tensor | None:
        return plans.scratch(rstd, programs, cols) if needed else None

    _, _, dgate, dweight, dbias, dscale, dshift = summed
    dscale_needs_sum = dscale is not None and bias is not None
    partials = (
        partial(dweight is not None or dscale is not None),
        partial(dbias is not None or dshift is not None or dscale_needs_sum),
        partial(dgate is not None),
    )
    c1 = c2 = None
    with launch.device_guard(h.device):
        if config.sums is not None and through_rows and dz is not None:
            c1, c2 = _launch_sums(dz_rows, h_rows, mean, rstd, weight, terms, config.sums, arch)
        plans.start(
            layer_norm_bwd_kernel,
            (programs * blocks,),
            dz_rows.tensor,
            dh_rows.tensor,
            h_rows.tensor,
            x_rows.tensor,
            terms.tensors[0],
            weight,
            bias if own[1] is not None else None,
            terms.tensors[1],
            seed,
            mean,
            rstd,
            c1,
            c2,
            dx,
            dresidual,
            *partials[:2],
            own[0] if own_terms else partials[2],
            *own[1:],
            rows,
            *(value for stream in streams for value in (stream.stride, stream.jumps)),
            *terms.strides[:2],
            sample_rows,
            *shares,
            drop_below(dropout_p),
            1.0 / (1.0 - dropout_p),
            N=cols,
            ROWS=tile.rows,
            BLOCK_N=tile.block_n,
            CHUNKS=tile.chunks,
            FORM=config.form,
            DZ_VECTOR=dz_rows.vector,
            DH_VECTOR=dh_rows.vector,
            H_VECTOR=h_rows.vector,
            X_VECTOR=x_rows.vector,
            X_HAT_DTYPE=launch.TRITON_DTYPE[x_hat_dtype],
            COMPUTE=launch.TRITON_DTYPE[rstd.dtype],
            NUM_STAGES=config.num_stages,
            SAMPLED=samples > 1,
            OWN_TERMS=own_terms,
            **terms.chosen("GATE_SCALAR", "SCALE_SCALAR", "TERM_VECTOR"),
            **launch.options(tile.num_warps, arch, config.programs_per_processor, tile.cluster),
        )
        if any(gradient is not None for gradient in summed[2:]):
            if own_terms:
                terms = launch.terms(rows, cols, None, None, None)
            launch_finalize(summed, partials, programs, weight, bias, terms, cols, arch)
    return gradients


def _allocate(
    h: torch.Tensor,
    parameters: tuple[torch.Tensor | None, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    mask: Mask,
) -> Gradients:
    """Return gradients to fill, zeros where h is empty; None where not wanted."""
    make = torch.empty if h.numel() > 0 else torch.zeros
    likes = [(h, dtype) for dtype in dtypes]
    likes += [(tensor, getattr(tensor, "dtype", None)) for tensor in parameters]
    return tuple(  # type: ignore[return-value]
        make(like.shape, dtype=dtype, device=h.device) if wanted and like is not None else None
        for (like, dtype), wanted in zip(likes, mask, strict=True)
    )


def _launch_sums(
    dz: launch.Rows,
    h: launch.Rows,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    terms: launch.Terms,
    tile: RowTile,
    arch: Architecture,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return c1 and c2 of every row, as the split form needs them."""
    rows = rstd.numel()
    cols = h.tensor.numel() // rows
    c1 = plans.scratch(rstd, rows)
    c2 = None if mean is None else plans.scratch(rstd, rows)
    plans.start(
        layer_norm_bwd_sums_kernel,
        (rows,),
        dz.tensor,
        h.tensor,
        weight,
        terms.tensors[1],
        mean,
        rstd,
        c1,
        c2,
        dz.stride,
        dz.jumps,
        h.stride,
        h.jumps,
        terms.strides[1],
        terms.rows_per_sample,
        -(-cols // tile.block_n),
        N=cols,
        BLOCK_N=tile.block_n,
        DZ_VECTOR=dz.vector,
        H_VECTOR=h.vector,
        COMPUTE=launch.TRITON_DTYPE[rstd.dtype],
        **terms.chosen("SAMPLED", "SCALE_SCALAR", "TERM_VECTOR"),
        **launch.options(tile.num_warps, arch),
    )
    return c1, c2
