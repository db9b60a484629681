"""The host in place of a GPU computes the same, and refuses what a GPU would not forgive."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from simt_library import CSRC, SIMT, compile_for_host
from torch import Tensor

ROWS, COLS, STRIDE = 4, 64, 68  # of planted.cpp


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The planted kernels."""
    library = ctypes.CDLL(str(compile_for_host(SIMT / "planted.cpp")))
    for name in ("run_case", "run_copy", "run_shuffle", "run_cluster_sum", "run_fresh_shared"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


@pytest.fixture
def machine(library: ctypes.CDLL) -> ctypes.CDLL:
    """A device like sm_90 of three processors."""
    library.simt_device(3, 228, True)
    return library


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def matrices() -> tuple[Tensor, Tensor]:
    """Input and output with gaps between their rows; 8 bits are enough for each number."""
    numbers = torch.arange(float(ROWS * STRIDE)).remainder(251).view(ROWS, STRIDE)
    return numbers[:, :COLS], torch.full_like(numbers, float("nan"))[:, :COLS]


def copied(x: Tensor) -> Tensor:
    return x


def reversed_rows(x: Tensor) -> Tensor:
    return x.flip(1)


def swapped_rows(x: Tensor) -> Tensor:
    return x[[1, 0, 3, 2]]


OUTSIDE = "byte 256 of row 3 of {}, which has 4 rows of 256 bytes"
MISALIGNED = "{} of 16 bytes: expected a multiple of 16 as address, got {} more"
RACE = "{} of byte .*, to which thread .* has written since the last barrier"
UNARRIVED = "byte 0 of .*, where a copy_async of thread 0 has not arrived"

# The fault that is planted, what the launch says of it, and what the twin without it computes.
FAULTS: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
    ("load_past_row", "block 3, thread 63: load of 4 bytes at " + OUTSIDE.format("in"), copied),
    ("load_before_buffer", "block 0, thread 0: load of 4 bytes at byte -4 of row 0 of in", copied),
    ("load_from_nowhere", "load of 4 bytes at 0, far from all buffers", copied),
    ("load_vector_past_row", "thread 15: load of 16 bytes at " + OUTSIDE.format("in"), copied),
    ("load_vector_across_end", "load of 16 bytes at byte 256 of row 0 of in", copied),
    ("load_output", "load of out, which the kernel may only write", copied),
    ("store_past_row", "thread 63: store of 4 bytes at " + OUTSIDE.format("out"), copied),
    ("store_to_input", "store of in, which the kernel may only read", copied),
    ("store_twice", "thread 1: store to byte 0 of row 3 of out, to which thread 0 of", copied),
    ("store_in_two_blocks", "block 2, .* row 0 of out, to which thread 0 of block 3 has", copied),
    ("load_misaligned", MISALIGNED.format("load", 4), copied),
    ("load_once_misaligned", MISALIGNED.format("load_once", 8), copied),
    ("store_misaligned", MISALIGNED.format("store", 4), copied),
    ("load_partial_too_soon", "load_partial before wait_for_previous_kernel", copied),
    (
        "shuffle_not_reached",
        "waits at shuffle_xor with 31 of 32 threads; thread 5 of block 3 has ended",
        reversed_rows,
    ),
    ("shuffle_beyond_warp", "shuffle_xor: expected a mask below 32, got 63", reversed_rows),
    (
        "warp_waits_in_two_places",
        "thread 0: waits at sync_block with .* threads; thread 1 of block 3 waits at shuffle_xor",
        reversed_rows,
    ),
    (
        "block_barrier_not_reached",
        "waits at sync_block with 32 of 64 threads; thread 32 of block 3 has ended",
        reversed_rows,
    ),
    (
        "cluster_barrier_not_reached",
        "block 2, .* waits at sync_cluster with 64 of 128 threads; thread 0 of block 3 has ended",
        reversed_rows,
    ),
    (
        "warps_at_two_barriers",
        "waits at sync_cluster with 32 of 64 threads; thread 32 of block 3 waits at sync_block",
        reversed_rows,
    ),
    ("shared_past_end", "shared_store of 4 bytes at byte 256 of .*, which has 256", reversed_rows),
    ("shared_before_start", "shared_load of 4 bytes at byte -4 of shared memory", reversed_rows),
    ("shared_misaligned", MISALIGNED.format("shared_store", 4), reversed_rows),
    (
        "shared_unwritten",
        "thread 23: shared_load of byte 160 of .*, which nothing has written",
        reversed_rows,
    ),
    ("read_after_write", RACE.format("shared_load"), reversed_rows),
    ("write_after_read", RACE.format("shared_load"), reversed_rows),
    ("write_after_two_reads", "shared_store of byte 0 .* several threads have read", reversed_rows),
    ("two_writes", RACE.format("shared_store"), reversed_rows),
    ("write_over_half_a_word", RACE.format("shared_store"), reversed_rows),
    ("copy_from_misaligned", MISALIGNED.format("copy_async", 4), reversed_rows),
    ("copy_to_misaligned", MISALIGNED.format("copy_async", 8), reversed_rows),
    ("copy_past_row", "copy_async of 16 bytes at " + OUTSIDE.format("in"), reversed_rows),
    ("copy_not_waited_for", "thread 63: shared_load of " + UNARRIVED, reversed_rows),
    ("copy_not_committed", "thread 63: shared_load of " + UNARRIVED, reversed_rows),
    ("copy_of_another_thread", RACE.format("shared_load"), reversed_rows),
    ("copy_of_another_block", "block 2, .* byte .*, which nothing has written", reversed_rows),
    ("store_under_copy", "shared_store of " + UNARRIVED, reversed_rows),
    ("copy_over_read", "copy_async of byte .*, which thread 63 has read since", reversed_rows),
    ("ring_waits_for_too_few", "thread 0: shared_load of " + UNARRIVED, copied),
    ("peer_outside", "peer_load: expected a rank below 2, got 2", swapped_rows),
    ("peer_past_end", "peer_load of 4 bytes at byte 256 of shared memory", swapped_rows),
    (
        "peer_unwritten",
        "block 2, .* peer_load of byte 0 of .* of block 3, which nothing has written",
        swapped_rows,
    ),
    (
        "peer_after_block_barrier",
        "peer_load of byte .*, to which thread .* has written since the last sync_cluster",
        swapped_rows,
    ),
    (
        "write_after_peer",
        "shared_store of byte .*, which another block has read since the last sync_cluster",
        swapped_rows,
    ),
    ("peer_has_ended", "block 3, .* peer_load from block 2, which has ended", swapped_rows),
    ("peer_may_have_ended", "block 2, .* the block ends, and another one has read", swapped_rows),
]


