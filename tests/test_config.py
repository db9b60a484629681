"""The launch policy: what holds for every row length, dtype and device."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from itertools import pairwise

import pytest

from fusednorm.triton_kernels import config
from fusednorm.triton_kernels.config import (
    MIN_BLOCK_BYTES,
    VECTOR_BYTES,
    Architecture,
    RowTile,
    backward_config,
    finalize_tile,
    forward_config,
    partial_rows,
    share_out,
    vector_elements,
)

ARCHITECTURES = {
    "sm_80": Architecture(32, 108, 166912, 65536),
    "sm_86": Architecture(32, 82, 101376, 65536),
    "sm_90": Architecture(32, 132, 232448, 65536, 8),
    "gfx942": Architecture(64, 304, 65536, 0),
    "interpreter": Architecture(32, 4, 232448, 0),
}
ITEMSIZES = (2, 4, 8)
POWERS = tuple(2**i for i in range(21))
COLS = sorted(
    {n for power in POWERS for n in (power - 1, power, power + 1, 3 * power // 2) if n > 0}
    | set(range(1, 300))
    | {384, 768, 769, 1000, 1536, 1600, 2560, 3000, 5120, 5140, 6144, 7168, 10000, 12288, 12289}
    | {14336, 18432, 20480, 24576, 28672, 40960, 49152, 100000, 131072, 262144}
)
ROWS = sorted({*range(1, 70), 100, 131, 132, 133, 199, 255, 256, 257, 1000, 4096, 65537, 10**6})

every_device = pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES)
every_itemsize = pytest.mark.parametrize("itemsize", ITEMSIZES)

MIN_THREADS, MAX_THREADS, LOOPED_THREADS = 128, 512, 1024

# Shared memory that the compiler needs for reductions, beside the stages of the pipeline.
REDUCTION_BYTES = 1024


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _tiles(cols: int, itemsize: int, arch: Architecture) -> dict[str, RowTile]:
    """Return every tile of a row that the kernels of one forward and backward work on."""
    backward = backward_config(cols, itemsize, arch, 2 * itemsize)
    tiles = {
        "forward": forward_config(cols, itemsize, arch).tile,
        "backward": backward.tile,
        "sums": backward.sums,
        "finalize": finalize_tile(cols, arch),
    }
    return {name: tile for name, tile in tiles.items() if tile is not None}


def _held(tile: RowTile, arch: Architecture) -> float:
    """Return the elements that each thread holds."""
    elements = tile.rows * tile.chunks * tile.block_n
    return elements / (tile.cluster * tile.num_warps * arch.warp_size)


def _resident(cols: int, itemsize: int, arch: Architecture) -> dict[str, RowTile]:
    """Return the tiles that hold whole rows, not a step of a loop or a block of columns."""
    forward = forward_config(cols, itemsize, arch)
    backward = backward_config(cols, itemsize, arch, 2 * itemsize)
    tiles = {} if forward.looped else {"forward": forward.tile}
    return tiles if backward.form == "split" else tiles | {"backward": backward.tile}


@every_device
@every_itemsize
def test_tile_covers_the_row(itemsize: int, arch: Architecture) -> None:
    """No column is left out, and no chunk lies wholly behind the end of the row."""
    for cols in COLS:
        for name, tile in _resident(cols, itemsize, arch).items():
            assert tile.chunks * tile.block_n >= cols, (cols, name)
            assert (tile.chunks - 1) * tile.block_n < cols, (cols, name)


@every_device
@every_itemsize
def test_few_lanes_are_idle(itemsize: int, arch: Architecture) -> None:
    """Under a quarter of a tile is padding, except in rows of a few sectors."""
    for cols in COLS:
        for name, tile in _resident(cols, itemsize, arch).items():
            lanes = tile.chunks * tile.block_n
            if tile.block_n * itemsize > MIN_BLOCK_BYTES or cols * itemsize > 4 * MIN_BLOCK_BYTES:
                assert 4 * (lanes - cols) < lanes, (cols, name)


@every_device
@every_itemsize
@pytest.mark.parametrize(("streams", "gate_gradient"), [(2, True), (3, False), (4, True)])
def test_backward_of_several_terms_keeps_few_columns(
    itemsize: int, arch: Architecture, streams: int, gate_gradient: bool
) -> None:
    """It has registers for four chunks, and takes half of a tile for padding before a fifth."""
    for cols in COLS:
        backward = backward_config(cols, itemsize, arch, streams * itemsize, gate_gradient)
        tile = backward.tile
        if backward.form != "split":
            lanes = tile.chunks * tile.block_n
            assert tile.chunks <= 4, cols
            assert _held(tile, arch) * itemsize <= 64, cols
            few = 4 * (lanes - cols) < lanes or lanes * itemsize <= 4 * MIN_BLOCK_BYTES
            assert few or _ceil_div(cols, tile.block_n // 2) > 4, cols
            assert 2 * (lanes - cols) < lanes or lanes * itemsize <= MIN_BLOCK_BYTES, cols


@every_device
@every_itemsize
def test_idle_lanes_of_short_rows_share_a_sector(itemsize: int, arch: Architecture) -> None:
    """Padding beyond a quarter is never a whole block of it."""
    for cols in COLS:
        for name, tile in _resident(cols, itemsize, arch).items():
            assert (tile.chunks * tile.block_n - cols) * itemsize < max(
                MIN_BLOCK_BYTES, cols * itemsize / 3 + 1
            ), (cols, name)


@every_device
@every_itemsize
def test_programs_are_launchable(itemsize: int, arch: Architecture) -> None:
    """Every size is a power of two, and a program has 128 to 512 threads on any warp size.

    One that walks a row and keeps nothing of it may have 1024.
    """
    for cols in COLS:
        resident = {"finalize", *_resident(cols, itemsize, arch)}
        for name, tile in _tiles(cols, itemsize, arch).items():
            for size in (tile.block_n, tile.rows, tile.num_warps, tile.cluster):
                assert _is_power_of_two(size), (cols, name, tile)
            assert tile.chunks >= 1, (cols, name)
            most = MAX_THREADS if name in resident else LOOPED_THREADS
            assert MIN_THREADS <= tile.num_warps * arch.warp_size <= most, (cols, name)


@every_device
@every_itemsize
def test_threads_have_work_and_registers_for_it(itemsize: int, arch: Architecture) -> None:
    """A thread moves at least one vector of a full tile and holds at most 64 registers of a row."""
    for cols in COLS:
        for name, tile in _tiles(cols, itemsize, arch).items():
            per_thread = _held(tile, arch)
            registers = per_thread * max(1, itemsize // 4)
            assert registers <= 64, (cols, name)
            if name in ("forward", "backward") and cols * itemsize >= VECTOR_BYTES:
                assert per_thread * itemsize >= VECTOR_BYTES, (cols, name)


@every_device
@every_itemsize
def test_forms_follow_each_other(itemsize: int, arch: Architecture) -> None:
    """A longer row never goes back to a form for shorter ones; only the split form has sums."""
    order = ("resident", "reload", "cluster", "split")
    forms = [backward_config(cols, itemsize, arch, 2 * itemsize) for cols in COLS]
    ranks = [order.index("cluster" if f.tile.cluster > 1 else f.form) for f in forms]
    assert ranks == sorted(ranks)
    assert {order[rank] for rank in ranks} >= {"resident", "split"}
    assert all((form.sums is not None) == (form.form == "split") for form in forms)
    looped = [forward_config(cols, itemsize, arch).looped for cols in COLS]
    assert looped == sorted(looped)
    assert {*looped} == {False, True}


@pytest.mark.parametrize("policy", [forward_config, backward_config, finalize_tile])
def test_only_sharing_rows_out_sees_their_number(policy: object) -> None:
    """Sums inside a row, and what is compiled, cannot depend on what the policy is not told."""
    assert callable(policy)
    values = {"cols", "itemsize", "arch", "stream_bytes", "gate_gradient", "own_bytes"}
    assert {*inspect.signature(policy).parameters} <= values
    takes_rows = [
        name
        for name, function in vars(config).items()
        if inspect.isfunction(function) and "rows" in inspect.signature(function).parameters
    ]
    assert takes_rows == ["partial_rows", "share_out"]


@every_itemsize
def test_sums_inside_a_row_are_the_same_on_all_nvidia_devices(itemsize: int) -> None:
    """The bits of y and dx depend on columns and dtype, not on what else a device has.

    Only rows that a cluster shares depend on whether there are clusters.
    """
    for cols in COLS:
        tilings = set()
        names = ["sm_80", "sm_86", "interpreter"]
        if all(
            tile.cluster == 1 for tile in _tiles(cols, itemsize, ARCHITECTURES["sm_90"]).values()
        ):
            names.append("sm_90")
        for name in names:
            forward = forward_config(cols, itemsize, ARCHITECTURES[name])
            backward = backward_config(cols, itemsize, ARCHITECTURES[name], 2 * itemsize)
            tilings.add((forward, backward.tile, backward.form, backward.sums))
        assert len(tilings) == 1, cols


@every_device
@every_itemsize
@pytest.mark.parametrize("own", [0, 2])
def test_pipeline_fits_in_shared_memory(itemsize: int, arch: Architecture, own: int) -> None:
    """The tiles in flight, x and dy of each stage but the last, fit beside the reductions.

    So do those of terms that each row has of its own, and they change no sum inside a row.
    """
    for cols in COLS:
        backward = backward_config(cols, itemsize, arch, 2 * itemsize, own_bytes=own * itemsize)
        tile = backward.tile
        assert tile == backward_config(cols, itemsize, arch, 2 * itemsize).tile, cols
        copies = (own + 2) * (2 if backward.form == "reload" else 1)
        stage = copies * tile.rows * tile.chunks * tile.block_n * itemsize // tile.cluster
        used = (backward.num_stages - 1) * stage + REDUCTION_BYTES
        assert backward.num_stages >= 1, cols
        assert backward.programs_per_processor >= 1, cols
        assert backward.programs_per_processor * used <= arch.shared_bytes, cols
        threads = tile.num_warps * arch.warp_size
        assert backward.programs_per_processor * threads <= MAX_THREADS, cols


@every_device
def test_register_limit(arch: Architecture) -> None:
    """Programs may use the whole register file and no more, in what the hardware encodes."""
    for num_warps in (1, 2, 4, 8, 16, 32):
        for programs in (1, 2, 3, 4):
            limit = arch.max_registers(num_warps, programs)
            if arch.registers == 0:
                assert limit is None
            else:
                assert limit is not None
                # A warp's registers come in units of 256.
                given = _ceil_div(limit, 8) * 8
                assert given * num_warps * arch.warp_size * programs <= arch.registers
                assert 16 <= limit <= 255


@every_device
@every_itemsize
@pytest.mark.parametrize("gate_gradient", [False, True])
def test_backward_has_registers_for_its_sums(
    itemsize: int, arch: Architecture, gate_gradient: bool
) -> None:
    """What the grid counts on leaves a thread over five registers for each column of a sum."""
    for cols, streams in itertools.product(COLS, (2, 3, 4)):
        backward = backward_config(cols, itemsize, arch, streams * itemsize, gate_gradient)
        tile = backward.tile
        limit = arch.max_registers(tile.num_warps, backward.programs_per_processor)
        held = _held(tile, arch)
        if limit is not None and backward.form != "reload":
            assert limit >= held * max(1, itemsize // 4) * (5 + gate_gradient), cols


@every_itemsize
def test_vector_elements(itemsize: int) -> None:
    """A vector is as wide as 16 bytes and the row stride allow, and rows that repeat allow all."""
    widest = VECTOR_BYTES // itemsize
    assert vector_elements(0, itemsize) == widest
    for stride in range(1, 200):
        vector = vector_elements(stride, itemsize)
        assert stride % vector == 0
        assert vector == widest or (vector < widest and stride % (2 * vector) != 0)
    assert vector_elements(2**40, itemsize) == widest


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@every_itemsize
def test_long_rows_are_shared_by_the_smallest_cluster(itemsize: int) -> None:
    """Each program gets no more of a row than it holds alone, and half of them would not do."""
    arch = ARCHITECTURES["sm_90"]
    most = {"forward": 16384, "backward": 8192}
    found = set()
    for cols in COLS:
        for name, tile in _resident(cols, itemsize, arch).items():
            if tile.cluster > 1:
                found.add((name, tile.cluster))
                assert most[name] * tile.cluster // 2 < cols <= most[name] * tile.cluster, cols
                assert tile.block_n % tile.cluster == 0
                assert tile.rows == 1
    expected = {(name, size) for name in most for size in (2, 4, 8)} if itemsize < 8 else set()
    assert found == expected


def test_clusters_leave_no_partial_wave() -> None:
    """A group of processors holds whole clusters only; a few may be missing of each device."""
    arch = ARCHITECTURES["sm_90"]
    assert replace(arch, processors=148).clusters(8) == 16  # of a B200, not 17
    for size in (2, 4, 8):
        assert arch.clusters(size) * size <= arch.processors * 15 // 16
        assert (arch.clusters(size) + 1) * size > arch.processors * 14 // 16
    config = backward_config(65536, 2, arch, 4)
    assert config.tile.cluster == 8
    assert partial_rows(10**6, 2, 1, config, arch) == arch.clusters(8) == 15


SOME_COLS = (1, 5, 17, 100, 768, 1024, 3000, 4096, 5120, 8192, 8193, 12288, 12289, 32768, 262144)


@every_device
@every_itemsize
@pytest.mark.parametrize("cols", SOME_COLS)
def test_partial_rows(cols: int, itemsize: int, arch: Architecture) -> None:
    """Every program has rows, no more run than fit at once, and more rows never mean fewer."""
    backward = backward_config(cols, itemsize, arch, 2 * itemsize)
    blocks = backward.column_blocks(cols)
    tile = backward.tile
    wave = arch.clusters(tile.cluster) * backward.programs_per_processor
    counts = []
    for rows in ROWS:
        partials = partial_rows(rows, itemsize, blocks, backward, arch)
        counts.append(partials)
        assert 1 <= partials <= _ceil_div(rows, tile.rows), rows
        assert partials * blocks <= max(wave, blocks), rows
        programs, rows_per_program = share_out(rows, itemsize, blocks, backward, arch)
        assert rows_per_program % tile.rows == 0
        assert programs * rows_per_program >= rows
        assert 1 <= programs <= partials, rows
        assert (programs - 1) * rows_per_program < rows, "the last program has no row"
    assert all(fewer <= more for fewer, more in pairwise(counts))


@every_device
@pytest.mark.parametrize("cols", SOME_COLS)
def test_samples_and_groups_take_no_second_wave(cols: int, arch: Architecture) -> None:
    """However many there are: a few programs that are left over take as long as all others."""
    for itemsize, shares in itertools.product(ITEMSIZES, (2, 3, 5, 7, 64, 100, 200)):
        backward = backward_config(cols, itemsize, arch, 2 * itemsize)
        blocks = shares * backward.column_blocks(cols)
        wave = arch.clusters(backward.tile.cluster) * backward.programs_per_processor
        for rows in ROWS:
            programs = blocks * partial_rows(rows, itemsize, blocks, backward, arch)
            assert programs <= max(blocks, wave), rows
        # Of the last, many rows, nothing is left over that one more program a share would fill.
        assert programs + blocks > wave


@every_device
@every_itemsize
@pytest.mark.parametrize("cols", SOME_COLS)
def test_traffic_of_partials(cols: int, itemsize: int, arch: Architecture) -> None:
    """Partials are under 3 % of the bytes moved once the batch keeps every processor busy."""
    backward = backward_config(cols, itemsize, arch, 2 * itemsize)
    blocks = backward.column_blocks(cols)
    busy = arch.clusters(backward.tile.cluster) * min(2, backward.programs_per_processor)
    for rows in ROWS:
        partials = partial_rows(rows, itemsize, blocks, backward, arch)
        written_and_read = 16 * partials  # bytes a column: two float32, twice
        rows_moved = 3 * itemsize * rows  # bytes a column: x, dy and dx
        if partials * blocks >= busy + blocks:
            assert written_and_read <= 0.03 * rows_moved, rows
        elif rows * itemsize >= 180 * busy:
            assert written_and_read <= 0.03 * rows_moved * (1 + blocks / busy), rows


@every_device
@every_itemsize
def test_a_small_batch_still_gets_every_processor(itemsize: int, arch: Architecture) -> None:
    """Idle processors, and those whose one program waits for its rows, cost more than partials."""
    for cols in (100, 1024, 4096, 8192):
        backward = backward_config(cols, itemsize, arch, 2 * itemsize)
        blocks = backward.column_blocks(cols)
        programs = arch.processors * min(2, backward.programs_per_processor)
        rows = programs * backward.tile.rows
        partials = partial_rows(rows, itemsize, blocks, backward, arch)
        assert partials * blocks > programs - blocks


def test_configurations_are_values() -> None:
    """Equal questions get the very same answer, which nobody can change."""
    arch = ARCHITECTURES["sm_90"]
    first = backward_config(4096, 2, arch, 4)
    assert backward_config(4096, 2, Architecture(32, 132, 232448, 65536, 8), 4) is first
    with pytest.raises(AttributeError):
        first.num_stages = 1
