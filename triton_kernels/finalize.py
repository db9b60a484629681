"""The kernel that adds partial rows up to the gradients of parameters, and its launcher.

Every backward leaves one partial row a program: of dz * x_hat, of dz, and of what the gate's
gradient is a sum of. They are added in a fixed order, so that bits do not depend on which program
was first. `README.md` beside this file holds the reason for partials.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import cuda_capability_geq

from fusednorm.spec import Gradients

from . import launch, plans
from .config import Architecture, finalize_tile
from .tile import Term, cast, chunk_columns, constants, load_term


class Output(NamedTuple):
    """A gradient of `samples` vectors [N] or numbers, and the sums that make it.

    It is partial * factor + addend * addend_factor, where factors are vectors [N]. Whatever it has
    not is None.
    """

    ptr: Any
    numbers: Any
    samples: Any
    partial: Any
    factor: Any
    addend: Any
    addend_factor: Any


@triton.constexpr_function
def is_dependent():
    """Return whether the finalize kernel is a dependent launch: Hopper and Blackwell have those.

    Not on compute capability 12, where CUDA graphs are reported to refuse them.
    """
    if knobs.runtime.interpret:
        return False
    return cuda_capability_geq(9) and not cuda_capability_geq(12)


@triton.jit
def let_finalize_start():
    """Allow the finalize kernel onto the device. It starts when every program has come here."""
    if is_dependent():
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _sum_partials(partial_ptr, first, count, cols, scale, per_sample, C: tl.constexpr):
    """Return the [BLOCK_N] sums of `count` partial rows, each times its 1 + scale if there is one.

    A sample of the scale has `per_sample` of the partial rows.
    """
    DTYPE: tl.constexpr = partial_ptr.dtype.element_ty
    total = tl.zeros((C.ROWS, C.BLOCK_N), DTYPE)
    for step in tl.range(0, count, C.ROWS):
        places = tl.cast(step, tl.int64) + tl.arange(0, C.ROWS)
        mask = (places[:, None] < count) & (cols[None, :] < C.N)
        offsets = ((first + places) * C.N)[:, None] + cols[None, :]
        partial = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        if scale.ptr is not None:
            factor = load_term(scale, tl.minimum(places, count - 1) // per_sample, cols, C)
            partial *= 1.0 + factor.to(DTYPE)
        total += partial
    return tl.sum(total, axis=0)


@triton.jit
def _columns(output, first, count, cols, scale, per_sample, C: tl.constexpr):
    """Return [BLOCK_N] columns of a gradient from its partial rows."""
    total = _sum_partials(output.partial, first, count, cols, scale, per_sample, C)
    if output.factor is not None:
        total *= tl.load(output.factor + cols, mask=cols < C.N, other=0.0).to(total.dtype)
    if output.addend is not None:
        addend = _sum_partials(output.addend, first, count, cols, scale, per_sample, C)
        factor = tl.load(output.addend_factor + cols, mask=cols < C.N, other=0.0)
        total += addend * factor.to(total.dtype)
    return total


@triton.jit
def _finalize(output, sample, block, count, scale, per_sample, C: tl.constexpr):
    """Store the gradient of a sample, one column block of its vector or its one number."""
    first = sample * count
    if output.numbers is None:
        cols = chunk_columns(block, C.BLOCK_N)
        total = _columns(output, first, count, cols, scale, per_sample, C)
        places = output.ptr + sample * C.N + cols
        tl.store(places, cast(total, output.ptr.dtype.element_ty), mask=cols < C.N)
    else:
        if block == 0:
            # N numbers become one, where those of a vector are sums over a few programs.
            total = tl.zeros((C.BLOCK_N,), tl.float64)
            for i in tl.range(0, tl.cdiv(C.N, C.BLOCK_N)):
                cols = chunk_columns(i, C.BLOCK_N)
                columns = _columns(output, first, count, cols, scale, per_sample, C)
                total += columns.to(tl.float64)
            total = cast(tl.sum(total, axis=0), output.numbers.dtype.element_ty)
            tl.store(output.numbers + sample, total)


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
    """Add up partial rows. The grid walks the rows of every output, and of each its column blocks.

    The partial rows of a sample are consecutive.
    """
    if is_dependent():
        # The kernel before may still be running. Every program waits here for all that it writes,
        # before it reads or writes anything itself, and none lets others start before it ends. So
        # whatever follows in the stream follows both kernels: the block of partial rows, which is
        # free for others as soon as this launch is queued, is not overwritten before it is read.
        tl.extra.cuda.gdc_wait()
    C: tl.constexpr = constants(N, ROWS, COLS, 1, TERM_VECTOR, None)
    BLOCKS: tl.constexpr = (N + COLS - 1) // COLS
    block = tl.program_id(0) % BLOCKS
    job = (tl.program_id(0) // BLOCKS).to(tl.int64)
    scale = Term(scale_ptr, scale_ptr if SCALE_SCALAR else None, scale_stride)
    unscaled = Term(None, None, scale_stride)
    dscale = Output(
        dscale_ptr,
        dscale_ptr if SCALE_SCALAR else None,
        scale_samples,
        dz_x_hat_ptr,
        weight_ptr,
        None if bias_ptr is None else dz_sum_ptr,
        bias_ptr,
    )
    dshift = Output(
        dshift_ptr,
        dshift_ptr if SHIFT_SCALAR else None,
        shift_samples,
        *(dz_sum_ptr, None, None, None),
    )
    dgate = Output(
        dgate_ptr,
        dgate_ptr if GATE_SCALAR else None,
        gate_samples,
        *(dgate_partial_ptr, None, None, None),
    )
    outputs = (
        Output(dweight_ptr, None, 1, dz_x_hat_ptr, None, None, None),
        Output(dbias_ptr, None, 1, dz_sum_ptr, None, None, None),
        dscale,
        dshift,
        dgate,
    )
    for i in tl.static_range(5):
        output = outputs[i]
        if output.ptr is not None:
            if (job >= 0) & (job < output.samples):
                count = partials // output.samples
                # weight and bias have one gradient, whose partial rows differ in scale.
                weighting = scale if i < 2 else unscaled
                _finalize(output, job, block, count, weighting, partials // scale_samples, C)
            job -= output.samples


def launch_finalize(
    gradients: Gradients,
    partials: tuple[torch.Tensor | None, ...],
    programs: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    terms: launch.Terms,
    cols: int,
    arch: Architecture,
) -> None:
    """Fill the gradients that are sums over rows, of which at least one is wanted."""
    _, _, dgate, dweight, dbias, dscale, dshift = gradients
    scale = terms.tensors[1]
    samples = [1 if term is None else term.shape[0] for term in (scale, dshift, dgate)]
    jobs = (dweight is not None) + (dbias is not None)
    for gradient, rows in zip((dscale, dshift, dgate), samples, strict=True):
        jobs += 0 if gradient is None else rows
    tile = finalize_tile(cols, arch)
    plans.start(
        layer_norm_bwd_finalize_kernel,
        (jobs * -(-cols // tile.block_n),),
        *partials,
        weight,
        bias,
        scale,
        dweight,
        dbias,
        dscale,
        dshift,
        dgate,
        programs,
        terms.strides[1],
        *samples,
        N=cols,
        ROWS=tile.rows,
        COLS=tile.block_n,
        **terms.chosen("GATE_SCALAR", "SCALE_SCALAR", "SHIFT_SCALAR", "TERM_VECTOR"),
        **launch.options(tile.num_warps, arch),
        **({"launch_pdl": True} if is_dependent() else {}),
    )