@pytest.mark.parametrize(
    ("name", "message", "expected"), FAULTS, ids=[fault[0] for fault in FAULTS]
)
def test_fault_is_found(
    machine: ctypes.CDLL, name: str, message: str, expected: Callable[[Tensor], Tensor]
) -> None:
    """And its twin passes after it, so that no fault outlives its launch."""
    x, out = matrices()
    said = machine.run_case(name.encode(), True, pointer(x), pointer(out))
    assert said is not None, "the fault was not found"
    assert re.search(message, said.decode())
    x, out = matrices()
    assert machine.run_case(name.encode(), False, pointer(x), pointer(out)) is None
    assert torch.equal(out, expected(x))


def test_every_planted_fault_is_tried(machine: ctypes.CDLL) -> None:
    assert machine.count_of_cases() == len({name for name, _, _ in FAULTS})


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ((4, 48, 0, 1), "expected threads to be a multiple of 32 up to 1024, got 48"),
        ((4, 0, 0, 1), "expected threads to be a multiple of 32 up to 1024, got 0"),
        ((4, 1056, 0, 1), "expected threads to be a multiple of 32 up to 1024, got 1056"),
        ((4, 64, 0, 3), "expected whole clusters of 3, got 4 blocks"),
        ((0, 64, 0, 1), "expected whole clusters of 1, got 0 blocks"),
        ((4, 64, 0, 16), "expected a cluster of 1 to 8 blocks, got 16"),
        ((4, 64, 232449, 1), "expected at most 232448 bytes of shared memory, got 232449"),
    ],
)
def test_impossible_launch(
    machine: ctypes.CDLL, launch: tuple[int, int, int, int], message: str
) -> None:
    x, out = matrices()
    blocks, *how = launch
    said = machine.run_copy(ctypes.c_int64(blocks), *how, False, pointer(x), pointer(out))
    assert said is not None
    assert said.decode() == f"launch: {message}"
    assert out.isnan().all()


@pytest.mark.parametrize("launch", [(4, 64, 232448, 1), (4, 64, 0, 4)])
def test_largest_launch(machine: ctypes.CDLL, launch: tuple[int, int, int, int]) -> None:
    x, out = matrices()
    blocks, *how = launch
    assert machine.run_copy(ctypes.c_int64(blocks), *how, False, pointer(x), pointer(out)) is None
    assert torch.equal(out, x)


@pytest.mark.parametrize(
    ("shared_bytes", "cluster", "dependent", "message"),
    [
        (166913, 1, False, "expected at most 166912 bytes of shared memory, got 166913"),
        (0, 2, False, "expected a plain launch on a device without clusters"),
        (0, 1, True, "expected a plain launch on a device without clusters"),
    ],
)
def test_launch_on_a_device_without_clusters(
    machine: ctypes.CDLL, shared_bytes: int, cluster: int, dependent: bool, message: str
) -> None:
    machine.simt_device(3, 164, False)
    x, out = matrices()
    four = ctypes.c_int64(4)
    said = machine.run_copy(four, 64, shared_bytes, cluster, dependent, pointer(x), pointer(out))
    assert said is not None
    assert said.decode() == f"launch: {message}"
    assert machine.run_copy(four, 64, 166912, 1, False, pointer(x), pointer(out)) is None


