"""Device functions of the forwards: h, the statistics of its rows, and what becomes of x_hat.

`README.md` beside this file derives the statistics and explains the tiling.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile import (
    add_chunks,
    dropped_out,
    load_parameter,
    load_rows,
    load_term,
    rounded,
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
