"""Launch policy: pure functions from (columns, dtype, architecture) to frozen dataclasses.

Nothing here imports Triton or torch, and nothing but `partial_rows` and `share_out` sees the number
of rows: the order of every sum inside a row therefore depends on the number of columns and the
element size alone, which is what makes y and dx batch-invariant, and no change of the batch
compiles a kernel.

A row is held as CHUNKS tiles of BLOCK_N columns. A thread loads 16 bytes of each tile, so
BLOCK_N / (16 / itemsize) threads work on one row and each holds CHUNKS * 16 / itemsize elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

JUMP_ORIGIN = 1 << 60
"""What is added to an element offset of a jump, so that it is always a wide number to a kernel."""

VECTOR_BYTES = 16
"""The widest global access of one thread."""

MIN_THREADS = 128
"""Threads of a program that holds several short rows: four warps of 32 or two of 64."""

MAX_THREADS = 512
"""Threads of a program that holds one long row. At 1024 the register file leaves 64 registers to a
thread, which the backward accumulators alone would fill."""

LOOPED_THREADS = 1024
"""Threads of a program that walks a row and keeps nothing of it."""

MOST_CHUNKS = 4
"""Chunks of a row that a backward keeps which reads more than h and dz, or sums for a gate. Five
would be 40 columns of 16 bits a thread, and spill hundreds of registers."""

LINE_BYTES = 128
"""A line of the cache, which the threads of a warp that read one row of several cover at least."""

MIN_BLOCK_BYTES = 32
"""The smallest tile of a row, one DRAM sector. Rows shorter than a few sectors may leave more than
a quarter of the lanes idle, but idle lanes of a fetched sector cost no bandwidth."""


MIN_BLOCK = 4
"""The narrowest tile: one call of dropout's generator serves four columns."""