def test_load_of_what_the_kernel_before_writes(machine: ctypes.CDLL) -> None:
    """Only load_partial sees it where the second kernel may start before the first has ended."""
    x, between = matrices()
    _, out = matrices()
    four = ctypes.c_int64(4)

    def copy(of: Tensor, to: Tensor, dependent: bool) -> bytes | None:
        return machine.run_copy(four, 64, 0, 1, dependent, pointer(of), pointer(to))

    assert copy(x, between, False) is None
    said = copy(between, out, True)
    assert said is not None
    assert said.decode().endswith(
        "load of out, which the kernel before writes: expected load_partial"
    )
    assert copy(x, between, False) is None
    assert machine.run_case(b"load_partial_too_soon", False, pointer(between), pointer(out)) is None
    assert torch.equal(out, x)
    assert copy(x, between, True) is None


@pytest.mark.parametrize("device", [(228, True), (164, False), (100, False), (100, True)])
def test_processors(machine: ctypes.CDLL, device: tuple[int, bool]) -> None:
    kilobytes, have_clusters = device
    machine.simt_device(5, kilobytes, have_clusters)
    found = ctypes.c_int(), ctypes.c_int(), ctypes.c_bool()
    machine.find_processors(*map(ctypes.byref, found))
    assert [value.value for value in found] == [5, kilobytes * 1024, have_clusters]


def test_fresh_shared_memory_is_poisoned(machine: ctypes.CDLL) -> None:
    """Also for who reads it past the checks."""
    out = torch.zeros(64)
    assert machine.run_fresh_shared(pointer(out)) is None
    assert out.isnan().all()


@pytest.mark.parametrize("mask", range(32))
def test_shuffle(machine: ctypes.CDLL, mask: int) -> None:
    x, out = torch.randn(128), torch.empty(128)
    assert machine.run_shuffle(pointer(x), pointer(out), ctypes.c_int64(128), mask) is None
    assert torch.equal(out, x[torch.arange(128) ^ mask])


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_sum_over_a_cluster(machine: ctypes.CDLL, cluster: int) -> None:
    """Of the largest blocks, through shuffles, shared memory and that of the other blocks."""
    x = torch.randint(-100, 100, (16 // cluster, cluster * 1024)).float()
    out = torch.empty_like(x)
    length = ctypes.c_int64(x.numel())
    assert machine.run_cluster_sum(pointer(x), pointer(out), length, cluster) is None
    assert torch.equal(out, x.sum(1, keepdim=True).expand_as(x))


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unpack(machine: ctypes.CDLL, dtype: torch.dtype) -> None:
    values = every_pattern(dtype)
    floats = torch.empty(values.numel())
    machine.unpack_words(
        dtype == torch.bfloat16, pointer(values), pointer(floats), values.numel() // 2
    )
    torch.testing.assert_close(floats, values.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(floats.signbit(), values.float().signbit())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pack(machine: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Every number there is, those half way between two of them, and what lies beside these."""
    ordered = every_pattern(dtype).float()
    ordered = ordered[ordered.isfinite()].double().unique()
    half_way = ((ordered[1:] + ordered[:-1]) / 2).float()
    inf = torch.tensor(float("inf"))
    beyond = torch.tensor([65519.996, 65520, 65536, 1e30, 3.3895314e38, 3.4e38, float("inf")])
    floats = torch.cat(
        [
            ordered.float(),
            half_way,
            torch.nextafter(half_way, inf),
            torch.nextafter(half_way, -inf),
            beyond,
            -beyond,
            torch.tensor([0.0, -0.0, float("nan"), 1e-45, -1e-45]),
            torch.randn(2**16),
            torch.randint(-(2**31), 2**31, (2**18,)).to(torch.int32).view(torch.float32),
        ]
    )
    floats = floats[: floats.numel() // 2 * 2]
    packed = torch.empty(floats.numel(), dtype=dtype)
    machine.pack_words(
        dtype == torch.bfloat16, pointer(floats), pointer(packed), floats.numel() // 2
    )
    expected = floats.to(dtype)
    assert torch.equal(packed.isnan(), expected.isnan())
    there = ~expected.isnan()
    assert torch.equal(packed.view(torch.int16)[there], expected.view(torch.int16)[there])
    assert (packed.view(torch.int16)[~there] == 0x7FFF).all()


def interface(header: Path) -> set[str]:
    """The functions and the structs that a header gives to kernels and their launchers."""
    text = header.read_text()
    text = re.sub(r"namespace simt \{.*?\}  // namespace simt", "", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text[text.index("namespace fusednorm::cuda {") :])
    multiline = re.MULTILINE | re.DOTALL
    function = r"^(?:template <>\n)?(?:DEVICE|inline|const char\*).*?\)"
    functions = [one for one in re.findall(function, text, multiline) if "<>" not in one]
    structs = re.findall(r"^struct .*?\};", text, multiline)
    return {" ".join(one.split()) for one in functions + structs}


def test_interface_is_that_of_a_gpu() -> None:
    gpu, host = interface(CSRC / "cuda" / "gpu" / "device.h"), interface(SIMT / "device.h")
    assert {one for one in gpu - host if not re.search("cuda[A-Z]", one)} == set()
    assert {one for one in host - gpu if "struct Buffer" not in one} == set()
