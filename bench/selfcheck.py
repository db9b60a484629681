"""Can the harness be trusted: planted faults that it has to show, and an independent copy."""

from __future__ import annotations

import ctypes
import math
import time
from dataclasses import replace
from statistics import median

import torch

from . import timing
from .cases import EPS, Case, Inputs
from .measure import COPY, Settings, measure
from .providers import Forward, Norm, Provider, bind, find

CASES = {
    "cpu": Case("layer_norm/forward", 4096, 1024, "float32", "float32"),
    # Long enough for a tenth of it to be much longer than the launch of a kernel.
    "cuda": Case("layer_norm/forward", 65536, 4096, "float32", "float32"),
}
COPIES = 151
ROUNDS = {"cpu": 301, "cuda": 51}
"""Rounds of the large copies, and of the norms. What disturbs a processor for a while disturbs the
contestants of a short round alike."""

DELAY = 0.10
PLACEMENT = 0.01
"""How far equal contestants may be apart: their outputs lie at different places."""

AGREE = 0.10
"""How far two copies of the same memory by different code may be apart: 2 to 10 % were measured,
the more the busier the memory (NOTES.md)."""


def delayed(norm: Norm, share: float, clock: timing.Clock = time.perf_counter) -> Norm:
    """Return a norm whose every call takes `share` longer: it waits for that part of itself."""

    def bound(case: Case, inputs: Inputs) -> Forward:
        forward = norm(case, inputs)
        if inputs.x.is_cuda:
            wait = _sleep(forward, share)

            def on_device() -> tuple[torch.Tensor, ...]:
                outputs = forward()
                wait()
                return outputs

            return on_device

        def call() -> tuple[torch.Tensor, ...]:
            start = clock()
            outputs = forward()
            end = clock()
            end += share * (end - start)
            while clock() < end:
                pass
            return outputs

        return call

    return bound


def _sleep(call: timing.Call, share: float) -> timing.Call:
    """Return what keeps a GPU waiting for `share` of the time of a call; a graph can record it."""

    def milliseconds(call: timing.Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 20

    cycles = 1_000_000
    for _ in range(2):  # the first time warms up
        rate = cycles / milliseconds(lambda: torch.cuda._sleep(cycles))
        wait = int(rate * share * milliseconds(call))
    return lambda: torch.cuda._sleep(wait)


def wrong_mean(inputs: Inputs, case: Case) -> torch.Tensor:
    """Return a layer norm whose mean is one percent off."""
    x = inputs.x
    shifted = x - 1.01 * x.mean(-1, keepdim=True)
    z = shifted * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS)
    assert inputs.weight is not None
    return torch.addcmul(inputs.bias, z, inputs.weight) if inputs.bias is not None else z


def uncertainty(noise: float, rounds: int) -> float:
    """Return three standard errors of a median, by half the interquartile range of the rounds."""
    return 3 * 1.2533 * noise / 0.6745 / math.sqrt(rounds)


def copies(device: torch.device, settings: Settings) -> dict[str, tuple[float, float]]:
    """Return the speed of other copies over that of the yardstick's large copy, and the spread.

    They copy the same memory: where its pages lie, and how large they are, counts for ten percent.
    On a CPU one thread copies, and the other copy is the C library's; on a GPU, where torch calls
    the driver's copy, it is a kernel that changes the sign on the way.
    """
    # Short enough for many rounds, and no cache holds it.
    copy, source, target = timing.large_copy(device, 4)
    size, wait = timing.LARGE[device.type] // 4, timing.settle(device)
    calls: dict[str, timing.Call] = {"yardstick": copy}
    if device.type == "cuda":
        calls["a kernel"] = lambda: torch.neg(source, out=target)
    else:
        places = target.data_ptr(), source.data_ptr(), size // 2
        calls["memmove"] = lambda: ctypes.memmove(*places)

    def contestant(call: timing.Call) -> timing.Measure:
        return lambda: {"copy": timing.loop_seconds(call, 1, wait, settings.clock)}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = timing.interleave({name: contestant(call) for name, call in calls.items()}, COPIES)
    torch.set_num_threads(threads)
    ours = found.pop("yardstick")["copy"]
    print(f"large copy   {size / median(ours) / 1e9:.1f} GB/s, the yardstick's")
    return {name: timing.ratio(ours, other["copy"]) for name, other in found.items()}


def planted(torch_provider: Provider, clock: timing.Clock = time.perf_counter) -> list[Provider]:
    """Return torch twice, torch with a delay, and a layer norm with a wrong mean."""
    norm = torch_provider.norms["layer_norm"]
    return [
        torch_provider,
        replace(torch_provider, name="torch again"),
        replace(torch_provider, name="delayed", norms={"layer_norm": delayed(norm, DELAY, clock)}),
        replace(torch_provider, name="wrong mean", norms={"layer_norm": bind(wrong_mean)}),
    ]


def run(device: torch.device, settings: Settings) -> bool:
    """Print what the harness says about the planted faults; return whether it saw them."""
    (torch_provider,), _ = find(["torch"], device)
    contestants = planted(torch_provider, settings.clock)
    (found,) = measure([CASES[device.type]], contestants, device, settings)
    cells = {cell["provider"]: cell for cell in found}
    what = "device" if device.type == "cuda" else "eager"
    base = cells["torch"]["seconds"][what]
    passed = []
    for name, expected in (("torch again", 1.0), ("delayed", 1 + DELAY)):
        factor, noise = timing.ratio(cells[name]["seconds"][what], base)
        error = uncertainty(noise, len(base))
        verdict = abs(factor - expected) <= min(max(error, PLACEMENT), DELAY / 2)
        passed.append(verdict)
        print(
            f"{name:12} {factor:.3f}x torch, expected {expected:.2f}x, spread {noise:.1%}, "
            f"of the median {error:.1%}: {'ok' if verdict else 'FAILED'}"
        )
    wrong = cells["wrong mean"]
    refused = wrong["status"] == "wrong" and not wrong["seconds"]
    passed.append(refused)
    print(f"wrong mean   {wrong['note']}: {'refused' if refused else 'FAILED'}")
    copied = cells[COPY]["bytes"] / median(cells[COPY]["seconds"][what]) / 1e9
    print(f"copy         {copied:.1f} GB/s of the case's bytes")
    for name, (factor, noise) in copies(device, settings).items():
        error = uncertainty(noise, COPIES)
        agree = abs(factor - 1) <= AGREE + error
        passed.append(agree)
        print(
            f"{name:12} {factor:.3f}x its speed, spread {noise:.1%}, of the median {error:.1%}: "
            f"{'ok' if agree else 'FAILED'}"
        )
    return all(passed)