@dataclass(frozen=True)
class Architecture:
    """What the policy needs to know of a device.

    Attributes:
        warp_size: Threads of a warp (wavefront).
        processors: Streaming multiprocessors (compute units).
        shared_bytes: Shared memory that one program may use, in bytes.
        registers: 32-bit registers of a processor; 0 where the compiler takes no limit.
        cluster: Programs that may share a row, each on a processor of its own; 1 where none may.
    """

    warp_size: int
    processors: int
    shared_bytes: int
    registers: int
    cluster: int = 1

    def max_registers(self, num_warps: int, programs: int = 1) -> int | None:
        """Return the registers a thread may use where `programs` share a processor.

        Without a limit, ptxas aims at an occupancy of its own choice and spills a few registers to
        reach it. Registers are given out by eights.
        """
        if self.registers == 0:
            return None
        return min(255, self.registers // (programs * num_warps * self.warp_size) // 8 * 8)

    def clusters(self, size: int) -> int:
        """Return how many clusters of `size` programs surely run at once, one to a processor.

        All of a cluster are in one of eight groups, of which each leaves some processors over: of
        16 or 18 on an H100, of 18 or 20 on a B200. Some devices lack a few more.
        """
        if size == 1:
            return self.processors
        return min(self.processors * 15 // 16 // size, 8 * (self.processors // 8 // size))


@dataclass(frozen=True)
class RowTile:
    """How a program holds its rows: `rows` rows of `chunks` tiles of `block_n` columns.

    Of a cluster of several programs, each of `num_warps`, each holds its share of every tile.
    """

    block_n: int
    chunks: int
    rows: int
    num_warps: int
    cluster: int = 1


@dataclass(frozen=True)
class ForwardConfig:
    """Forward launch: a resident row is read once, a looped row twice (the second time from L2)."""

    tile: RowTile
    looped: bool


@dataclass(frozen=True)
class BackwardConfig:
    """Backward launch.

    Attributes:
        tile: The row tile of the persistent kernel, or the column block of the split form.
        form: `resident` reads h and dz once and keeps both; `reload` reads them again from L2
            after the row sums, so that only the accumulators stay in registers; `split` computes
            the row sums in a kernel of their own and then works by column blocks.
        sums: How the split form's first kernel walks a row; None in the other forms.
        num_stages: Depth of the row pipeline; 1 means that nothing is prefetched.
        programs_per_processor: Programs that the grid counts on per processor. The launch limits a
            thread to its share of the registers, so that this many really fit.
    """

    tile: RowTile
    form: str
    sums: RowTile | None
    num_stages: int
    programs_per_processor: int

    def column_blocks(self, cols: int) -> int:
        """Return how many programs share a row of `cols` columns."""
        return -(-cols // self.tile.block_n) if self.form == "split" else 1


class Shares(NamedTuple):
    """The programs that share the rows of a sample, and how many rows each of them takes."""

    programs: int
    rows_per_program: int


@dataclass(frozen=True)
class Tier:
    """How rows of up to `limit` columns are shared out.

    Attributes:
        limit: The longest row.
        per_thread: Elements of one row that a thread should hold.
        rows_per_thread: Rows of which a thread may hold a part where a warp holds whole rows and
            `per_thread` elements are more than its share of one.
    """

    limit: int
    per_thread: int
    rows_per_thread: int


# By bytes of an element of what is written; `python -m bench tune` proposes changes to the tiers.
# 32 elements a thread: one warp holds a 16-bit row of 1024 columns, so that up to there no row
# needs a barrier, and at ~70 registers every processor keeps over 32 KB in flight. A second program
# of 512 threads does not fit beside one at these 70 registers, and nothing would load while a row
# is stored: from 512 x 32 elements on 256 threads hold 64. float64 takes two registers an element.
FORWARD_TIERS = {
    2: (
        Tier(12288, 32, 4),
        Tier(32768, 64, 4),
    ),
    4: (
        Tier(14336, 32, 4),
        Tier(32768, 64, 4),
    ),
    8: (
        Tier(8192, 16, 4),
    ),
}  # fmt: skip

FORWARD_SHARE = 16384
"""Columns that each program of a cluster holds in the forward: 256 threads with 64, so that two
programs share a processor and one loads while the other one stores."""

# Each column a thread owns costs two float32 accumulators, and two more registers while h and dz
# are kept across the row sums: 16 columns a thread take about 100 registers.
BACKWARD_TIERS = {
    2: (
        Tier(8192, 16, 2),
    ),
    4: (
        Tier(8192, 16, 2),
    ),
    8: (
        Tier(4096, 8, 2),
    ),
}  # fmt: skip


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


def vector_elements(stride: int, itemsize: int) -> int:
    """Return how many elements of a row may be loaded at once when rows are `stride` apart.

    Args:
        stride: Distance of two rows, in elements.
        itemsize: Bytes of one element.
    """
    widest = VECTOR_BYTES // itemsize
    return widest if stride == 0 else min(widest, stride & -stride)


def _idle_lanes(cols: int, block: int) -> float:
    """Return the share of the lanes that a row of `cols` leaves idle in chunks of `block`."""
    lanes = -(-cols // block) * block
    return (lanes - cols) / lanes


def _row_tile(
    cols: int,
    itemsize: int,
    per_thread: int,
    rows_per_thread: int,
    warp_size: int,
    most_chunks: int = 32,
) -> RowTile:
    """Tile a row so that a thread holds about `per_thread` elements and under a quarter is idle.

    More is idle where less would take more than `most_chunks`.

    Args:
        cols: Columns of the row, N.
        itemsize: Bytes of one element of x.
        per_thread: Elements of one row that a thread should hold.
        rows_per_thread: Rows of which a thread may hold a part where a warp holds whole rows and
            `per_thread` elements are more than its share of one.
        warp_size: Threads of a warp.
        most_chunks: Chunks that the tile may have before a quarter of it is idle.
    """
    vector = VECTOR_BYTES // itemsize
    # The fewest threads that hold a row, so that it takes the fewest steps to add up; but a chunk
    # covers a line of the cache, where there is as much.
    fewest = next_power_of_two(-(-cols * vector // per_thread))
    block = max(MIN_BLOCK, min(next_power_of_two(cols), max(fewest, LINE_BYTES // itemsize)))
    while (
        block * itemsize > MIN_BLOCK_BYTES
        and _idle_lanes(cols, block) >= 0.25
        and -(-cols // (block // 2)) <= most_chunks
    ):
        block //= 2
    block = min(block, MAX_THREADS * vector)
    chunks = -(-cols // block)
    threads_per_row = max(1, block // vector)
    rows = max(1, MIN_THREADS // threads_per_row)
    if threads_per_row <= 32:
        rows *= max(1, min(rows_per_thread, per_thread // (chunks * vector)))
    threads = max(MIN_THREADS, threads_per_row)
    return RowTile(block, chunks, rows, max(1, threads // warp_size))


def _cluster_tile(
    cols: int,
    itemsize: int,
    longest: int,
    per_thread: int,
    arch: Architecture,
    most_chunks: int = 32,
) -> RowTile | None:
    """Tile a row for the smallest cluster of programs that hold `longest` columns each.

    Return None where one program does, where the device has no such cluster, and for float64, whose
    rows are rarely that long. For the other arguments see `_row_tile`.
    """
    cluster = next_power_of_two(-(-cols // longest))
    if cluster == 1 or cluster > arch.cluster or itemsize == 8:
        return None
    share = -(-cols // cluster)
    tile = _row_tile(share, itemsize, per_thread, 1, arch.warp_size, most_chunks)
    return replace(tile, block_n=tile.block_n * cluster, cluster=cluster)


def _looped_tile(itemsize: int, warp_size: int) -> RowTile:
    """Return the tile of a row that is walked in a loop: one 16-byte access a thread and step.

    At the 50 to 60 registers of such a loop 1024 threads fit on a processor. As one program they
    walk one row, whose second walk finds it in L2: 132 rows of 131072 16-bit columns are 35 MB.
    """
    return RowTile(LOOPED_THREADS * VECTOR_BYTES // itemsize, 1, 1, LOOPED_THREADS // warp_size)


def _held(tile: RowTile, warp_size: int) -> float:
    """Return the elements that a thread holds."""
    elements = tile.rows * tile.chunks * tile.block_n
    return elements / (tile.cluster * tile.num_warps * warp_size)


def _resident_threads(
    cols: int,
    itemsize: int,
    tile: RowTile,
    stream_bytes: int,
    gate_gradient: bool,
    warp_size: int,
) -> int:
    """Return how many threads of the persistent backward share the registers of a processor.

    512 threads have 128 registers each, 384 have 168 and 256 have 255. A thread keeps two sums for
    each of its columns, or three with the gradient of a gate; float64 takes twice the registers,
    and more for its arithmetic. `python -m bench codegen` shows what the compilers make of it.
    """
    held = _held(tile, warp_size)
    held *= (1.5 if gate_gradient else 1.0) * (3 if itemsize == 8 else 1)
    step = (held > 16) + (held > 24)
    # Of several rows each has addresses of its own in a third tensor, or where no vector aligns.
    if tile.rows > 1 and (stream_bytes > 2 * itemsize or cols * itemsize % VECTOR_BYTES):
        step += 1
    return (512, 384, 256, 256)[step]


def _tier(tiers: Mapping[int, tuple[Tier, ...]], cols: int, itemsize: int) -> Tier | None:
    """Return the tier of rows of `cols` elements; None for rows too long to stay on chip."""
    return next((tier for tier in tiers[itemsize] if cols <= tier.limit), None)


@lru_cache(maxsize=4096)
def forward_config(cols: int, itemsize: int, arch: Architecture) -> ForwardConfig:
    """Return the forward launch for rows of `cols` elements of `itemsize` bytes."""
    if tile := _cluster_tile(cols, itemsize, FORWARD_SHARE, 64, arch):
        return ForwardConfig(tile, False)
    if tier := _tier(FORWARD_TIERS, cols, itemsize):
        share = tier.per_thread, tier.rows_per_thread
        return ForwardConfig(_row_tile(cols, itemsize, *share, arch.warp_size), False)
    return ForwardConfig(_looped_tile(itemsize, arch.warp_size), True)


@lru_cache(maxsize=4096)
def backward_config(
    cols: int,
    itemsize: int,
    arch: Architecture,
    stream_bytes: int,
    gate_gradient: bool = False,
    own_bytes: int = 0,
) -> BackwardConfig:
    """Return the backward launch for rows of `cols` elements of `itemsize` bytes.

    Args:
        cols: Columns of the row, N.
        itemsize: Bytes of an element of dx, 8 where the sums are float64.
        arch: The device.
        stream_bytes: Bytes that are read for each column of a row: those of h, dz, dh and x.
        gate_gradient: Whether the sums of dgate are kept as well.
        own_bytes: Bytes of the gate and scale for each column, where each row has its own. They
            change no tile: a row that is alone has the tile of a row among others.
    """
    # The gradient of a gate takes half as much again: such rows are tiled as if twice as long.
    sums, most, length, readings = None, 24, 1, 1
    if gate_gradient:
        most, length = 12, 2
    chunks = MOST_CHUNKS if gate_gradient or stream_bytes > 2 * itemsize else 32
    tier = _tier(BACKWARD_TIERS, cols * length, itemsize)
    longest = tier or BACKWARD_TIERS[itemsize][-1]
    per_thread = longest.per_thread // length
    if tier:
        form = "resident"
        share = per_thread, tier.rows_per_thread
        tile = _row_tile(cols, itemsize, *share, arch.warp_size, chunks)
        unaligned = cols * itemsize % VECTOR_BYTES != 0
        if unaligned and tile.rows > 8 and _held(tile, arch.warp_size) > 32:
            # 40 columns of as many rows, each with statistics of its own, take over 255 registers.
            tile = replace(tile, rows=tile.rows // 2)
    elif itemsize == 2 and cols <= MAX_THREADS * most:
        # At `most` columns a thread the accumulators leave no room for h and dz as well; wider
        # types spill even so.
        form = "reload"
        tile = _row_tile(cols, itemsize, per_thread, 1, arch.warp_size, chunks)
        readings = 2  # the pipeline fetches the second one as well
    elif common := _cluster_tile(cols, itemsize, longest.limit // length, per_thread, arch, chunks):
        form, tile = "resident", common
    else:
        form, sums = "split", _looped_tile(itemsize, arch.warp_size)
        threads = 2 * MIN_THREADS
        rows = 1 if gate_gradient else 2  # with three accumulators two rows take 226 registers
        tile = RowTile(threads * VECTOR_BYTES // itemsize, 1, rows, threads // arch.warp_size)
    row_bytes = readings * (stream_bytes + own_bytes)
    stage_bytes = row_bytes * tile.rows * tile.chunks * tile.block_n // tile.cluster
    # Three stages keep two tiles in flight while one is worked on; a device whose shared memory
    # does not hold them gets two, or none, and float64 has no registers left for a third. The
    # reductions need under 1 KB beside them.
    depths = (3, 2) if itemsize < 8 else (2,)
    num_stages = next((s for s in depths if (s - 1) * stage_bytes + 1024 <= arch.shared_bytes), 1)
    threads = _resident_threads(cols, itemsize, tile, stream_bytes, gate_gradient, arch.warp_size)
    by_registers = threads // (tile.num_warps * arch.warp_size)
    by_shared = arch.shared_bytes // ((num_stages - 1) * stage_bytes + 1024)
    return BackwardConfig(tile, form, sums, num_stages, max(1, min(by_registers, by_shared)))


def partial_rows(
    rows: int, itemsize: int, shares: int, config: BackwardConfig, arch: Architecture
) -> int:
    """Return how many partial rows of dweight and dbias a backward writes for each of `shares`.

    A share is what other programs work on: `rows` rows of a sample, a group, or a column block.

    A partial row costs 16 bytes a column (two float32 written, then read), a row of x costs
    3 * itemsize (x, dy, dx). Partials stay under 3 % of the traffic while one covers at least
    180 / itemsize rows. A small batch still gets two programs for each processor where two fit: one
    alone waits for its own rows, and idle processors cost more than partials. But all programs fit
    at once: a few that are left over would take as long as all the others.
    """
    steps = -(-rows // config.tile.rows)
    cheap = rows * itemsize // 180
    places = arch.clusters(config.tile.cluster)
    least = -(-places * min(2, config.programs_per_processor) // shares)
    most = places * config.programs_per_processor // shares
    return max(1, min(steps, most, max(least, cheap)))


def share_out(
    rows: int, itemsize: int, shares: int, config: BackwardConfig, arch: Architecture
) -> Shares:
    """Return who takes which rows: whole tiles for each of at most `partial_rows` programs."""
    step = config.tile.rows
    most = partial_rows(rows, itemsize, shares, config, arch)
    rows_per_program = step * -(-rows // (most * step))
    return Shares(-(-rows // rows_per_program), rows_per_program)


MOST_CHANNELS = 2048
"""Channels of [B, C, S] of which a program holds a few positions; more are rows of a permuted
copy."""


def channel_tile(
    channels: int, positions: int, itemsize: int, arch: Architecture, per_thread: int
) -> RowTile:
    """Return the tile of positions, `rows` of them, with all `channels` in chunks of `block_n`.

    Args:
        channels: C.
        positions: S, by which a tile is no wider than an image.
        itemsize: Bytes of the widest element that is read or written, 8 where sums are float64.
        arch: The device.
        per_thread: Elements that a thread may hold.
    """
    # A line of the cache, where a program can hold all channels of as many positions.
    rows = min(LINE_BYTES // itemsize, next_power_of_two(positions))
    while rows > 1 and rows * channels > MAX_THREADS * per_thread:
        rows //= 2
    wanted = next_power_of_two(-(-rows * channels // per_thread))
    threads = min(MAX_THREADS, max(MIN_THREADS, wanted))
    # A thread has an address for each channel of a chunk: chunks of one access a thread hold them
    # one after the other. They are shorter where a quarter of the lanes would be idle.
    access = threads * VECTOR_BYTES // itemsize
    block = min(next_power_of_two(channels), max(1, access // rows))
    while _idle_lanes(channels, block) >= 0.25 and rows * block > threads:
        block //= 2
    return RowTile(block, -(-channels // block), rows, threads // arch.warp_size)


def channels_forward_tile(
    channels: int, positions: int, itemsize: int, arch: Architecture
) -> RowTile:
    """Return the tile of the forward of [B, C, S]; see `channel_tile`."""
    return channel_tile(channels, positions, itemsize, arch, 24 if itemsize == 8 else 48)


def channels_backward_config(
    channels: int,
    positions: int,
    itemsize: int,
    arch: Architecture,
    stream_bytes: int,
    vector_bytes: int,
) -> BackwardConfig:
    """Return the backward launch for tiles of positions of [B, C, S], which keep x and dz.

    Args:
        channels: C.
        positions: S.
        itemsize: Bytes of the widest element that is read or written, 8 where sums are float64.
        arch: The device.
        stream_bytes: Bytes that are read for each element of x: those of x and dz.
        vector_bytes: Bytes of one access at most.
    """
    # A thread holds x_hat and g of each element, in 128 registers.
    tile = channel_tile(channels, positions, itemsize, arch, {2: 16, 4: 16, 8: 8}[itemsize])
    stage_bytes = stream_bytes * tile.rows * tile.chunks * tile.block_n
    # A copy of fewer than four bytes is not asynchronous: what is fetched ahead of it would wait in
    # registers, as float64 leaves none for it.
    ahead = vector_bytes >= 4 and itemsize < 8
    num_stages = 2 if ahead and stage_bytes + 1024 <= arch.shared_bytes else 1
    by_registers = MAX_THREADS // (tile.num_warps * arch.warp_size)
    by_shared = arch.shared_bytes // ((num_stages - 1) * stage_bytes + 1024)
    return BackwardConfig(tile, "resident", None, num_stages, max(1, min(by_registers, by_shared)))


def finalize_tile(cols: int, arch: Architecture) -> RowTile:
    """Return the tile of partial rows that one step of the finalize kernel adds up.

    32 columns are the 128 bytes of a cache line and make enough programs of a narrow row for every
    processor; a wide row makes enough of them with whole kilobytes.
    """
    block = 32 if cols <= 8192 else 256
    return RowTile(block, 1, 1024 // block, MIN_THREADS // arch.warp_size)
