"""Device functions of the backward: what becomes of a tile of rows.

The names are those of the equations in backward.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .gradients import row_factors, scaled, through_norm
from .tile import dropped_out, load_parameter, load_rows, store_rows, take_chunk, widen, zeros


class Streams(NamedTuple):
    """What is read, known and written of a tile's rows.

    Attributes:
        h: Rows.
        dz: Rows, absent where z was not used.
        dh: Rows, absent where h was not used.
        x: Rows, absent where dgate is not wanted.
        mean: [ROWS, 1], or None for RMS.
        rstd: [ROWS, 1].
        dx: Pointer to [M, N], or None.
        dresidual: Pointer to [M, N], or None.
        own: The terms that each row has of its own; only with OWN_TERMS.
    """

    h: Any
    dz: Any
    dh: Any
    x: Any
    mean: Any
    rstd: Any
    dx: Any
    dresidual: Any
    own: Any


class RowTerms(NamedTuple):
    """Gate and scale of which each row has its own, and the gradients of such terms.

    Attributes:
        gate: Rows, or absent.
        scale: Rows, or absent.
        bias: Pointer to [N], or None.
        dgate: Pointer to [M, N], or None.
        dscale: Pointer to [M, N], or None.
        dshift: Pointer to [M, N], or None.
    """

    gate: Any
    scale: Any
    bias: Any
    dgate: Any
    dscale: Any
    dshift: Any


class Terms(NamedTuple):
    """The chunks of weight * (1 + scale) and of the gate, none where there is none, and dropout."""

    factors: Any
    gates: Any
    dropout: Any


class Sums(NamedTuple):
    """Each chunk's [ROWS, BLOCK_N] sums of dz * x_hat, of dz, and of dresidual * dropout(x)."""

    dz_x_hat: Any
    dz: Any
    dgate: Any


@triton.jit
def _weighted(values, factors, i, C: tl.constexpr):
    """Return values times the i-th chunk of the factors, if there are any."""
    if len(factors) > 0:
        return values * widen(factors[i], C)
    else:
        return values


@triton.jit
def load_chunk(streams, factors, i, tile, AGAIN: tl.constexpr, C: tl.constexpr):
    """Load a [ROWS, BLOCK_N] chunk, the i-th; return d, e, dz and dz * x_hat.

    Where each row has its own scale, dz is dy.
    """
    chunk = take_chunk(tile, i, C)
    # Where the mask ends, d is arbitrary: it is only ever multiplied by dz or e, which are 0.
    d = load_rows(streams.h, chunk, C)
    if streams.mean is not None:
        d -= streams.mean
    dz = load_rows(streams.dz, chunk, C)
    e, dz_x_hat = scaled(streams, dz, d, C)
    if not C.OWN_TERMS:
        e = _weighted(e, factors, i, C)
    else:
        if not AGAIN:
            _store_modulation(streams.own, factors, i, tile, dz, dz_x_hat, C)
        if streams.own.scale.ptr is None:
            e = _weighted(e, factors, i, C)
        else:
            one_and_scale = 1.0 + load_rows(streams.own.scale, chunk, C)
            dz *= one_and_scale
            dz_x_hat *= one_and_scale
            # In the order of `load_factor`, for the bits of a row that is alone.
            e *= _weighted(one_and_scale, factors, i, C)
    return d, e, dz, dz_x_hat


@triton.jit
def _store_modulation(own, weights, i, tile, dz, dz_x_hat, C: tl.constexpr):
    """Store a chunk, the i-th, of dshift = dz and of dscale = dz * (x_hat * weight + bias)."""
    chunk = take_chunk(tile, i, C)
    store_rows(own.dshift, tile, chunk, dz, C)
    if own.dscale is not None:
        dscale = _weighted(dz_x_hat, weights, i, C)
        if own.bias is not None:
            dscale += dz * widen(load_parameter(own.bias, chunk, C), C)
        store_rows(own.dscale, tile, chunk, dscale, C)


@triton.jit
def _store_chunk(streams, terms, dgate, dh, tile, i, C: tl.constexpr):
    """Add dh as it came in, store dresidual and dx; return the sum for dgate."""
    chunk = take_chunk(tile, i, C)
    if streams.dh.ptr is not None:
        dh += load_rows(streams.dh, chunk, C)
    store_rows(streams.dresidual, tile, chunk, dh, C)
    dh = dropped_out(terms.dropout, tile, chunk, dh, C)
    if streams.x.ptr is not None:
        share = dh * load_rows(streams.x, chunk, C)
        if C.OWN_TERMS:
            store_rows(streams.own.dgate, tile, chunk, share, C)
        else:
            dgate += share
    if len(terms.gates) > 0:
        dh *= widen(terms.gates[i], C)
    if C.OWN_TERMS:
        if streams.own.gate.ptr is not None:
            dh *= load_rows(streams.own.gate, chunk, C)
    store_rows(streams.dx, tile, chunk, dh, C)
    return dgate


@triton.jit
def take_tile(streams, terms, sums, tile, c1, c2, AGAIN: tl.constexpr, C: tl.constexpr):
    """Take a tile, whose c1 and c2 may be known; return the sums with its share added.

    d and e are kept across the row sums or, with AGAIN, loaded and computed once more.
    """
    ds = ()
    es = ()
    dz_x_hats = ()
    dzs = ()
    for i in tl.static_range(C.CHUNKS):
        d, e, dz, dz_x_hat = load_chunk(streams, terms.factors, i, tile, False, C)
        if i == 0:
            e_d = e * d
            e_sum = e
        else:
            e_d += e * d
            e_sum += e
        dz_x_hats += (sums.dz_x_hat[i] + dz_x_hat,)
        dzs += (sums.dz[i] + dz,)
        ds += (d,)
        es += (e,)
    if c1 is None:
        c1, c2 = row_factors(streams, e_d, e_sum, C)
    dgates = ()
    for i in tl.static_range(C.CHUNKS):
        if AGAIN:
            d, e, _, _ = load_chunk(streams, terms.factors, i, tile, True, C)
            dh = through_norm(streams, d, e, c1, c2)
        else:
            dh = through_norm(streams, ds[i], es[i], c1, c2)
        dgates += (_store_chunk(streams, terms, sums.dgate[i], dh, tile, i, C),)
    return Sums(dz_x_hats, dzs, dgates)


@triton.jit
def without_dz(streams, terms, sums, tile, C: tl.constexpr):
    """Take a tile whose only gradient is that of h; return the sums with its share added."""
    dgates = ()
    for i in tl.static_range(C.CHUNKS):
        dgates += (_store_chunk(streams, terms, sums.dgate[i], zeros(C), tile, i, C),)
    return Sums(sums.dz_x_hat, sums.dz, dgates)
