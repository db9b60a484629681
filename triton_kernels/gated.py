"""Kernels of the gated norm and their launchers, both directions.

    z = y * silu(gate)    or, with the gate first,    z = y of x * silu(gate)

where y = x_hat * weight + bias and x_hat is normalised by the statistics of each group of columns.
A program works on one group of its rows, as if the rows were as long as a group: row r of group k
is row r * GROUPS + k of [M * GROUPS, N] outputs, statistics and partial sums, with N the columns of
a group. Statistics, row sums and partial rows are those of normalise.py and gradients.py.

With s = silu(gate), s' its derivative, du the gradient of what is normalised, and d and e as there:

    gate last:   dy = dz * s    dx = du        dgate = dz * y * s'
    gate first:  dy = dz        dx = du * s    dgate = du * x * s'
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fusednorm.spec import compute_dtype, rows_and_columns

from . import launch, plans
from .config import Architecture, RowTile, backward_config, forward_config, share_out
from .finalize import launch_finalize
from .gradients import load_column, row_factors, scaled, store_partial, through_norm
from .normalise import Norm, Stream, looped, resident
from .tile import (
    Dropout,
    Rows,
    Term,
    Tile,
    chunk_columns,
    constants,
    corrects_mean,
    load_parameter,
    load_rows,
    rounded,
    row_offsets,
    store_rows,
    take_chunk,
    widen,
    zeros,
)

Gradients = tuple[torch.Tensor | None, ...]


@triton.jit(do_not_specialize=("M", "x_stride", "gate_input_stride", "steps"))
def gated_norm_fwd_kernel(
    x_ptr,  # [M, GROUPS * N], rows x_stride apart
    gate_input_ptr,  # likewise
    weight_ptr,  # [GROUPS * N] or None
    bias_ptr,  # [GROUPS * N] or None
    z_ptr,  # [M, GROUPS * N], contiguous
    mean_ptr,  # [M * GROUPS], or None where nothing needs a gradient, and for RMS
    rstd_ptr,  # [M * GROUPS], or None where nothing needs a gradient
    M: tl.int64,
    x_stride: tl.int64,
    gate_input_stride: tl.int64,
    steps: tl.int32,  # chunks of a looped row; a constant would unroll the loop, and spill
    eps: tl.float64,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    LOOPED: tl.constexpr,
    RMS: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    X_VECTOR: tl.constexpr,
    GATE_VECTOR: tl.constexpr,
    X_HAT_DTYPE: tl.constexpr,  # dtype that x_hat is rounded to, or None
    COMPUTE: tl.constexpr,
):
    H_DTYPE: tl.constexpr = COMPUTE if GATE_FIRST else x_ptr.dtype.element_ty
    CORRECTED: tl.constexpr = corrects_mean(RMS, N, H_DTYPE, z_ptr.dtype.element_ty, COMPUTE)
    C: tl.constexpr = constants(N, ROWS, BLOCK_N, CHUNKS, 1, COMPUTE, None, X_HAT_DTYPE, CORRECTED)
    # Groups of one row are neighbours in the grid as in memory.
    group = tl.program_id(0) % GROUPS
    rows = (tl.program_id(0) // GROUPS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = Tile(rows * GROUPS + group, M * GROUPS, None, 0)
    x = Rows(x_ptr + group * N, row_offsets(rows, x_stride, X_VECTOR))
    gate = Rows(gate_input_ptr + group * N, row_offsets(rows, gate_input_stride, GATE_VECTOR))
    absent = Rows(None, None)
    no_term = Term(None, None, None)
    weight = None
    bias = None
    if weight_ptr is not None:
        weight = weight_ptr + group * N
    if bias_ptr is not None:
        bias = bias_ptr + group * N
    stream = Stream(x, absent, no_term, Dropout(None, None, None), gate if GATE_FIRST else absent)
    norm = Norm(weight, bias, no_term, no_term, absent if GATE_FIRST else gate, z_ptr, None)
    if LOOPED:
        mean, rstd = looped(stream, norm, tile, eps, steps, RMS, C)
    else:
        mean, rstd = resident(stream, norm, tile, eps, RMS, C)
    if mean_ptr is not None:
        tl.store(mean_ptr + tile.rows, mean, mask=rows < M)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + tile.rows, rstd, mask=rows < M)


@plans.repeated("triton_gated_forward", tensors=4, device_of=0)
def gated_norm_fwd(
    x: torch.Tensor,
    gate_input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    normalized_shape: tuple[int, ...],
    group_size: int,
    eps: float,
    rms: bool,
    norm_before_gate: bool,
    out_dtype: torch.dtype,
    x_hat_dtype: torch.dtype | None,
    save_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Run the forward kernel.

    Args:
        x: [*, *normalized_shape], any strides; copied once where rows are not evenly spaced or
            columns not adjacent.
        gate_input: Of x's shape, any float dtype and strides.
        weight: As many elements as a row, of any float dtype, or None.
        bias: Likewise.
        normalized_shape: The trailing dimensions that form a row.
        group_size: Columns that have statistics of their own.
        eps: Added to the variance.
        rms: Whether the mean is taken as 0.
        norm_before_gate: Whether the SiLU multiplies what has been normalised.
        out_dtype: dtype of z.
        x_hat_dtype: dtype that x_hat is rounded to before the affine part, or None.
        save_stats: Whether mean and rstd are wanted.

    Returns:
        z of x's shape, contiguous; mean (None for RMS) and rstd of shape [M * groups] in the
        compute dtype, or None.
    """
    rows, cols = rows_and_columns(x, normalized_shape)
    groups = cols // group_size if cols > 0 else 0
    compute = compute_dtype(x.dtype, gate_input.dtype)
    z = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean = rstd = None
    if save_stats:
        rstd = torch.empty(rows * groups, dtype=compute, device=x.device)
        mean = None if rms else torch.empty_like(rstd)
    if z.numel() == 0:
        return z, mean, rstd
    x_rows, gate_rows = (launch.even_rows(t, normalized_shape) for t in (x, gate_input))
    arch = launch.architecture(x.device)
    config = forward_config(group_size, launch.itemsize(compute, z), arch)
    tile = config.tile
    with launch.device_guard(x.device):
        plans.start(
            gated_norm_fwd_kernel,
            (-(-rows // tile.rows) * groups,),
            x_rows.tensor,
            gate_rows.tensor,
            launch.vector(weight),
            launch.vector(bias),
            z,
            mean,
            rstd,
            rows,
            x_rows.stride,
            gate_rows.stride,
            -(-group_size // tile.block_n),
            eps,
            N=group_size,
            GROUPS=groups,
            ROWS=tile.rows,
            BLOCK_N=tile.block_n,
            CHUNKS=tile.chunks,
            LOOPED=config.looped,
            RMS=rms,
            GATE_FIRST=not norm_before_gate,
            X_VECTOR=x_rows.vector,
            GATE_VECTOR=gate_rows.vector,
            X_HAT_DTYPE=launch.TRITON_DTYPE[x_hat_dtype],
            COMPUTE=launch.TRITON_DTYPE[compute],
            **launch.options(tile.num_warps, arch, cluster=tile.cluster),
        )
    return z, mean, rstd


class Streams(NamedTuple):
    """What is read, known and written of a tile's rows.

    Attributes:
        dz: Rows.
        x: Rows.
        gate: Rows.
        mean: [ROWS, 1], or None for RMS.
        rstd: [ROWS, 1].
        dx: Pointer to [M * GROUPS, N], or None.
        dgate: Likewise.
    """

    dz: Any
    x: Any
    gate: Any
    mean: Any
    rstd: Any
    dx: Any
    dgate: Any


class Parameters(NamedTuple):
    """The chunks of weight and bias, none where there is none."""

    weights: Any
    biases: Any


class Sums(NamedTuple):
    """Each chunk's [ROWS, BLOCK_N] sums of dy * x_hat and of dy."""

    dy_x_hat: Any
    dy: Any


@triton.jit
def _load_chunk(streams, parameters, i, chunk, GATE_FIRST: tl.constexpr, C: tl.constexpr):
    """Load a [ROWS, BLOCK_N] chunk, the i-th.

    Return d, e, dy and dy * x_hat, where dz, and with it dy and e, is 0 beyond the mask. Return as
    well, with the gate first, by what du becomes dx and dgate; else twice dgate itself.
    """
    x = load_rows(streams.x, chunk, C)
    gate = load_rows(streams.gate, chunk, C)
    dz = load_rows(streams.dz, chunk, C)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dsilu = sigmoid + silu * (1.0 - sigmoid)
    d = x * silu if GATE_FIRST else x
    if streams.mean is not None:
        d -= streams.mean
    dy = dz if GATE_FIRST else dz * silu
    e, dy_x_hat = scaled(streams, dy, d, C)
    y = rounded(d * streams.rstd, C.X_HAT_DTYPE)
    if len(parameters.weights) > 0:
        weight = widen(parameters.weights[i], C)
        e *= weight
        y *= weight
    if len(parameters.biases) > 0:
        y += widen(parameters.biases[i], C)
    if GATE_FIRST:
        return d, e, dy, dy_x_hat, silu, x * dsilu
    else:
        dgate = dz * y * dsilu
        return d, e, dy, dy_x_hat, dgate, dgate


@triton.jit
def _take_tile(
    streams,
    parameters,
    sums,
    tile,
    c1,
    c2,
    AGAIN: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    C: tl.constexpr,
):
    """Take a tile, whose c1 and c2 may be known; return the sums with its share added.

    What dx is made of is kept across the row sums or, with AGAIN, loaded and computed once more.
    """
    ds = ()
    es = ()
    firsts = ()
    seconds = ()
    dy_x_hats = ()
    dys = ()
    for i in tl.static_range(C.CHUNKS):
        chunk = take_chunk(tile, i, C)
        d, e, dy, dy_x_hat, first, second = _load_chunk(
            streams, parameters, i, chunk, GATE_FIRST, C
        )
        if i == 0:
            e_d = e * d
            e_sum = e
        else:
            e_d += e * d
            e_sum += e
        dy_x_hats += (sums.dy_x_hat[i] + dy_x_hat,)
        dys += (sums.dy[i] + dy,)
        if not GATE_FIRST:
            store_rows(streams.dgate, tile, chunk, first, C)
        ds += (d,)
        es += (e,)
        firsts += (first,)
        seconds += (second,)
    if c1 is None:
        c1, c2 = row_factors(streams, e_d, e_sum, C)
    for i in tl.static_range(C.CHUNKS):
        chunk = take_chunk(tile, i, C)
        if AGAIN:
            d, e, _, _, first, second = _load_chunk(streams, parameters, i, chunk, GATE_FIRST, C)
            du = through_norm(streams, d, e, c1, c2)
        else:
            first = firsts[i]
            second = seconds[i]
            du = through_norm(streams, ds[i], es[i], c1, c2)
        if GATE_FIRST:
            store_rows(streams.dgate, tile, chunk, du * second, C)
            du *= first
        store_rows(streams.dx, tile, chunk, du, C)
    return Sums(dy_x_hats, dys)


@triton.jit
def _group_rows(ptr, group, rows, stride, VECTOR: tl.constexpr, N: tl.constexpr):
    """Return one group of rows."""
    return Rows(ptr + group * N, row_offsets(rows, stride, VECTOR))


@triton.jit(do_not_specialize=("dz_stride", "x_stride", "gate_input_stride", "steps"))
def gated_norm_bwd_sums_kernel(
    dz_ptr,  # [M, GROUPS * N], rows dz_stride apart
    x_ptr,  # likewise
    gate_input_ptr,  # likewise
    weight_ptr,  # [GROUPS * N] or None
    mean_ptr,  # [M * GROUPS], or None for RMS
    rstd_ptr,  # [M * GROUPS]
    c1_ptr,  # [M * GROUPS]
    c2_ptr,  # [M * GROUPS], or None for RMS
    dz_stride: tl.int64,
    x_stride: tl.int64,
    gate_input_stride: tl.int64,
    steps: tl.int32,  # chunks of a row; a constant would unroll the loop, and spill
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    DZ_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    GATE_VECTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Write c1 and c2 of one group of one row per program, for groups too long to keep on chip."""
    C: tl.constexpr = constants(N, 1, BLOCK_N, 1, 1, COMPUTE)
    group = tl.program_id(0) % GROUPS
    row = (tl.program_id(0) // GROUPS).to(tl.int64) + tl.arange(0, 1)
    places = row * GROUPS + group
    tile = Tile(places, places + 1, None, 0)
    mean = None
    if mean_ptr is not None:
        mean = load_column(mean_ptr, tile)
    streams = Streams(
        _group_rows(dz_ptr, group, row, dz_stride, DZ_VECTOR, N),
        _group_rows(x_ptr, group, row, x_stride, X_VECTOR, N),
        _group_rows(gate_input_ptr, group, row, gate_input_stride, GATE_VECTOR, N),
        mean,
        load_column(rstd_ptr, tile),
        None,
        None,
    )
    e_d = zeros(C)
    e_sum = zeros(C)
    for i in tl.range(0, steps):
        chunk = take_chunk(tile, i, C)
        weights = ()
        if weight_ptr is not None:
            weights = (load_parameter(weight_ptr + group * N, chunk, C),)
        parameters = Parameters(weights, ())
        d, e, _, _, _, _ = _load_chunk(streams, parameters, 0, chunk, GATE_FIRST, C)
        e_d += e * d
        e_sum += e
    c1, c2 = row_factors(streams, e_d, e_sum, C)
    tl.store(c1_ptr + places[:, None], c1)
    if c2_ptr is not None:
        tl.store(c2_ptr + places[:, None], c2)


@triton.jit(
    do_not_specialize=("M", "dz_stride", "x_stride", "gate_input_stride", "rows_per_program")
)
def gated_norm_bwd_kernel(
    dz_ptr,  # [M, GROUPS * N], rows dz_stride apart
    x_ptr,  # likewise
    gate_input_ptr,  # likewise
    weight_ptr,  # [GROUPS * N] or None
    bias_ptr,  # [GROUPS * N], or None; for dgate with the gate last
    mean_ptr,  # [M * GROUPS], or None for RMS
    rstd_ptr,  # [M * GROUPS]
    c1_ptr,  # [M * GROUPS]; None where the program holds whole groups and computes c1 and c2
    c2_ptr,  # [M * GROUPS] or None
    dx_ptr,  # [M, GROUPS * N], contiguous, or None
    dgate_input_ptr,  # likewise
    dy_x_hat_ptr,  # [programs, GROUPS * N] partial sums of dy * x_hat, or None
    dy_sum_ptr,  # [programs, GROUPS * N] partial sums of dy, or None
    M: tl.int64,
    dz_stride: tl.int64,
    x_stride: tl.int64,
    gate_input_stride: tl.int64,
    rows_per_program: tl.int64,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    FORM: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    DZ_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    GATE_VECTOR: tl.constexpr,
    X_HAT_DTYPE: tl.constexpr,  # dtype that the forward rounds x_hat to, or None
    COMPUTE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Write dx and dgate of one group of a program's rows, and the partial sums over those rows.

    FORM is that of `layer_norm_bwd_kernel`.
    """
    C: tl.constexpr = constants(N, ROWS, BLOCK_N, CHUNKS, 1, COMPUTE, None, X_HAT_DTYPE)
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N if FORM == "split" else 1
    first_chunk = tl.program_id(0) % BLOCKS
    group = tl.program_id(0) // BLOCKS % GROUPS
    program = (tl.program_id(0) // BLOCKS // GROUPS).to(tl.int64)
    start = program * rows_per_program
    end = tl.minimum(start + rows_per_program, M)
    tile = Tile(start + tl.arange(0, ROWS), end, None, first_chunk)
    weights = ()
    biases = ()
    nothing = ()
    for i in tl.static_range(CHUNKS):
        chunk = take_chunk(tile, i, C)
        if weight_ptr is not None:
            weights += (load_parameter(weight_ptr + group * N, chunk, C),)
        if bias_ptr is not None:
            biases += (load_parameter(bias_ptr + group * N, chunk, C),)
        nothing += (zeros(C),)
    parameters = Parameters(weights, biases)
    sums = Sums(nothing, nothing)

    for row in tl.range(start, end, ROWS, num_stages=NUM_STAGES):
        rows = tl.cast(row, tl.int64) + tl.arange(0, ROWS)
        tile = Tile(rows * GROUPS + group, end * GROUPS, None, first_chunk)
        mean = None
        if mean_ptr is not None:
            mean = load_column(mean_ptr, tile)
        streams = Streams(
            _group_rows(dz_ptr, group, rows, dz_stride, DZ_VECTOR, N),
            _group_rows(x_ptr, group, rows, x_stride, X_VECTOR, N),
            _group_rows(gate_input_ptr, group, rows, gate_input_stride, GATE_VECTOR, N),
            mean,
            load_column(rstd_ptr, tile),
            dx_ptr,
            dgate_input_ptr,
        )
        c1 = None
        c2 = None
        if c1_ptr is not None:
            c1 = load_column(c1_ptr, tile)
            c2 = c1
        if c2_ptr is not None:
            c2 = load_column(c2_ptr, tile)
        sums = _take_tile(streams, parameters, sums, tile, c1, c2, FORM == "reload", GATE_FIRST, C)

    partial = (program * GROUPS + group) * N
    for i in tl.static_range(CHUNKS):
        cols = chunk_columns(first_chunk + i, BLOCK_N)
        store_partial(dy_x_hat_ptr, partial, cols, sums.dy_x_hat[i], N)
        store_partial(dy_sum_ptr, partial, cols, sums.dy[i], N)


@plans.repeated("triton_gated_backward", tensors=7, device_of=0)
def gated_norm_bwd(
    dz: torch.Tensor,
    x: torch.Tensor,
    gate_input: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    normalized_shape: tuple[int, ...],
    group_size: int,
    norm_before_gate: bool,
    x_hat_dtype: torch.dtype | None,
    output_mask: tuple[bool, bool, bool, bool],
) -> Gradients:
    """Run the backward kernels: one for most groups, one more for very long ones, one to finalize.

    Args:
        dz: Gradient of z, of x's shape and any strides; never written to.
        x: What the forward got.
        gate_input: What the forward got.
        mean: [M * groups] from the forward, or None for RMS.
        rstd: [M * groups] from the forward.
        weight: As many elements as a row, or None.
        bias: Likewise.
        normalized_shape: The trailing dimensions that form a row.
        group_size: What the forward got.
        norm_before_gate: What the forward got.
        x_hat_dtype: What the forward got.
        output_mask: Which of dx, dgate_input, dweight and dbias are wanted.

    Returns:
        The gradients, each of the shape and dtype of its tensor, contiguous; None where not wanted.
    """
    rows, cols = rows_and_columns(x, normalized_shape)
    make = torch.empty if x.numel() > 0 else torch.zeros
    gradients = tuple(
        make(like.shape, dtype=like.dtype, device=x.device) if wanted and like is not None else None
        for like, wanted in zip((x, gate_input, weight, bias), output_mask, strict=True)
    )
    if x.numel() == 0 or all(gradient is None for gradient in gradients):
        return gradients
    dx, dgate, dweight, dbias = gradients
    groups = cols // group_size
    weight, bias = launch.vector(weight), launch.vector(bias)
    streams = [launch.even_rows(tensor, normalized_shape) for tensor in (dz, x, gate_input)]
    arch = launch.architecture(x.device)
    written = (dx, dgate) if dx is not None or dgate is not None else (x,)
    config = backward_config(
        group_size,
        launch.itemsize(rstd.dtype, *written),
        arch,
        sum(tensor.element_size() for tensor in (dz, x, gate_input)),
        gate_gradient=True,  # as much is kept of a column as with the sums of a gate
    )
    tile = config.tile
    blocks = groups * config.column_blocks(group_size)
    programs, rows_per_program = share_out(rows, x.element_size(), blocks, config, arch)
    dy_x_hat = plans.scratch(rstd, programs, cols) if dweight is not None else None
    dy_sum = plans.scratch(rstd, programs, cols) if dbias is not None else None
    constants = {
        "N": group_size,
        "GROUPS": groups,
        "GATE_FIRST": not norm_before_gate,
        "DZ_VECTOR": streams[0].vector,
        "X_VECTOR": streams[1].vector,
        "GATE_VECTOR": streams[2].vector,
        "COMPUTE": launch.TRITON_DTYPE[rstd.dtype],
    }
    c1 = c2 = None
    with launch.device_guard(x.device):
        if config.sums is not None and (dx is not None or not norm_before_gate):
            c1, c2 = _launch_sums(streams, mean, rstd, weight, config.sums, arch, constants)
        plans.start(
            gated_norm_bwd_kernel,
            (programs * blocks,),
            *(stream.tensor for stream in streams),
            weight,
            bias if norm_before_gate and dgate is not None else None,
            mean,
            rstd,
            c1,
            c2,
            dx,
            dgate,
            dy_x_hat,
            dy_sum,
            rows,
            *(stream.stride for stream in streams),
            rows_per_program,
            ROWS=tile.rows,
            BLOCK_N=tile.block_n,
            CHUNKS=tile.chunks,
            FORM=config.form,
            X_HAT_DTYPE=launch.TRITON_DTYPE[x_hat_dtype],
            NUM_STAGES=config.num_stages,
            **constants,
            **launch.options(tile.num_warps, arch, config.programs_per_processor, tile.cluster),
        )
        if dweight is not None or dbias is not None:
            launch_finalize(
                (None, None, None, dweight, dbias, None, None),
                (dy_x_hat, dy_sum, None),
                programs,
                weight,
                bias,
                launch.terms(rows, cols, None, None, None),
                cols,
                arch,
            )
    return gradients


def _launch_sums(
    streams: list[launch.Rows],
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    tile: RowTile,
    arch: Architecture,
    constants: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return c1 and c2 of every group of every row, as the split form needs them."""
    c1 = plans.scratch(rstd, rstd.numel())
    c2 = None if mean is None else plans.scratch(rstd, rstd.numel())
    plans.start(
        gated_norm_bwd_sums_kernel,
        (rstd.numel(),),
        *(stream.tensor for stream in streams),
        weight,
        mean,
        rstd,
        c1,
        c2,
        *(stream.stride for stream in streams),
        -(-constants["N"] // tile.block_n),
        BLOCK_N=tile.block_n,
        **constants,
        **launch.options(tile.num_warps, arch),
    )
    return c1, c2
