"""Device functions that the kernels share: a tile of rows, its chunks, terms and sums.

A tile is ROWS rows of CHUNKS chunks; chunk c holds the columns c * BLOCK_N .. (c + 1) * BLOCK_N - 1
of each. Chunks of equal shape add up element by element, so a row sum costs one reduction however
many chunks there are.

A kernel gathers its arguments in NamedTuples and its constants in one `Constants`. Triton bounds
what may be done with them: a NamedTuple holds tensors, pointers and None, but no constants, which
it would turn into tensors; a function returns neither None nor one that holds None; a tuple of them
forgets the names of their fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import is_cuda

from .config import JUMP_ORIGIN


@dataclass(frozen=True)
class Constants:
    """What is compiled in and the same for all rows and terms.

    Attributes:
        N: Columns of a row.
        ROWS: Rows of a tile.
        BLOCK_N: Columns of a chunk.
        CHUNKS: Chunks of a row that a program holds.
        TERM_VECTOR: Elements by which the strides of terms are divisible.
        COMPUTE: dtype of statistics and sums.
        H_DTYPE: dtype that h is rounded to; COMPUTE where it is not.
        X_HAT_DTYPE: dtype that x_hat is rounded to; COMPUTE where it is not.
        CORRECTED: Whether the mean of a row is corrected; see `corrects_mean`.
        OWN_TERMS: Whether each row has a gate, scale and shift of its own.
    """

    N: Any
    ROWS: Any
    BLOCK_N: Any
    CHUNKS: Any
    TERM_VECTOR: Any
    COMPUTE: Any
    H_DTYPE: Any
    X_HAT_DTYPE: Any
    CORRECTED: Any
    OWN_TERMS: Any


@triton.constexpr_function
def constants(
    N,
    ROWS,
    BLOCK_N,
    CHUNKS,
    TERM_VECTOR,
    COMPUTE,
    H_DTYPE=None,
    X_HAT_DTYPE=None,
    CORRECTED=False,
    OWN_TERMS=False,
):
    """Return `Constants`, made inside of a kernel; nothing is rounded to None."""
    # Shapes and counts of unrolled loops have to be constexprs of their own.
    sizes = map(tl.constexpr, (N, ROWS, BLOCK_N, CHUNKS, TERM_VECTOR))
    rounded_to = H_DTYPE or COMPUTE, X_HAT_DTYPE or COMPUTE
    return Constants(*sizes, COMPUTE, *rounded_to, CORRECTED, OWN_TERMS)


@triton.constexpr_function
def corrects_mean(RMS, N, H_DTYPE, Z_DTYPE, COMPUTE):
    """Return whether what rounding takes from the mean of a row of h shows in z.

    It does not where COMPUTE has digits to spare for a sum of N numbers as large as the largest:
    the mean of equal numbers is then exact, and that of others is off by much less than they differ
    by. 16 bits leave 13 or 16 digits of float32.
    """
    h, z, compute = (dtype.fp_mantissa_width + 1 for dtype in (H_DTYPE, Z_DTYPE, COMPUTE))
    return not RMS and max(h, z) + (N - 1).bit_length() > compute


class Tile(NamedTuple):
    """The rows of a tile.

    Attributes:
        rows: [ROWS] row numbers.
        end: The row that the program's rows end before.
        samples: [ROWS] the sample that each row belongs to.
        first_chunk: The chunk of a row that the tile's chunks begin with.
    """

    rows: Any
    end: Any
    samples: Any
    first_chunk: Any


class Chunk(NamedTuple):
    """A chunk of a tile.

    Attributes:
        number: Its place in the row.
        cols: [BLOCK_N] column numbers.
        mask: [ROWS, BLOCK_N], true where there is such a row and column.
    """

    number: Any
    cols: Any
    mask: Any


class Rows(NamedTuple):
    """A tensor of rows: its pointer, or None where it is absent, and the [ROWS, 1] offsets."""

    ptr: Any
    offsets: Any


class Term(NamedTuple):
    """A gate, scale or shift: a vector for each sample, or a number.

    Attributes:
        ptr: Pointer to either, or None where the term is absent.
        numbers: Pointer to numbers, or None where they are vectors.
        stride: Elements from one sample to the next; 0 where there is one for all.
    """

    ptr: Any
    numbers: Any
    stride: Any


class Dropout(NamedTuple):
    """What dropout draws with.

    Attributes:
        seed: Pointer to one int64, or None without dropout.
        drop_below: Random words below it drop their element.
        inverse_keep: 1 / (1 - dropout_p).
    """

    seed: Any
    drop_below: Any
    inverse_keep: Any


@triton.jit
def zeros(C: tl.constexpr):
    """Return a [ROWS, BLOCK_N] tensor of zeros."""
    return tl.zeros((C.ROWS, C.BLOCK_N), C.COMPUTE)


@triton.jit
def chunk_columns(chunk, BLOCK_N: tl.constexpr):
    """Return the [BLOCK_N] column numbers of a chunk."""
    return chunk * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def take_chunk(tile, i, C: tl.constexpr):
    """Return the i-th chunk of a tile; a single row always exists."""
    number = tile.first_chunk + i
    cols = chunk_columns(number, C.BLOCK_N)
    mask = cols[None, :] < C.N
    if C.ROWS > 1:
        mask = mask & (tile.rows[:, None] < tile.end)
    return Chunk(number, cols, mask)


_ORIGIN = tl.constexpr(JUMP_ORIGIN)


@triton.jit
def row_offsets(rows, stride, VECTOR: tl.constexpr, jumps=None):
    """Return the [ROWS, 1] int64 offsets of rows, all of which are multiples of VECTOR elements.

    Rows are `stride` apart but for their jumps, `launch.jump_arguments` or None.
    """
    offsets = rows * stride
    if jumps is not None:
        for i in tl.static_range(0, len(jumps), 2):
            offsets += tl.umulhi(2 * rows, jumps[i]) * ((jumps[i + 1] - _ORIGIN) >> 1)
    return tl.multiple_of(offsets, VECTOR)[:, None]


@triton.jit
def load_rows(rows, chunk, C: tl.constexpr):
    """Return a [ROWS, BLOCK_N] chunk of rows that are there, 0 where the mask ends."""
    places = rows.ptr + rows.offsets + chunk.cols[None, :]
    return widen(tl.load(places, mask=chunk.mask, other=0.0), C)


@triton.jit
def store_rows(ptr, tile, chunk, values, C: tl.constexpr):
    """Store a [ROWS, BLOCK_N] chunk of contiguous rows; nothing where `ptr` is None."""
    if ptr is not None:
        places = (tile.rows * C.N)[:, None] + chunk.cols[None, :]
        tl.store(ptr + places, cast(values, ptr.dtype.element_ty), mask=chunk.mask)


@triton.jit
def load_vectors(ptr, offsets, cols, N: tl.constexpr):
    """Return the [ROWS, BLOCK_N] tile of the vectors at the [ROWS, 1] `offsets`.

    Every row of the tile is loaded: all but one come from L1, and the tile then has the layout of
    x. A [BLOCK_N] vector has a layout of its own, and converting it costs a barrier a chunk.
    """
    mask = (offsets >= 0) & (cols[None, :] < N)
    return tl.load(ptr + offsets + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_parameter(ptr, chunk, C: tl.constexpr):
    """Return the [ROWS, BLOCK_N] tile of a vector that is the same for every row."""
    return load_vectors(ptr, tl.zeros((C.ROWS, 1), tl.int32), chunk.cols, C.N)


@triton.jit
def load_term(term, samples, cols, C: tl.constexpr):
    """Return a term that is there, of [ROWS] samples: [ROWS, BLOCK_N], or [ROWS, 1] of numbers."""
    if term.numbers is None:
        return load_vectors(term.ptr, row_offsets(samples, term.stride, C.TERM_VECTOR), cols, C.N)
    else:
        return tl.load(term.numbers + samples * term.stride)[:, None]


@triton.constexpr_function
def _unpacks(dtype, COLS, C):
    """Return whether `widen` unpacks pairs: on NVIDIA, and not where Triton interprets.

    Nor where there are none: in numbers, and in rows of an odd number of columns, whose elements
    are loaded one by one.
    """
    pairs = COLS > 1 and C.N % 2 == 0 and dtype == tl.bfloat16 and tl.float32 == C.COMPUTE
    return pairs and is_cuda() and not knobs.runtime.interpret


@triton.jit
def widen(x, C: tl.constexpr):
    """Convert a [ROWS, BLOCK_N] chunk, or [ROWS, 1] numbers, that were loaded to COMPUTE.

    bfloat16 is the upper half of float32: a shift or a mask takes each of a pair out of its
    register at once, where the compiler unpacks it first.
    """
    if _unpacks(x.dtype, x.shape[1], C):
        unpack: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return tl.inline_asm_elementwise(unpack, "=&r,=r,r", [x], tl.float32, True, 2)
    else:
        return x.to(C.COMPUTE)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """Convert to DTYPE; from float64 to 16 bits there is no direct way."""
    if x.dtype == tl.float64 and DTYPE.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Return x rounded to DTYPE, in the dtype that it has."""
    return cast(x, DTYPE).to(x.dtype)


