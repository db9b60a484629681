"""Clocks, loops and rounds: how long a call takes, without knowing what it calls.

A contestant is a name and a function that returns the seconds of one call, measured once. Rounds
interleave the contestants in changing order, so that what drifts drifts for all of them.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
Clock = Callable[[], float]
Measure = Callable[[], Mapping[str, float]]
"""Returns seconds of one call by the name of what was measured."""

WARM_UP = 0.5
"""Seconds of copying before the first round, so that clocks have settled."""

CACHES = 3
"""Rotating inputs fill this many times the last cache of a GPU."""


def interleave(
    contestants: Mapping[str, Measure], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Measure every contestant once a round, each round in another order.

    Rotation alone would leave everybody the same predecessor, whose cache is what they begin with.

    Returns:
        For each contestant, for each thing that it measures, the seconds of the rounds.
    """
    names = list(contestants)
    results: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        others = names[:first] + names[first + 1 :]
        for name in [names[first], *random.Random(turn).sample(others, len(others))]:
            for what, seconds in contestants[name]().items():
                results[name].setdefault(what, []).append(seconds)
    return results


def spread(rounds: Sequence[float]) -> float:
    """Return half of the interquartile range, as a share of the median."""
    if len(rounds) < 2:
        return 0.0
    low, _, high = quantiles(rounds, n=4, method="inclusive")
    return (high - low) / 2 / median(rounds)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Return ours / theirs, the median over rounds, and its spread.

    Two contestants of one round saw the same machine, so that their ratio is steadier than either.
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return median(ratios), spread(ratios)


def calls_within(call: Call, seconds: float, most: int, clock: Clock = time.perf_counter) -> int:
    """Return how many calls fit into `seconds`, at least one and at most `most`."""
    start = clock()
    call()
    return max(1, min(most, int(seconds / max(clock() - start, 1e-9))))


def loop_seconds(
    call: Call, calls: int, settle: Call = lambda: None, clock: Clock = time.perf_counter
) -> float:
    """Return the mean of a tight loop that ends when the device has: host time included."""
    settle()
    start = clock()
    for _ in range(calls):
        call()
    settle()
    return (clock() - start) / calls


def median_seconds(call: Call, calls: int, clock: Clock = time.perf_counter) -> float:
    """Return the median of single calls: on a CPU shared with others, a mean measures them too."""
    seconds = []
    for _ in range(calls):
        start = clock()
        call()
        seconds.append(clock() - start)
    return median(seconds)


def in_turn(calls: Sequence[Call]) -> Call:
    """Return a call of the next of `calls`, whose results live until its next turn.

    Results that nobody keeps all land in the block that the last ones left, which stays in the
    cache: writing would cost nothing at sizes near it. Kept, they rotate with the inputs.
    """
    kept: list[Any] = [None] * len(calls)
    turns = itertools.cycle(range(len(calls)))

    def call() -> Any:
        turn = next(turns)
        kept[turn] = None
        kept[turn] = calls[turn]()
        return kept[turn]

    return call


def graph_seconds(calls: Sequence[Call], stream: torch.cuda.Stream, replays: int) -> Measure:
    """Capture the calls, one for each set of inputs, and return what times their replay.

    The inputs of one call have left the cache by the time the next replay reads them again, and so
    have the lines that it writes.
    """
    graph = torch.cuda.CUDAGraph()
    call = in_turn(calls)
    with torch.cuda.graph(graph, stream=stream):
        for _ in calls:
            call()

    def measure() -> dict[str, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return {"device": start.elapsed_time(end) / 1e3 / replays / len(calls)}

    return measure


def do_bench_seconds(call: Call) -> dict[str, float]:
    """Return the median of Triton's benchmark of the call, the figure that is usually quoted."""
    from triton.testing import do_bench

    return {"do_bench": do_bench(call, warmup=5, rep=20, return_mode="median") / 1e3}


def copy_call(size: int, device: torch.device, chunk: int) -> Call:
    """Return a call that copies `size` / 2 bytes to fresh memory, and so moves `size`.

    Args:
        size: Bytes read and written.
        device: Where.
        chunk: Bytes of one copy at most. Fresh memory of another size than that of the outputs of a
            norm would not cost the same: from some size on it comes from the system each time.
    """
    whole, rest = divmod(max(4, size // 2), chunk)
    lengths = [chunk // 4] * whole + ([rest // 4] if rest >= 4 else [])
    sources = [torch.randn(length, device=device) for length in lengths]
    if len(sources) == 1:
        return sources[0].clone

    def clone() -> None:
        for source in sources:
            source.clone()

    return clone


LARGE = {"cuda": 8 << 30, "cpu": 512 << 20}
"""Bytes that a copy moves so that no cache matters."""


def large_copy(device: torch.device, share: int = 1) -> tuple[Call, Tensor, Tensor]:
    """Return a copy that moves `LARGE` / `share` bytes, its source and its target."""
    source, target = (torch.ones(LARGE[device.type] // share // 8, device=device) for _ in range(2))
    return (lambda: target.copy_(source)), source, target


def settle(device: torch.device) -> Call:
    """Return what waits until the device has done what it was told."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def asymptotic_bandwidth(device: torch.device) -> float:
    """Return the bytes a second of a copy much larger than any cache, the best of several."""
    call, *_ = large_copy(device)
    call()
    return LARGE[device.type] / min(loop_seconds(call, 1, settle(device)) for _ in range(9))


def warm_up(device: torch.device) -> None:
    """Copy until the clocks have settled."""
    call, wait = copy_call(64 << 20, device, 64 << 20), settle(device)
    end = time.perf_counter() + WARM_UP
    while time.perf_counter() < end:
        call()
        wait()


def input_sets(size: int, device: torch.device) -> int:
    """Return how many sets of inputs of a call that moves `size` bytes outgrow the cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(200, -(-CACHES * cache // size)))
