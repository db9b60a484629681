"""Check and time every provider on every case."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from . import results, text, timing
from .cases import DTYPES, Case, Inputs, draw, floor_bytes, wrong
from .providers import Provider
from .timing import Call, Measure

COPY = "copy"
"""The yardstick: it moves the bytes of the case's floor."""


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        rounds: Interleaved rounds of a case.
        seconds: About what one contestant takes in one round.
        calls: Calls that it makes at most in that time.
        clock: What tells the time on a CPU: the wall's, or that of the process.
    """

    rounds: int
    seconds: float
    calls: int = 200
    clock: timing.Clock = time.perf_counter


def settings_for(device: torch.device, clock: str = "wall") -> Settings:
    """Return the default settings: more rounds where other programs share the processor.

    Raises:
        ValueError: The time of the process cannot be used: it adds up the time of all threads.
    """
    if clock == "process":
        if device.type != "cpu" or torch.get_num_threads() != 1:
            raise ValueError("--clock process: expected --device cpu and --threads 1")
        return Settings(11, 0.015, clock=time.process_time)
    return Settings(5, 0.02) if device.type == "cuda" else Settings(11, 0.015)


def measure(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    device: torch.device,
    settings: Settings,
    seed: int = 0,
    progress: bool = True,
    seconds: float | None = None,
) -> Iterator[list[results.Cell]]:
    """Yield the cells of each case as it gets done: one for each provider, and the yardstick's.

    After `seconds` no further case begins.
    """
    end = math.inf if seconds is None else time.monotonic() + seconds
    generator = torch.Generator(device).manual_seed(seed)
    timing.warm_up(device)
    for case in text.progress(cases, "case") if progress else cases:
        if time.monotonic() > end:
            return
        yield _measure_case(case, providers, device, settings, generator)


def _measure_case(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    settings: Settings,
    generator: torch.Generator,
) -> list[results.Cell]:
    # All contestants read the same memory: where its pages lie makes a difference of its own.
    sets = timing.input_sets(floor_bytes(case), device)
    inputs = [draw(case, device, generator) for _ in range(sets)]
    cells = {COPY: _cell(case, COPY, device)}
    contestants: dict[str, Measure] = {COPY: _copy(case, device, settings, sets)}
    for provider in providers:
        provider.new_case()
    for provider in providers:
        if case.norm not in provider.norms or not provider.serves(case):
            continue
        cells[provider.name] = cell = _cell(case, provider.name, device)
        try:
            with provider.scope(), _recording(case):
                fresh = draw(case, device, generator)
                cell["note"] = check(case, provider, fresh)
                cell["status"] = "wrong" if cell["note"] else "ok"
                if not cell["note"]:
                    cell["note"] = provider.ran(case, fresh)
                    contestants[provider.name] = contestant(case, provider, inputs, settings)
        except Exception as error:  # a peer may fail in any way; the others go on
            cell["status"] = "failed"
            cell["note"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            contestants.pop(provider.name, None)
    if device.type == "cuda":
        timing.warm_up(device)
    for name, seconds in timing.interleave(contestants, settings.rounds).items():
        cells[name]["seconds"] = seconds
    return list(cells.values())


def _cell(case: Case, provider: str, device: torch.device) -> results.Cell:
    return {
        **asdict(case),
        "threads": threads_of(device),
        "bytes": floor_bytes(case),
        "provider": provider,
        "status": "ok",
        "note": "",
        "seconds": {},
    }


def threads_of(device: torch.device) -> int:
    """Return the threads that a case is computed with; 0 on a GPU."""
    return torch.get_num_threads() if device.type == "cpu" else 0


def _recording(case: Case) -> AbstractContextManager[object]:
    return torch.no_grad() if case.phase == "inference" else contextlib.nullcontext()


def check(case: Case, provider: Provider, inputs: Inputs) -> str:
    """Return what is wrong with a provider's results on these inputs, or nothing."""
    outputs = provider.norms[case.norm](case, inputs)()
    grads: Sequence[Tensor] = ()
    if case.phase != "inference":
        grads = torch.autograd.grad(outputs, inputs.leaves, inputs.grads)
    return wrong(case, inputs, outputs, list(grads))


def calls_of(case: Case, provider: Provider, inputs: Sequence[Inputs]) -> list[Call]:
    """Return what is timed of a phase, for each set of inputs."""

    def call(each: Inputs) -> Call:
        forward = provider.norms[case.norm](case, each)
        if case.phase == "both":
            return lambda: torch.autograd.grad(forward(), each.leaves, each.grads)
        if case.phase != "backward":
            return forward
        outputs = forward()
        return lambda: torch.autograd.grad(outputs, each.leaves, each.grads, retain_graph=True)

    return [call(each) for each in inputs]


def contestant(
    case: Case, provider: Provider, inputs: Sequence[Inputs], settings: Settings
) -> Measure:
    """Return what measures a provider on a case, in rotation over sets of inputs."""
    measure = _measure(lambda: calls_of(case, provider, inputs), inputs[0].x.device, settings)

    def in_scope() -> dict[str, float]:
        with provider.scope(), _recording(case):
            return dict(measure())

    return in_scope


def _copy(case: Case, device: torch.device, settings: Settings, sets: int) -> Measure:
    size = floor_bytes(case)
    chunk = case.rows * case.cols * DTYPES[case.dtype].itemsize if device.type == "cpu" else size
    return _measure(
        lambda: [timing.copy_call(size, device, chunk) for _ in range(sets)], device, settings
    )


def _measure(make: Callable[[], list[Call]], device: torch.device, settings: Settings) -> Measure:
    """Return what measures calls in turn; they are made on the stream that they are timed on."""
    if device.type == "cuda":
        return _cuda_measure(make, torch.cuda.Stream(device), settings)
    call = timing.in_turn(make())
    call()
    count = timing.calls_within(call, settings.seconds, settings.calls, settings.clock)
    return lambda: {"eager": timing.median_seconds(call, count, settings.clock)}


def _cuda_measure(
    make: Callable[[], list[Call]], stream: torch.cuda.Stream, settings: Settings
) -> Measure:
    # Autograd runs a backward on the stream of its forward, so the capture needs both on one.
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        calls = make()
        call = timing.in_turn(calls)
        for _ in range(2 * len(calls)):
            call()
        stream.synchronize()
        once = timing.loop_seconds(call, 3, stream.synchronize)
        count = max(1, min(settings.calls, int(settings.seconds / once)))
        replays = max(1, min(settings.calls, int(settings.seconds / once / len(calls))))
        device = timing.graph_seconds(calls, stream, replays)

    def measure() -> dict[str, float]:
        with torch.cuda.stream(stream):
            eager = timing.loop_seconds(call, count, stream.synchronize)
            return {**device(), "eager": eager, **timing.do_bench_seconds(calls[0])}

    return measure


def asymptote(device: torch.device) -> float:
    """Return the copy bandwidth that no case can exceed, in GB/s."""
    return timing.asymptotic_bandwidth(device) / 1e9