@triton.jit
def silu(gate):
    """Return gate * sigmoid(gate)."""
    return gate * tl.sigmoid(gate)


@triton.jit
def kept(seed, rows, number, drop_below, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the [ROWS, BLOCK_N] mask of the elements of a chunk that dropout keeps.

    One call of Philox 4x32-10, with counter (column / 4, row) and the seed as key, serves four
    columns, so that an element has the same fate whatever the tile.
    """
    quads = number * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)[None, :]
    nothing = tl.zeros((ROWS, BLOCK_N // 4), tl.uint32)
    row = rows[:, None]
    r0, r1, r2, r3 = tl.philox(
        seed,
        nothing + quads.to(tl.uint32),
        nothing + (row & 0xFFFFFFFF).to(tl.uint32),
        nothing + (row >> 32).to(tl.uint32),
        nothing,
    )
    # Joined, the last two dimensions are (bit 1, bit 0) of the column.
    bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (ROWS, BLOCK_N))
    return bits >= tl.cast(drop_below, tl.uint32)


@triton.jit
def dropped_out(dropout, tile, chunk, values, C: tl.constexpr):
    """Return dropout of a chunk: 0, or its values / (1 - dropout_p)."""
    if dropout.seed is None:
        return values
    else:
        # Kept from row to row, the key schedule of the seed would take 20 registers.
        seed = tl.load(dropout.seed)
        keep = kept(seed, tile.rows, chunk.number, dropout.drop_below, C.ROWS, C.BLOCK_N)
        return tl.where(keep, values * tl.full((C.ROWS, 1), dropout.inverse_keep, C.COMPUTE), 0.0)


@triton.jit
def add_chunks(chunks):
    """Return the [ROWS, BLOCK_N] sum of the chunks of a tile."""
    total = chunks[0]
    for i in tl.static_range(1, len(chunks)):
        total += chunks[i]
    return total


@triton.jit
def sum_pair(a, b, C: tl.constexpr):
    """Return the [ROWS] row sums of two [ROWS, BLOCK_N] tensors with one barrier.

    The pair is stacked to [2 * ROWS, BLOCK_N] and summed along its last axis, which moves no data
    on a GPU and is what NumPy, beneath the interpreter, adds pairwise.
    """
    stacked = tl.ravel(tl.permute(tl.join(a, b), (2, 0, 1)))
    sums = tl.sum(tl.reshape(stacked, (2 * C.ROWS, C.BLOCK_N)), axis=1)
    return tl.split(tl.permute(tl.reshape(sums, (2, C.ROWS)), (1, 0)))
