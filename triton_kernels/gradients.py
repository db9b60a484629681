"""Device functions of the backwards: what a row's gradient is made of, and partial sums.

With d = h - mean (h for RMS), x_hat = d * rstd and e = dz * weight * rstd:

    c1 = mean(e * d) * rstd^2    c2 = mean(e), 0 for RMS    dh = e - d * c1 - c2
"""

from __future__ import annotations

import triton
import triton.language as tl

from .finalize import let_finalize_start
from .tile import load_parameter, load_term, rounded, sum_pair, widen


@triton.jit
def load_factor(weight_ptr, scale, samples, chunk, C: tl.constexpr):
    """Return the tile of weight * (1 + scale), which are factors of e; one of them is there."""
    if scale.ptr is None:
        return load_parameter(weight_ptr, chunk, C)
    else:
        factor = 1.0 + widen(load_term(scale, samples, chunk.cols, C), C)
        if weight_ptr is not None:
            factor *= widen(load_parameter(weight_ptr, chunk, C), C)
        return factor


@triton.jit
def scaled(streams, dz, d, C: tl.constexpr):
    """Return rstd * dz, and dz * x_hat for the x_hat that the forward may have rounded."""
    e = dz * streams.rstd
    if C.X_HAT_DTYPE == C.COMPUTE:
        return e, e * d
    else:
        return e, dz * rounded(d * streams.rstd, C.X_HAT_DTYPE)


@triton.jit
def row_means(streams, e_d, e_sum, C: tl.constexpr):
    """Return the [ROWS, 1] means of e * d and of e; RMS has none of e, the first stands for it."""
    if streams.mean is None:
        e_d_mean = tl.sum(e_d, axis=1) / C.N
        return e_d_mean[:, None], e_d_mean[:, None]
    else:
        e_d_mean, e_mean = sum_pair(e_d, e_sum, C)
        return (e_d_mean / C.N)[:, None], (e_mean / C.N)[:, None]


@triton.jit
def row_factors(streams, e_d, e_sum, C: tl.constexpr):
    """Return the [ROWS, 1] c1 and c2; RMS has no c2, another number stands in its place."""
    e_d_mean, c2 = row_means(streams, e_d, e_sum, C)
    # One by one: the square of rstd may be out of range.
    return e_d_mean * streams.rstd * streams.rstd, c2


@triton.jit
def through_norm(streams, d, e, c1, c2):
    """Return a chunk of what dresidual owes to dz."""
    if streams.mean is None:
        return e - d * c1
    else:
        return e - (d * c1 + c2)


@triton.jit
def load_column(ptr, tile):
    """Return one number of each row, [ROWS, 1]."""
    return tl.load(ptr + tile.rows, mask=tile.rows < tile.end, other=0.0)[:, None]


@triton.jit
def store_partial(ptr, offset, cols, sums, N: tl.constexpr):
    """Store a chunk of the partial row at `offset`; nothing where `ptr` is None."""
    if ptr is not None:
        let_finalize_start()
        tl.store(ptr + offset + cols, tl.sum(sums, axis=0), mask=cols < N)
