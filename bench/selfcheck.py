"""Can the harness be trusted: planted faults that it has to show, and an independent copy."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from . import timing
from .cases import EPS, Case, Inputs
from .measure import COPY, Settings, measure
from .providers import Forward, Norm, Provider, bind, find

CASE = Case("layer_norm/forward", 4096, 1024, "float32", "float32")
DELAY = 0.10


def delayed(norm: Norm, share: float, clock: timing.Clock = time.perf_counter) -> Norm:
    """Return a norm whose every call takes `share` longer: it waits for that part of itself."""

    def bound(case: Case, inputs: Inputs) -> Forward:
        forward = norm(case, inputs)

        def call() -> tuple[torch.Tensor, ...]:
            start = clock()
            outputs = forward()
            if inputs.x.is_cuda:
                torch.cuda.synchronize()
            end = clock()
            end += share * (end - start)
            while clock() < end:
                pass
            return outputs

        return call

    return bound


def wrong_mean(inputs: Inputs, case: Case) -> torch.Tensor:
    """Return a layer norm whose mean is one percent off."""
    x = inputs.x
    shifted = x - 1.01 * x.mean(-1, keepdim=True)
    z = shifted * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS)
    assert inputs.weight is not None
    return torch.addcmul(inputs.bias, z, inputs.weight) if inputs.bias is not None else z


def copies(settings: Settings) -> tuple[float, float]:
    """Return the GB/s of the yardstick's large copy and of NumPy's, one thread, the best rounds."""
    size = timing.LARGE["cpu"]
    source, target = np.ones(size // 16), np.zeros(size // 16)
    calls = {
        "ours": timing.copy_call(size, torch.device("cpu"), size, preallocated=True),
        "numpy": lambda: np.copyto(target, source),
    }

    def contestant(call: timing.Call) -> timing.Measure:
        return lambda: {"copy": timing.loop_seconds(call, 1, clock=settings.clock)}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = timing.interleave({name: contestant(call) for name, call in calls.items()}, 21)
    torch.set_num_threads(threads)
    ours, theirs = (size / min(found[name]["copy"]) / 1e9 for name in ("ours", "numpy"))
    return ours, theirs


def planted(torch_provider: Provider, clock: timing.Clock = time.perf_counter) -> list[Provider]:
    """Return torch twice, torch with a delay, and a layer norm with a wrong mean."""
    norm = torch_provider.norms["layer_norm"]
    plain = replace(torch_provider, preallocated=None)
    return [
        replace(plain, name="torch"),
        replace(plain, name="torch again"),
        replace(plain, name="delayed", norms={"layer_norm": delayed(norm, DELAY, clock)}),
        replace(plain, name="wrong mean", norms={"layer_norm": bind(wrong_mean)}),
    ]


def run(device: torch.device, settings: Settings) -> bool:
    """Print what the harness says about the planted faults; return whether it saw them."""
    (torch_provider,), _ = find(["torch"], device)
    cells = {
        cell["provider"]: cell
        for cell in measure([CASE], planted(torch_provider, settings.clock), device, settings)
    }
    base = cells["torch"]["seconds"]["eager"]
    passed = []
    for name, expected in (("torch again", 1.0), ("delayed", 1 + DELAY)):
        factor, noise = timing.ratio(cells[name]["seconds"]["eager"], base)
        verdict = abs(factor - expected) <= max(noise, 0.01)
        passed.append(verdict)
        print(
            f"{name:12} {factor:.3f}x torch, expected {expected:.2f}x, spread {noise:.1%}: "
            f"{'ok' if verdict else 'FAILED'}"
        )
    refused = cells["wrong mean"]["status"] == "wrong" and not cells["wrong mean"]["seconds"]
    passed.append(refused)
    print(f"wrong mean   {cells['wrong mean']['note']}: {'refused' if refused else 'FAILED'}")
    copied = cells[COPY]["bytes"] / median(cells[COPY]["seconds"]["eager"]) / 1e9
    print(f"copy         {copied:.1f} GB/s of the case's bytes into fresh memory")
    if device.type == "cpu":
        ours, theirs = copies(settings)
        agree = abs(ours / theirs - 1) < 0.25  # memcpy writes past the cache, torch does not
        passed.append(agree)
        print(
            f"large copy   {ours:.1f} GB/s on one thread, NumPy's {theirs:.1f} GB/s: "
            f"{'ok' if agree else 'FAILED'}"
        )
    return all(passed)
