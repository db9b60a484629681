"""Search the launch policy on a real device and propose it as a diff of config.py.

The policy is a ladder of tiers for each direction and element size. For every N each candidate is
checked against float64 and timed in interleaved rounds through the public API; a spill costs it
its place. Nothing is tuned at run time: what wins is for a person to read and to commit.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from fusednorm.triton_kernels import config
from fusednorm.triton_kernels.config import Architecture, backward_config, forward_config

from . import text, timing
from .cases import DTYPES, Case, draw, floor_bytes
from .measure import Settings, check, contestant
from .providers import find

CANDIDATES = tuple((per_thread, rows) for per_thread in (8, 16, 32, 64) for rows in (1, 2, 4))

GAIN = 0.02
"""A rung changes for at least this gain, and for more than the spread."""

BYTES = {"cuda": 128 << 20, "cpu": 1 << 12}
"""Bytes of x: enough for every processor to reach its steady state. On a CPU, in Triton's
interpreter, the search shows that it runs, and nothing about speed."""

Share = tuple[int, int]
"""Elements and rows of a thread."""


class Where(NamedTuple):
    """A ladder of the policy."""

    direction: str
    itemsize: int


H100 = Architecture(32, 132, 232448, 65536)
COLS = (
    *(64, 96, 128, 256, 257, 384, 512, 768, 769, 1000, 1024, 1025, 1280, 1536, 2048, 2560, 3000),
    *(3072, 4096, 5120, 6144, 7168, 7680, 8192, 8193, 10240, 12288, 14336, 16384, 20480, 24576),
    32768,
)
_TIERS = {"forward": config.FORWARD_TIERS, "backward": config.BACKWARD_TIERS}


def resident_rungs(direction: str, itemsize: int) -> list[int]:
    """Return the last common N of each tile whose rows stay on chip: a tier decides about those."""
    limit = _TIERS[direction][itemsize][-1].limit
    return list({tile(direction, itemsize, n): n for n in COLS if n <= limit}.values())


def tile(direction: str, itemsize: int, cols: int) -> config.RowTile:
    """Return the tile that the policy chooses for an N."""
    if direction == "forward":
        return forward_config(cols, itemsize, H100).tile
    return backward_config(cols, itemsize, H100, 2 * itemsize).tile


def tier(direction: str, itemsize: int, cols: int) -> Share:
    """Return the elements and rows of a thread that the policy chooses for an N."""
    found = next(tier for tier in _TIERS[direction][itemsize] if cols <= tier.limit)
    return found.per_thread, found.rows_per_thread


@contextlib.contextmanager
def forced_tier(direction: str, itemsize: int, share: Share) -> Iterator[None]:
    """Give every row that stays on chip the same elements and rows of a thread."""
    tiers = _TIERS[direction]
    kept = tiers[itemsize]
    tiers[itemsize] = (config.Tier(kept[-1].limit, *share),)
    forward_config.cache_clear()
    backward_config.cache_clear()
    try:
        yield
    finally:
        tiers[itemsize] = kept
        forward_config.cache_clear()
        backward_config.cache_clear()


def policy_text() -> str:
    """Return the source of the launch policy."""
    return Path(config.__file__).read_text(encoding="utf-8")


class Rung(NamedTuple):
    """What was measured at one N."""

    cols: int
    now: Share
    seconds: Mapping[Share, Sequence[float]]


class Choice(NamedTuple):
    """What a rung should be, and why."""

    cols: int
    best: Share
    reason: str


def choose(rung: Rung) -> Choice:
    """Return the fastest candidate of a rung if it is worth a change, else what is there now."""
    times = {candidate: median(rounds) for candidate, rounds in rung.seconds.items()}
    best = min(times, key=times.__getitem__)
    now = times.get(rung.now)
    if now is None:
        return Choice(rung.cols, best, f"N={rung.cols}: {times[best] * 1e6:.1f} us")
    noise = timing.spread(rung.seconds[best]) + timing.spread(rung.seconds[rung.now])
    if times[best] > now * (1 - max(GAIN, noise)):
        return Choice(rung.cols, rung.now, "")
    text = f"N={rung.cols}: {times[best] * 1e6:.1f} us, {now * 1e6:.1f} us before"
    return Choice(rung.cols, best, text)


def ladder(choices: Iterable[Choice]) -> list[tuple[int, int, int, str]]:
    """Return (limit, per thread, rows, reason) of each tier: neighbours that agree become one."""
    tiers: list[tuple[int, int, int, str]] = []
    for choice in sorted(choices):
        reason = choice.reason
        if tiers and tiers[-1][1:3] == choice.best:
            reason = "; ".join(filter(None, (tiers.pop()[3], reason)))
        tiers.append((choice.cols, *choice.best, reason))
    return tiers


def rewrite(
    text: str, direction: str, itemsize: int, tiers: Sequence[tuple[int, int, int, str]]
) -> str:
    """Return config.py with the tiers of a direction and an element size replaced.

    Raises:
        ValueError: The table is not where it is expected.
    """
    lines = text.splitlines()
    try:
        table = next(i for i, line in enumerate(lines) if line.startswith(direction.upper()))
        first = next(i for i in range(table, len(lines)) if lines[i] == f"    {itemsize}: (")
        last = next(i for i in range(first, len(lines)) if lines[i] == "    ),")
    except StopIteration:
        raise ValueError(f"tune: config.py has no {direction} tiers of {itemsize} bytes") from None
    fresh = []
    for limit, per_thread, rows, reason in tiers:
        if reason:
            fresh.append(f"        # {reason}")
        fresh.append(f"        Tier({limit}, {per_thread}, {rows}),")
    return "\n".join([*lines[: first + 1], *fresh, *lines[last:]]) + "\n"


def diff(before: str, after: str) -> str:
    """Return a unified diff of config.py."""
    name = "triton_kernels/config.py"
    lines = (before.splitlines(keepends=True), after.splitlines(keepends=True))
    return "".join(difflib.unified_diff(*lines, f"a/{name}", f"b/{name}"))


def measure_rung(
    where: Where, dtype: str, cols: int, device: torch.device, rounds: int = 5
) -> Rung | None:
    """Time every candidate at one N that runs and is right; None where none is."""
    (provider,), _ = find(["fusednorm-triton"], device)
    rows = max(1, BYTES[device.type] // (cols * where.itemsize))
    case = Case(f"layer_norm/{where.direction}", rows, cols, dtype, dtype, "tune")
    now = tier(*where, cols)
    sets = timing.input_sets(floor_bytes(case), device)
    generator = torch.Generator(device).manual_seed(0)
    inputs = [draw(case, device, generator) for _ in range(sets)]
    contestants: dict[Share, timing.Measure] = {}
    for candidate in different(where, cols, (now, *CANDIDATES)):
        with forced_tier(*where, candidate):
            try:
                with provider.scope():
                    if check(case, provider, draw(case, device, generator)):
                        continue
                    made = contestant(case, provider, inputs, Settings(rounds, 0.01))
            except Exception:  # too many registers or too much shared memory for the device
                continue
        contestants[candidate] = functools.partial(_forced, where, candidate, made)
    if not contestants:
        return None
    named = dict(zip(map(str, contestants), contestants.values(), strict=True))
    found = timing.interleave(named, rounds)
    what = "device" if device.type == "cuda" else "eager"
    return Rung(cols, now, {share: found[str(share)][what] for share in contestants})


def different(where: Where, cols: int, candidates: Iterable[Share]) -> list[Share]:
    """Return the first candidate for each tile that they lead to: many share one."""
    tiles: dict[object, Share] = {}
    for candidate in candidates:
        with forced_tier(*where, candidate):
            tiles.setdefault(tile(*where, cols), candidate)
    return list(tiles.values())


def _forced(where: Where, candidate: Share, measure: timing.Measure) -> Mapping[str, float]:
    with forced_tier(*where, candidate):
        return measure()


def main(
    device: torch.device, dtypes: Sequence[str] | None, direction: str | None, seconds: float
) -> int:
    """Search until the time is up; print the diff.

    Raises:
        ValueError: Triton's kernels do not run on the device.
    """
    if missing := find(["fusednorm-triton"], device)[1]:
        raise ValueError(f"tune: {missing['fusednorm-triton']}")
    before = after = policy_text()
    end = time.monotonic() + seconds
    for dtype in dtypes or ("bfloat16", "float32"):
        for way in (direction,) if direction else ("forward", "backward"):
            where = Where(way, DTYPES[dtype].itemsize)
            columns = resident_rungs(*where)
            choices, measured = [], 0
            for cols in text.progress(columns, f"{way} {dtype} rung"):
                rung = measure_rung(where, dtype, cols, device) if time.monotonic() < end else None
                measured += rung is not None
                # What was not measured stays.
                choices.append(choose(rung) if rung else Choice(cols, tier(*where, cols), ""))
            print(f"tune: measured {measured} of {len(columns)} rungs", file=sys.stderr)
            after = rewrite(after, *where, ladder(choices))
    print(diff(before, after) or "the policy stands: no rung gains more than its spread")
    return 0
