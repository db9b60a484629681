"""What a GPU is expected to make of a kernel: a model that no measurement has corrected yet.

The time of a launch is the longest of three: what the memory takes for its bytes, what the
schedulers take for its instructions, and what the busiest place of a processor takes for its
programs and their tiles, one after the other. Every assumption is a constant of this file; a
first table of measured times says which of them to change.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Gpu(NamedTuple):
    """A device.

    Attributes:
        groups: Processors of each group; a cluster of programs lies within one group.
        clock: Of a processor, in Hz.
        copy: Bytes that a copy moves in a second, read and written: 90 % of the published peak.
        cache: Bytes of L2.
    """

    groups: tuple[int, ...]
    clock: float
    copy: float
    cache: float

    @property
    def processors(self) -> int:
        """Return the processors of all groups."""
        return sum(self.groups)


_HOPPER = (16, 16, 16, 16, 16, 16, 18, 18)
GPUS = {
    "sm_80": {"A100": Gpu((16, 16, 16, 16, 16, 14, 14), 1.41e9, 1.84e12, 40e6)},
    "sm_90": {
        "H100": Gpu(_HOPPER, 1.755e9, 3.0e12, 50e6),
        "H200": Gpu(_HOPPER, 1.755e9, 4.3e12, 60e6),
    },
    "sm_100": {"B200": Gpu((18, 18, 18, 18, 18, 18, 20, 20), 1.85e9, 7.2e12, 126e6)},
}

SCHEDULERS = 4
"""Of a processor; each issues one instruction of a warp in a clock."""

CLOCKS_ALONE = 2.8
"""Clocks from one instruction of a warp to its next where no other warp hides dependencies."""

LATENCY = 1000
"""Clocks from a load to its data under load."""

CACHED_LATENCY = 300
"""Clocks from a load to its data in L2."""

START = 350
"""Clocks from the end of a program to the first instruction of the next in its place."""

RESERVED_BYTES = 1024
"""Shared memory that CUDA keeps of every program, and of which a processor has one share more."""


def resident_programs(entry: dict[str, Any]) -> int:
    """Return how many programs fit on a processor by what they really use."""
    # A warp's registers come in units of 256 from one of four files of 16384; 64 warps fit, and 32
    # programs.
    warp_registers = -(-entry["registers"] // 8) * 8 * 32
    warps = min(64, 4 * (16384 // warp_registers))
    by_shared = (entry["shared_limit"] + RESERVED_BYTES) // (entry["shared"] + RESERVED_BYTES)
    return int(min(32, warps // entry["num_warps"], by_shared))


def places(gpu: Gpu, programs: int, cluster: int) -> int:
    """Return how many programs are resident on a device.

    Args:
        gpu: The device.
        programs: Programs that fit on a processor.
        cluster: Processors that each of them spans.
    """
    return sum(group * programs // cluster for group in gpu.groups)


def occupancy(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what NVIDIA's processors have of a kernel: programs, bytes, instructions, seconds."""
    constants, warps = entry["constants"], entry["num_warps"]
    fit = resident_programs(entry)
    working = min(fit, entry["counted"]) if entry["counted"] else fit
    walks = constants.get("LOOPED") == 1 or "sums" in entry["kernel"]
    rows, chunks = constants.get("ROWS", 1), 1 if walks else constants.get("CHUNKS", 1)
    lanes = chunks * constants.get("BLOCK_N", constants.get("COLS"))
    pieces = walks or constants.get("FORM") == "split"
    cols = min(lanes, entry["cols"]) if pieces else entry["cols"]
    # Copies of fewer than four bytes are not asynchronous, so nothing is fetched ahead.
    ahead = constants.get("NUM_STAGES", 1) - 1 if "LDGSTS" in entry["machine"] else 0
    per_thread = rows * lanes / (warps * 32 * entry["cluster"])
    again = constants.get("FORM") == "reload" or constants.get("LOOPED") == 1
    floor = entry["reads"] + entry["writes"]
    found: dict[str, Any] = {
        "programs": fit,
        "in_flight": working * max(1, ahead) * rows * cols * entry["reads"] // entry["cluster"],
        "instructions_per_element": entry["instructions"] / per_thread * lanes / cols,
        "floor_bytes": floor,
        "moved_bytes": floor + (entry["reads"] if again else 0),
    }
    if not floor:
        return found
    gpus = GPUS[entry["arch"]]
    found["seconds"] = {
        name: _seconds(entry, gpu, working, rows * cols, walks, ahead, found["moved_bytes"])
        for name, gpu in gpus.items()
    }
    return found


def _seconds(
    entry: dict[str, Any],
    gpu: Gpu,
    programs: int,
    elements: int,
    walks: bool,
    ahead: int,
    moved: int,
) -> dict[str, float]:
    """Return the seconds that each limit asks for.

    Args:
        entry: The kernel, and the size of its launch.
        gpu: The device.
        programs: Programs that share a processor.
        elements: Of a tile.
        walks: Whether a program takes its tiles without a barrier between them.
        ahead: Tiles that are fetched while one is worked on.
        moved: Bytes of an element that are read, again where twice, and written.
    """
    cluster, floor = entry["cluster"], entry["reads"] + entry["writes"]
    again = moved > floor
    live = places(gpu, programs, cluster) * entry["cols"] * entry["reads"]
    if walks and again and live > gpu.cache:
        floor = moved  # the second walk finds its row gone
    issue = entry["instructions"] * entry["num_warps"] / SCHEDULERS  # clocks of a tile
    alone = entry["instructions"] * CLOCKS_ALONE
    memory = elements * floor / cluster / (gpu.copy / gpu.processors / gpu.clock)
    wait = LATENCY + (CACHED_LATENCY if walks and again else 0)
    # Of a lone program half of the work is done while its data move. What a barrier follows waits
    # for the last of its loads; the warps of a walk do not wait for each other.
    if walks:
        tile = math.hypot(memory, max(issue, wait + alone))
    elif ahead:
        tile = max(math.hypot(memory, max(issue, alone)), (wait + memory) / ahead)
    else:
        wait += 0 if entry["counted"] else START
        tile = wait + math.hypot(memory, max(issue, alone))
    grid = entry["grid"]
    rounds = -(-grid // places(gpu, programs, cluster)) * -(-entry["elements"] // (elements * grid))
    tiles = entry["elements"] / elements
    return {
        "memory": entry["elements"] * floor / gpu.copy,
        "issue slots": tiles * issue * cluster / gpu.processors / gpu.clock,
        "waiting": rounds * tile / gpu.clock,
    }


def predictions(launches: list[dict[str, Any]]) -> dict[str, tuple[float, str]]:
    """Return by GPU the share of a copy's speed that a call reaches, and what holds it up.

    Args:
        launches: The kernels of the call. The last one moves what the call has to move.
    """
    last = launches[-1]
    found: dict[str, tuple[float, str]] = {}
    for name, gpu in GPUS[last["arch"]].items():
        floor = last["elements"] * last["floor_bytes"] / gpu.copy
        time = sum(max(launch["seconds"][name].values()) for launch in launches)
        limits = last["seconds"][name]
        found[name] = floor / time, max(limits, key=lambda limit: limits[limit])
    return found
