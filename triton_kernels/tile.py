"""Device functions that the kernels share: addressing of a row tile and its statistics.

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
def load_parameter(ptr, cols, N: tl.constexpr, ROWS: tl.constexpr):
    """Return the [ROWS, BLOCK_N] tile of a parameter vector, or None for a parameter that is None.

    Every row of the tile is loaded: all but one come from L1, and the tile then has the layout of
    x. A [BLOCK_N] vector has a layout of its own, and converting it costs a barrier a chunk.
    """
    if ptr is None:
        return None
    else:
        rows = tl.zeros((ROWS, 1), tl.int32)
        return tl.load(
            ptr + rows + cols[None, :], mask=(rows == 0) & (cols[None, :] < N), other=0.0
        )


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
