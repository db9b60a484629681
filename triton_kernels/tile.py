"""Device functions that the kernels share: a row tile, its terms and its statistics.

A tile is a tuple of CHUNKS tensors of shape [ROWS, BLOCK_N]; chunk c holds the columns
c * BLOCK_N .. (c + 1) * BLOCK_N - 1. Chunks of equal shape add up element by element, so a row sum
costs one reduction however many chunks there are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_columns(chunk, BLOCK_N: tl.constexpr):
    """Return the [BLOCK_N] column indices of a chunk."""
    return chunk * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def tile_mask(rows, row_end, cols, N: tl.constexpr, ROWS: tl.constexpr):
    """Return the [ROWS, BLOCK_N] mask of what exists; a single row always does."""
    mask = cols[None, :] < N
    if ROWS > 1:
        mask = mask & (rows[:, None] < row_end)
    return mask


@triton.jit
def row_offsets(rows, stride, VECTOR: tl.constexpr):
    """Return the [ROWS, 1] int64 offsets of rows whose stride is a multiple of VECTOR elements."""
    return tl.multiple_of(rows * stride, VECTOR)[:, None]


@triton.jit
def load_vector(ptr, offsets, cols, N: tl.constexpr):
    """Return the [ROWS, BLOCK_N] tile of the vectors at the [ROWS, 1] `offsets`, or None for None.

    Every row of the tile is loaded: all but one come from L1, and the tile then has the layout of
    x. A [BLOCK_N] vector has a layout of its own, and converting it costs a barrier a chunk.
    """
    if ptr is None:
        return None
    else:
        mask = (offsets >= 0) & (cols[None, :] < N)
        return tl.load(ptr + offsets + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_parameter(ptr, cols, N: tl.constexpr, ROWS: tl.constexpr):
    """Return the tile of a vector that is the same for every row, or None for None."""
    return load_vector(ptr, tl.zeros((ROWS, 1), tl.int32), cols, N)


@triton.jit
def load_term(
    ptr, stride, samples, cols, N: tl.constexpr, SCALAR: tl.constexpr, VECTOR: tl.constexpr
):
    """Return the tile of a gate, scale or shift for rows of the [ROWS] `samples`, or None for None.

    A term holds a vector for each sample, `stride` elements apart (0: one vector for all), or one
    number for each sample (SCALAR), which gives a [ROWS, 1] tile.
    """
    if ptr is None:
        return None
    elif SCALAR:
        return tl.load(ptr + samples * stride)[:, None]
    else:
        return load_vector(ptr, row_offsets(samples, stride, VECTOR), cols, N)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """Convert to DTYPE; from float64 to 16 bits there is no direct way."""
    if x.dtype == tl.float64 and DTYPE.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def kept(seed, rows, chunk, threshold, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the [ROWS, BLOCK_N] mask of the elements of a chunk that dropout keeps.

    One call of Philox 4x32-10, with counter (column / 4, row) and the seed as key, serves four
    columns, so that an element has the same fate whatever the tile.
    """
    quads = chunk * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)[None, :]
    zeros = tl.zeros((ROWS, BLOCK_N // 4), tl.uint32)
    row = rows[:, None]
    r0, r1, r2, r3 = tl.philox(
        seed,
        zeros + quads.to(tl.uint32),
        zeros + (row & 0xFFFFFFFF).to(tl.uint32),
        zeros + (row >> 32).to(tl.uint32),
        zeros,
    )
    # Joined, the last two dimensions are (bit 1, bit 0) of the column.
    bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (ROWS, BLOCK_N))
    return bits >= tl.cast(threshold, tl.uint32)


@triton.jit
def sum_chunks(chunks):
    """Return the [ROWS] row sums of a tile."""
    total = chunks[0]
    for i in tl.static_range(1, len(chunks)):
        total += chunks[i]
    return tl.sum(total, axis=1)


@triton.jit
def sum_pair(a, b, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the [ROWS] row sums of two [ROWS, BLOCK_N] tensors with one barrier.

    The pair is stacked to [2 * ROWS, BLOCK_N] and summed along its last axis, which moves no data
    on a GPU and is what NumPy, beneath the interpreter, adds pairwise.
    """
    stacked = tl.reshape(tl.ravel(tl.permute(tl.join(a, b), (2, 0, 1))), (2 * ROWS, BLOCK_N))
    sums = tl.reshape(tl.sum(stacked, axis=1), (2, ROWS))
    return tl.split(tl.permute(sums, (1, 0)))
